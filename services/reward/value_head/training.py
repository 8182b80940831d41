"""Trains a value head: AdamW on pointwise and pairwise losses, evaluations, checkpoints, the best model on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from perigee.errors import FailedPreconditionError, InternalError
from services.reward.value_head.batching import draw_steps, pad, split_by_tokens
from services.reward.value_head.checkpoints import Checkpoints
from services.reward.value_head.data import ResponseSet
from services.reward.value_head.evaluation import Evaluation, evaluate_scores
from services.reward.value_head.folder import Description, remove_stale_asides, write_json
from services.reward.value_head.losses import pairwise_loss, pointwise_loss
from services.reward.value_head.network import ValueHead, choose_device, load_backbone
from services.reward.value_head.preparing import Prepared, prepare
from services.reward.value_head.saving import save_value_head
from services.reward.value_head.training_config import TrainingConfig

MODEL_FOLDER = "model"
HISTORY_FILE = "evaluations.json"


@dataclass(frozen=True)
class Report:
    """One evaluation: its step of how many, the mean loss since the one before, and whether it is the best so far."""

    step: int
    steps: int
    loss: float
    evaluation: Evaluation
    best: bool


@dataclass(frozen=True)
class Summary:
    """How a training ended: `reason` is finished, stopped early or interrupted; the best evaluation, and the model."""

    reason: str
    step: int
    best: Evaluation | None
    model: Path


def train(
    config: TrainingConfig,
    report: Callable[[Report], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Trains to the end, until it gets no better, or until `should_stop`, which is asked after each step.

    Raises InvalidArgumentError for wrong settings or data, FailedPreconditionError when `out` holds a training that is
    not to be resumed, InternalError when the loss is no number, ResourceExhaustedError when the disk is full.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    training = Training(config, prepare(config))
    return training.run(report, should_stop)


class Training:
    """A network in training, where its last checkpoint left it."""

    def __init__(self, config: TrainingConfig, prepared: Prepared) -> None:
        self._config = config
        self._prepared = prepared
        self._out = Path(config.out)
        self._checkpoints = Checkpoints(self._out / "checkpoints", prepared.fingerprint)
        if self._checkpoints.steps() and not config.resume:
            raise FailedPreconditionError(f"{self._out} holds a training; go on with --resume, or name another folder")
        self._out.mkdir(parents=True, exist_ok=True)
        for folder in (self._out, self._checkpoints.folder):
            remove_stale_asides(folder)
        self._device = choose_device(config.device)
        self.network = ValueHead(load_backbone(Path(config.backbone), torch.float32))
        if config.gradient_checkpointing:
            self.network.backbone.gradient_checkpointing_enable()
        self.network.to(self._device)
        self._optimizer = make_optimizer(self.network, config)
        self._progress = self._checkpoints.restore(self.network, self._optimizer)
        if not (self._out / MODEL_FOLDER).exists():
            self._progress.best_step = None  # the next evaluation writes it
        tokens = prepared.training.tokens
        self._lengths = [max(len(tokens[index]) for index in unit) for unit in prepared.units]
        self._sizes = [len(unit) for unit in prepared.units]
        self._steps_per_epoch = math.ceil(len(prepared.units) / config.batch_size)
        self._steps = self._steps_per_epoch * config.epochs

    def run(self, report: Callable[[Report], None], should_stop: Callable[[], bool]) -> Summary:
        """Trains to the end, until it gets no better, or until `should_stop`."""
        progress = self._progress
        eval_every = self._config.eval_every_steps or self._steps_per_epoch
        losses: list[float] = []
        order: list[list[int]] = []
        while progress.step < self._steps and not self._is_exhausted():
            epoch, place = divmod(progress.step, self._steps_per_epoch)
            if not order or place == 0:
                order = draw_steps(self._lengths, self._config.batch_size, self._config.seed, epoch)
            losses.append(self.train_step(order[place]))
            progress.step += 1
            is_evaluated = progress.step % eval_every == 0 or progress.step == self._steps
            if is_evaluated:
                report(self._evaluate(float(np.mean(losses))))
                losses.clear()
            stop = should_stop() and progress.step < self._steps
            if is_evaluated or stop or progress.step % self._config.checkpoint_every_steps == 0:
                self._checkpoints.write(self.network, self._optimizer, progress)
            if stop:
                return self._summarize("interrupted")
        return self._summarize("finished" if progress.step == self._steps else "stopped early")

    def train_step(self, units: Sequence[int]) -> float:
        """One step of the optimizer on these units, in micro-batches; returns its loss."""
        rate = scheduled_rate(self._config, self._progress.step, self._steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        self._optimizer.zero_grad(set_to_none=True)
        responses = sum(self._sizes[unit] for unit in units)
        pairs = sum(self._sizes[unit] == 2 for unit in units)
        total = 0.0
        for batch in split_by_tokens(units, self._lengths, self._sizes, self._config.max_microbatch_tokens):
            rows = [index for unit in batch for index in self._prepared.units[unit]]
            scores_N = self._score(self._prepared.training, rows)
            loss = self._combine(self._prepared.training, rows, scores_N, self._pair_rows(batch), responses, pairs)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            raise InternalError(f"the loss of step {self._progress.step + 1} is {total}; lower learning_rate")
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._config.max_gradient_norm)
        self._optimizer.step()
        return total

    def _pair_rows(self, batch: Sequence[int]) -> list[tuple[int, int]]:
        """Rows of the pairs of a micro-batch."""
        starts = np.cumsum([0, *(self._sizes[unit] for unit in batch)]).tolist()
        return [(start, start + 1) for start, unit in zip(starts, batch, strict=False) if self._sizes[unit] == 2]

    def _combine(
        self,
        data: ResponseSet,
        rows: Sequence[int],
        scores_N: torch.Tensor,
        pairs: Sequence[tuple[int, int]],
        responses: int,
        all_pairs: int,
    ) -> torch.Tensor:
        """The part that these rows have in the mean loss over `responses` and `all_pairs`."""
        loss = scores_N.new_zeros(())
        if self._config.loss != "pairwise":
            correct_N = torch.from_numpy(data.correct_N[list(rows)]).to(scores_N.device)
            loss = loss + pointwise_loss(scores_N, correct_N) / responses
        if self._config.loss != "pointwise" and pairs:
            chosen, rejected = (list(side) for side in zip(*pairs, strict=True))
            weight = self._config.pairwise_weight if self._config.loss == "both" else 1.0
            loss = loss + weight * pairwise_loss(scores_N[chosen], scores_N[rejected]) / all_pairs
        return loss

    def _score(self, data: ResponseSet, rows: Sequence[int]) -> torch.Tensor:
        ids_NT, mask_NT = pad([data.tokens[index] for index in rows], self._prepared.pad_token_id, self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            scores_N: torch.Tensor = self.network(ids_NT, mask_NT)
        return scores_N

    @torch.no_grad()
    def _evaluate(self, training_loss: float) -> Report:
        """Scores the held-out responses; writes the model when it is the best so far."""
        data, progress = self._prepared.evaluation, self._progress
        self.network.eval()
        scores_N = torch.zeros(len(data.tokens))
        lengths = [len(tokens) for tokens in data.tokens]
        for rows in split_by_tokens(
            range(len(lengths)), lengths, [1] * len(lengths), self._config.max_microbatch_tokens
        ):
            scores_N[rows] = self._score(data, rows).float().cpu()
        every = list(range(len(lengths)))
        loss = self._combine(data, every, scores_N, data.pairs, len(every), len(data.pairs))
        evaluation = evaluate_scores(scores_N.double().numpy(), data.correct_N, data.pairs, float(loss))
        best = self._best()
        is_best = best is None or evaluation.rank > best.rank
        progress.history.append(asdict(evaluation) | {"step": progress.step, "training_loss": training_loss})
        if is_best:
            progress.best_step = progress.step
            save_value_head(
                self.network, Path(self._config.backbone), self._describe(evaluation), self._out / MODEL_FOLDER
            )
        write_json(self._out / HISTORY_FILE, progress.history)
        return Report(progress.step, self._steps, training_loss, evaluation, is_best)

    def _describe(self, evaluation: Evaluation) -> Description:
        encoder = self._prepared.encoder
        settings = self._config.model_dump(exclude={"data", "eval_data", "backbone", "out", "resume"})
        return Description(
            template=encoder.template,
            max_tokens=encoder.max_tokens,
            end_token_id=encoder.end_token_id,
            pad_token_id=self._prepared.pad_token_id,
            threshold=evaluation.threshold,
            evaluation=asdict(evaluation),
            training=settings | {"step": self._progress.step},
        )

    def _best(self) -> Evaluation | None:
        for entry in self._progress.history:
            if entry["step"] == self._progress.best_step:
                return Evaluation(**{key: entry[key] for key in entry if key not in ("step", "training_loss")})
        return None

    def _is_exhausted(self) -> bool:
        """Whether the last `patience` evaluations were none the best."""
        best = self._progress.best_step
        if best is None:
            return False
        since_best = [entry for entry in self._progress.history if entry["step"] > best]
        return len(since_best) >= self._config.patience

    def _summarize(self, reason: str) -> Summary:
        return Summary(reason, self._progress.step, self._best(), self._out / MODEL_FOLDER)


def make_optimizer(network: ValueHead, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))


def scheduled_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The rate of step `step`, counted from 0: up in a straight line, then down to 0 in another."""
    warmup = round(config.warmup_share * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * (steps - step) / (steps - warmup)
