"""Protobuf requests as the buffer's own values, with everything that can be wrong in them named by field."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import FieldViolation, InvalidArgumentError
from services.buffer.config import LimitsConfig
from services.buffer.keys import describe_bad_id, describe_bad_run_id
from services.buffer.packing import are_finite, pack_logprobs, pack_spans, pack_tokens
from services.buffer.types import Chunk, Commit, EndReason, NewGroup, PromptStatistics, Span, TrajectoryVerdict, Verdict

# A caller that is wrong everywhere learns no more from the next hundred fields.
MAX_VIOLATIONS = 20
END_REASONS = frozenset(int(reason) for reason in EndReason)
VERDICTS = frozenset(int(verdict) for verdict in Verdict if verdict)


class Checks:
    """Collects the violations of one request."""

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []

    def refuse(self, field: str, description: str) -> None:
        """Notes what is wrong with a field."""
        self._violations.append(FieldViolation(field, description))

    def id(self, field: str, value: str) -> None:
        """Notes an id that cannot be used."""
        if trouble := describe_bad_id(value):
            self.refuse(field, trouble)

    def ids(self, field: str, values: Sequence[str], limit: int, suffix: str = "") -> None:
        """Notes a list that is empty or too long, and in it ids that cannot be used or are there twice."""
        if not values:
            self.refuse(field, "must not be empty")
        self.count(field, values, limit)
        self.different((f"{field}[{index}]{suffix}", value) for index, value in enumerate(values))

    def different(self, named: Iterable[tuple[str, str]]) -> None:
        """Notes ids, given with their fields, that cannot be used or are there twice."""
        seen: set[str] = set()
        for field, value in named:
            self.id(field, value)
            if value in seen:
                self.refuse(field, f"{value!r} is there twice")
            seen.add(value)

    def count(self, field: str, values: Sequence[object], limit: int) -> None:
        """Notes a list that is too long."""
        if len(values) > limit:
            self.refuse(field, f"holds {len(values)} items, {limit} at most: send several calls")

    def finish(self) -> None:
        """Raises InvalidArgumentError with what was noted."""
        if not self._violations:
            return
        first = self._violations[0]
        more = len(self._violations) - 1
        message = f"{first.field}: {first.description}" + (f" (and {more} more)" if more else "")
        raise InvalidArgumentError(message, violations=self._violations[:MAX_VIOLATIONS])


def check_run_id(run_id: str) -> None:
    """Raises InvalidArgumentError for an id that no run can have."""
    if trouble := describe_bad_run_id(run_id):
        raise InvalidArgumentError.of("run_id", trouble)


def read_groups(groups: Sequence[pb.NewGroup], limits: LimitsConfig) -> list[NewGroup]:
    """The groups of a CreateGroups request."""
    checks = Checks()
    checks.ids("groups", [group.group_id for group in groups], limits.groups, ".group_id")
    trajectory_ids = [
        (f"groups[{index}].trajectory_ids[{place}]", trajectory_id)
        for index, group in enumerate(groups)
        for place, trajectory_id in enumerate(group.trajectory_ids)
    ]
    checks.count("groups.trajectory_ids", trajectory_ids, limits.trajectories)
    checks.different(trajectory_ids)
    for index, group in enumerate(groups):
        checks.id(f"groups[{index}].prompt_id", group.prompt_id)
        if not group.trajectory_ids:
            checks.refuse(f"groups[{index}].trajectory_ids", "must not be empty")
        if not group.prompt_token_ids:
            checks.refuse(f"groups[{index}].prompt_token_ids", "must not be empty")
    checks.finish()
    return [
        NewGroup(
            group_id=group.group_id,
            prompt_id=group.prompt_id,
            iteration=group.iteration,
            prompt=pack_tokens(group.prompt_token_ids),
            trajectory_ids=list(group.trajectory_ids),
        )
        for group in groups
    ]


def read_chunks(chunks: Sequence[pb.Chunk], limits: LimitsConfig) -> list[Chunk]:
    """The chunks of an AppendChunks request."""
    checks = Checks()
    if not chunks:
        checks.refuse("chunks", "must not be empty")
    checks.count("chunks", chunks, limits.chunks)
    read = [_read_chunk(f"chunks[{index}]", chunk, checks, limits) for index, chunk in enumerate(chunks)]
    if not are_finite(b"".join(chunk.logprobs for chunk in read)):
        for index, chunk in enumerate(read):
            if not are_finite(chunk.logprobs):
                checks.refuse(f"chunks[{index}].logprobs", "must be finite numbers")
    checks.finish()
    return read


def _read_chunk(field: str, chunk: pb.Chunk, checks: Checks, limits: LimitsConfig) -> Chunk:
    count = len(chunk.token_ids)
    spans = [Span(span.policy_version, span.tokens) for span in chunk.versions]
    checks.id(f"{field}.trajectory_id", chunk.trajectory_id)
    if chunk.epoch < 1:
        checks.refuse(f"{field}.epoch", "must be the epoch of a lease, 1 or more")
    if len(chunk.logprobs) != count:
        checks.refuse(f"{field}.logprobs", f"holds {len(chunk.logprobs)} values for {count} tokens")
    if (spanned := sum(span.tokens for span in spans)) != count:
        checks.refuse(f"{field}.versions", f"spans {spanned} tokens, the chunk has {count}")
    if chunk.offset + count > limits.trajectory_tokens:
        checks.refuse(f"{field}.offset", f"passes the limit of {limits.trajectory_tokens} tokens per trajectory")
    if not count and not chunk.end_reason:
        checks.refuse(field, "holds neither tokens nor an end reason")
    ending = EndReason.OPEN
    if chunk.end_reason in END_REASONS:
        ending = EndReason(chunk.end_reason)
    else:
        checks.refuse(f"{field}.end_reason", f"{chunk.end_reason} is not an end reason")
    return Chunk(
        trajectory_id=chunk.trajectory_id,
        epoch=chunk.epoch,
        offset=chunk.offset,
        tokens=pack_tokens(chunk.token_ids),
        logprobs=pack_logprobs(chunk.logprobs),
        versions=pack_spans(spans, chunk.offset),
        ending=ending,
    )


def read_ids(field: str, values: Sequence[str], limits: LimitsConfig, *, worker_id: str | None = None) -> list[str]:
    """The trajectory ids of a request, and the worker's id where it has one."""
    checks = Checks()
    if worker_id is not None:
        checks.id("worker_id", worker_id)
    checks.ids(field, values, limits.trajectories)
    checks.finish()
    return list(values)


def read_verdicts(verdicts: Sequence[pb.TrajectoryVerdict], limits: LimitsConfig) -> list[TrajectoryVerdict]:
    """The verdicts of a RecordVerdicts request."""
    checks = Checks()
    checks.ids("verdicts", [item.trajectory_id for item in verdicts], limits.trajectories, ".trajectory_id")
    read = []
    for index, item in enumerate(verdicts):
        field = f"verdicts[{index}]"
        reward = item.reward if item.HasField("reward") else None
        if item.verdict not in VERDICTS:
            checks.refuse(f"{field}.verdict", "must be a verdict")
            continue
        verdict = Verdict(item.verdict)
        if reward is not None and not math.isfinite(reward):
            checks.refuse(f"{field}.reward", "must be a finite number")
        if verdict is Verdict.FAILED and reward is not None:
            checks.refuse(f"{field}.reward", "must be absent: a failed verdict has no reward")
        if verdict in (Verdict.CORRECT, Verdict.WRONG) and reward is None:
            checks.refuse(f"{field}.reward", "is required with this verdict")
        read.append(TrajectoryVerdict(item.trajectory_id, verdict, reward))
    checks.finish()
    return read


def read_commit(request: pb.CommitIterationRequest, limits: LimitsConfig) -> Commit:
    """The contents of a CommitIteration request."""
    checks = Checks()
    if request.iteration < 1:
        checks.refuse("iteration", "must be 1 or more")
    if request.consumed_group_ids:
        checks.ids("consumed_group_ids", request.consumed_group_ids, limits.groups)
    if request.prompt_increments:
        prompt_ids = [item.prompt_id for item in request.prompt_increments]
        checks.ids("prompt_increments", prompt_ids, limits.trajectories, ".prompt_id")
    for index, item in enumerate(request.prompt_increments):
        if item.correct > item.trajectories:
            checks.refuse(f"prompt_increments[{index}].correct", "must not be more than trajectories")
    checks.finish()
    return Commit(
        iteration=request.iteration,
        policy_version=request.policy_version,
        consumed_group_ids=list(request.consumed_group_ids),
        increments=_read_statistics(request.prompt_increments),
        coordinator_state=request.coordinator_state,
        digest=hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest(),
    )


def _read_statistics(items: Iterable[pb.PromptStatistics]) -> list[PromptStatistics]:
    return [PromptStatistics(item.prompt_id, item.trajectories, item.correct) for item in items]
