"""Fine-tuning on the examples of a file, supervised or by preferences.

An example is a sequence for each of the responses that the algorithm learns from. They stay in one micro-batch, so that
a loss can compare them, and so a micro-batch may hold more tokens than asked for where one example does.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from google.protobuf import json_format

from perigee.chat import RESPONSE_KEYS
from perigee.config import validate
from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.trainer.v1 import trainer_pb2 as pb
from services.kit.rope import RopeConfig
from services.trainer.algorithms import make_supervised
from services.trainer.algorithms.base import ExampleBatch, SupervisedAlgorithm
from services.trainer.job import SLICE, JobContext, find_optimizer_violations
from services.trainer.megatron.model import Evaluated, Policy
from services.trainer.megatron.optimizer import scheduled_rate
from services.trainer.packing import MicroBatch, TokenSequence, make_micro_batches, pack_sequences

# The sequences of an example, one for each response.
Example = tuple[TokenSequence, ...]


def check_fine_tuning(request: pb.FineTuneRequest) -> None:
    """Raises InvalidArgumentError that names every field out of range."""
    fields = ("steps", "batch_size", "max_tokens_per_microbatch")
    violations = [FieldViolation(name, "has to be at least 1") for name in fields if getattr(request, name) < 1]
    check_supervised(request.algorithm, request.optimizer, violations)


def check_supervised(
    algorithm: pb.Algorithm, optimizer: pb.Optimizer, violations: Sequence[FieldViolation] = ()
) -> SupervisedAlgorithm:
    """Returns the algorithm; raises InvalidArgumentError with `violations` and those of algorithm and optimizer."""
    violations = [*violations, *find_optimizer_violations(optimizer)]
    try:
        made = make_supervised(algorithm)
    except InvalidArgumentError as error:
        raise InvalidArgumentError.for_fields([*error.violations, *violations]) from error
    if violations:
        raise InvalidArgumentError.for_fields(violations)
    return made


def stage_rope(request: pb.FineTuneRequest) -> RopeConfig | None:
    """Returns the rotary embedding of a stage, None where it is the model's; raises InvalidArgumentError."""
    if not request.HasField("rope"):
        return None
    return validate(RopeConfig, json_format.MessageToDict(request.rope), "request", "rope")


def count_tokens(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Returns the tokens and the trained tokens of each example, by which the work is divided."""
    return [(sum(len(s.tokens) for s in each), sum(int(s.trained_T.sum()) for s in each)) for each in examples]


def fine_tune(
    policy: Policy,
    context: JobContext,
    request: pb.FineTuneRequest,
    counts: Sequence[tuple[int, int]],
    examples: Sequence[Example] | None,
) -> pb.FineTuneResponse:
    """Trains the policy on examples, of which rank 0 has all and the others None; every rank returns the same.

    `counts` is that of `count_tokens`. Reports FineTuneResponse messages through `context`. Raises CancelledError or
    InternalError with the weights half-trained: the caller puts them back.
    """
    own = scatter_examples(policy, context, request, counts, examples)
    return _FineTuning(policy, context, request, counts, own).run()


@dataclass
class _FineTuning:
    """A job over this rank's examples. Sums and norms are those since the last report, tokens since the start."""

    policy: Policy
    context: JobContext
    request: pb.FineTuneRequest
    counts: Sequence[tuple[int, int]]
    own: Mapping[int, Example]
    start: float = field(default_factory=time.monotonic)
    # Sums of log-probabilities of each own example's responses before training; on the last pipeline stage.
    reference: dict[int, list[float]] = field(default_factory=dict)
    tokens: int = 0
    examples: int = 0
    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    norms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.algorithm = make_supervised(self.request.algorithm)
        self.responses = len(RESPONSE_KEYS[self.request.algorithm.name or "sft"])

    def run(self) -> pb.FineTuneResponse:
        """Takes all steps and returns the last report."""
        if self.algorithm.needs_reference:
            self._evaluate_reference()
        self.policy.begin_job(self.request.optimizer)
        for step, chosen in enumerate(_draw_batches(len(self.counts), self.request), start=1):
            self._take_step(step, chosen)
            if self.context.check() and step < self.request.steps:
                self.context.report(self._summarize(step))
        return self._summarize(self.request.steps)

    def _evaluate_reference(self) -> None:
        """Computes the log-probabilities of all responses once, under the weights that the job starts from."""
        indices = sorted(self.own)
        lengths = [self.counts[i][0] for i in indices]
        [dealt] = pack_sequences(lengths, self.request.max_tokens_per_microbatch)
        packs = [[indices[i] for i in pack] for pack in dealt]
        batches = self._make_batches(packs, max(self.context.everyone.gather(len(packs))))
        reference: dict[int, list[float]] = {}
        for start in range(0, len(batches), SLICE):
            self.context.check()
            for found in self.policy.evaluate(batches[start : start + SLICE], 1.0):
                if not found.batch.is_filler:
                    pack = packs[found.batch.index]
                    sums_KP = self._describe(found, pack, pack).sums_KP
                    reference.update(zip(pack, sums_KP.T.tolist(), strict=True))
        self.reference = reference

    def _make_batches(self, packs: Sequence[Sequence[int]], count: int) -> list[MicroBatch]:
        """Builds micro-batches of packs of own examples: the first response of each, then the second."""
        sequences = [[self.own[i][number] for number in range(self.responses) for i in pack] for pack in packs]
        return make_micro_batches(sequences, self.policy.dims.device, count)

    def _take_step(self, step: int, chosen: Sequence[int]) -> None:
        dims, request = self.policy.dims, self.request
        packs_by_rank = _pack_examples(chosen, request, self.counts, dims.data)
        packs = packs_by_rank[dims.data_rank]
        batches = self._make_batches(packs, max(len(packs) for packs in packs_by_rank))
        rate = scheduled_rate(request.optimizer, step - 1, request.steps)
        norm, reports = self.policy.step(batches, 1.0, partial(self._loss, packs, chosen), rate)
        self.norms.append(norm)
        for report in reports if dims.reports else ():
            for name, value in report.items():
                self.sums[name] += value
        self.examples += len(chosen)
        self.tokens += sum(self.counts[i][0] for i in chosen)

    def _loss(
        self, packs: Sequence[Sequence[int]], chosen: Sequence[int], found: Evaluated
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Returns the micro-batch's part of the step's loss, and the sums to report of it."""
        if found.batch.is_filler:
            return found.logprobs_T.sum() * 0.0, {}
        loss, sums = self.algorithm.loss(self._describe(found, packs[found.batch.index], chosen))
        report = {f"algorithm/{name}": float(value.detach()) for name, value in sums.items()}
        return loss, report | {"loss": float(loss.detach())}

    def _describe(self, found: Evaluated, pack: Sequence[int], chosen: Sequence[int]) -> ExampleBatch:
        """Returns what a loss finds of a micro-batch of a step on the examples `chosen`."""
        logprobs_T, reference_KP = found.logprobs_T, None
        if self.reference:
            reference_KP = logprobs_T.new_tensor([self.reference[i] for i in pack]).T
        return ExampleBatch(
            logprobs_T=logprobs_T,
            trained_T=found.batch.trained_T,
            sequence_T=found.batch.packed.sequence_T,
            responses=self.responses,
            reference_KP=reference_KP,
            examples=len(chosen),
            trained_tokens=sum(self.counts[i][1] for i in chosen),
        )

    def _summarize(self, step: int) -> pb.FineTuneResponse:
        """Returns the report of all ranks, and begins the next."""
        totals: defaultdict[str, float] = defaultdict(float)
        for part in self.context.everyone.gather(dict(self.sums)):
            for name, value in part.items():
                totals[name] += value
        response = pb.FineTuneResponse(
            step=step,
            steps=self.request.steps,
            loss=totals.pop("loss") / len(self.norms),
            grad_norm=float(np.mean(self.norms)),
            tokens=self.tokens,
            seconds=time.monotonic() - self.start,
            done=step == self.request.steps,
            metrics={name.removeprefix("algorithm/"): value / self.examples for name, value in totals.items()},
        )
        self.examples = 0
        self.sums.clear()
        self.norms.clear()
        return response


def scatter_examples(
    policy: Policy,
    context: JobContext,
    request: pb.FineTuneRequest,
    counts: Sequence[tuple[int, int]],
    examples: Sequence[Example] | None,
) -> Mapping[int, Example]:
    """Returns the examples that this rank trains in any step, by index."""
    wanted: list[set[int]] = [set() for _ in range(policy.dims.data)]
    for chosen in _draw_batches(len(counts), request):
        for indices, packs in zip(wanted, _pack_examples(chosen, request, counts, policy.dims.data), strict=True):
            indices.update(i for pack in packs for i in pack)
    data_ranks = context.everyone.gather(policy.dims.data_rank)
    parts = (
        None if examples is None else [{i: examples[i] for i in sorted(wanted[data_rank])} for data_rank in data_ranks]
    )
    found: Mapping[int, Example] = context.everyone.scatter(parts)
    return found


def _pack_examples(
    chosen: Sequence[int], request: pb.FineTuneRequest, counts: Sequence[tuple[int, int]], ranks: int
) -> list[list[list[int]]]:
    """Returns the examples of each micro-batch of each rank."""
    dealt = pack_sequences([counts[i][0] for i in chosen], request.max_tokens_per_microbatch, ranks)
    return [[[chosen[i] for i in pack] for pack in packs] for packs in dealt]


def _draw_batches(examples: int, request: pb.FineTuneRequest) -> Iterator[list[int]]:
    """Yields the examples of each step: epochs over all of them, each shuffled anew."""
    generator = np.random.default_rng(request.seed)
    queue: list[int] = []
    for _ in range(request.steps):
        while len(queue) < request.batch_size:
            queue += generator.permutation(examples).tolist()
        yield queue[: request.batch_size]
        queue = queue[request.batch_size :]
