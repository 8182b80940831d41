"""Trains a value head: AdamW on pointwise and pairwise losses, evaluations, checkpoints, the best model on disk.

A checkpoint holds everything that it takes to resume as if the training had never stopped.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from perigee.errors import DataLossError, FailedPreconditionError, InternalError
from perigee.files import remove_stale_staging, write_atomically
from services.reward.value_head.data import (
    Prepared,
    ResponseSet,
    TrainingConfig,
    draw_steps,
    prepare,
    split_by_tokens,
)
from services.reward.value_head.folder import Description, writing_folder
from services.reward.value_head.network import (
    ValueHead,
    choose_device,
    load_backbone,
    pad,
    pairwise_loss,
    pointwise_loss,
    save_value_head,
)

MODEL_FOLDER = "model"
HISTORY_FILE = "evaluations.json"
_STATE = "state.pt"


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out responses; `accuracy` is that at `threshold`, which was fitted on the same responses."""

    responses: int
    pairs: int
    loss: float
    auc: float
    threshold: float
    accuracy: float
    accuracy_at_half: float
    # Share of pairs whose right response has the higher score; None without pairs.
    pair_accuracy: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """The larger the better."""
        return self.auc, -self.loss


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
    """End of a training: `reason` is finished, stopped early or interrupted; the best evaluation, and the model."""

    reason: str
    step: int
    best: Evaluation | None
    model: Path


@dataclass
class Progress:
    """Progress of a training: steps done, evaluations in their order, and the step of the best one."""

    step: int = 0
    best_step: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoints:
    """The newest checkpoint under `folder`; `fingerprint` names settings and data, which have to stay the same."""

    folder: Path
    fingerprint: str

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, oldest first."""
        matches = [re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*")]
        return sorted(int(match[1]) for match in matches if match)

    def write(self, network: ValueHead, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Writes a checkpoint, then removes older ones.

        Raises ResourceExhaustedError naming the folder when the disk refuses.
        """
        state = {
            "fingerprint": self.fingerprint,
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "progress": vars(progress),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with writing_folder(self._path(progress.step)) as staging:
            torch.save(state, staging / _STATE)
        for step in self.steps():
            if step != progress.step:
                shutil.rmtree(self._path(step))

    def restore(self, network: ValueHead, optimizer: torch.optim.Optimizer) -> Progress:
        """Restores the newest checkpoint and returns its progress; the beginning when there is none.

        Raises FailedPreconditionError when it is another training's, DataLossError when it cannot be read.
        """
        if not self.steps():
            return Progress()
        path = self._path(self.steps()[-1]) / _STATE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises what its unpickler and its archive reader raise
            raise DataLossError(f"checkpoint {path} is damaged: {error}") from error
        if state["fingerprint"] != self.fingerprint:
            raise FailedPreconditionError(
                f"{path.parent} was written with other settings or data; name another folder with --out, or train "
                "with the same ones"
            )
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available() and state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        return Progress(**state["progress"])

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


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
            remove_stale_staging(folder)
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
        """Returns the rows of the pairs of a micro-batch."""
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
        """Returns the part that these rows have in the mean loss over `responses` and `all_pairs`."""
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
        write_atomically(self._out / HISTORY_FILE, json.dumps(progress.history, indent=2).encode() + b"\n")
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
        """Returns whether the last `patience` evaluations were none the best."""
        best = self._progress.best_step
        if best is None:
            return False
        since_best = [entry for entry in self._progress.history if entry["step"] > best]
        return len(since_best) >= self._config.patience

    def _summarize(self, reason: str) -> Summary:
        return Summary(reason, self._progress.step, self._best(), self._out / MODEL_FOLDER)


def make_optimizer(network: ValueHead, config: TrainingConfig) -> torch.optim.AdamW:
    """Returns an AdamW that decays matrices only."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))


def scheduled_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """Returns the rate of step `step`, counted from 0: up in a straight line, then down to 0 in another."""
    warmup = round(config.warmup_share * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * (steps - step) / (steps - warmup)


def evaluate_scores(
    scores_N: NDArray[np.float64], correct_N: NDArray[np.bool_], pairs: list[tuple[int, int]], loss: float
) -> Evaluation:
    """Returns the figures of scores, given the training loss on them; needs right and wrong responses."""
    probabilities_N = sigmoid(scores_N)
    threshold, accuracy = fit_threshold(probabilities_N, correct_N)
    higher = [float(scores_N[right] > scores_N[wrong]) for right, wrong in pairs]
    return Evaluation(
        responses=len(scores_N),
        pairs=len(pairs),
        loss=loss,
        auc=area_under_curve(scores_N, correct_N),
        threshold=threshold,
        accuracy=accuracy,
        accuracy_at_half=float(np.mean((probabilities_N >= 0.5) == correct_N)),
        pair_accuracy=float(np.mean(higher)) if higher else None,
    )


def area_under_curve(scores_N: NDArray[np.float64], correct_N: NDArray[np.bool_]) -> float:
    """Returns the area under the ROC curve: how often a right response scores above a wrong one, ties counted half."""
    _, inverse_N, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    # Mean rank of each tie.
    ranks_N = (np.cumsum(counts) - (counts - 1) / 2)[inverse_N]
    right = int(correct_N.sum())
    wrong = len(correct_N) - right
    return float((ranks_N[correct_N].sum() - right * (right + 1) / 2) / (right * wrong))


def fit_threshold(probabilities_N: NDArray[np.float64], correct_N: NDArray[np.bool_]) -> tuple[float, float]:
    """Returns the probability from which on calling a response right is right most often, and how often.

    Half-way between two probabilities; of several that are as good, the one nearest to a half.
    """
    values, inverse_N = np.unique(probabilities_N, return_inverse=True)
    right_V = np.bincount(inverse_N, weights=correct_N, minlength=len(values))
    wrong_V = np.bincount(inverse_N, weights=~correct_N, minlength=len(values))
    # With the threshold below value v: wrong ones below v and right ones from v on are called as they are.
    hits = np.concatenate([[0], np.cumsum(wrong_V)]) + np.concatenate([np.cumsum(right_V[::-1])[::-1], [0]])
    between = np.concatenate([[values[0] / 2], (values[:-1] + values[1:]) / 2, [(values[-1] + 1) / 2]])
    best = np.flatnonzero(hits == hits.max())
    chosen = best[np.argmin(np.abs(between[best] - 0.5))]
    return float(between[chosen]), float(hits[chosen] / len(correct_N))


def sigmoid(scores_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the probabilities of log-odds, without overflow."""
    probabilities_N: NDArray[np.float64] = np.exp(-np.logaddexp(0.0, -scores_N))
    return probabilities_N
