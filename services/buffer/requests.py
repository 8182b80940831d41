"""Checks of the buffer's requests: everything that is wrong in one, named by field."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from perigee.buffer.packing import ITEM_BYTES, all_finite, count_tokens
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import FieldViolation, InvalidArgumentError
from services.buffer.config import ImagesConfig, LimitsConfig

# A caller that is wrong everywhere learns no more from the next hundred fields.
MAX_VIOLATIONS = 20
MAX_ID_BYTES = 256
END_REASONS = frozenset(pb.EndReason.values())
DIGEST = re.compile("[0-9a-f]{64}")
VERDICTS = frozenset(pb.Verdict.values()) - {pb.VERDICT_UNSPECIFIED}


def describe_bad_id(identifier: str) -> str | None:
    """Returns what is wrong with an id of a run, group, trajectory, prompt or worker; None when nothing is."""
    if not identifier:
        return "must not be empty"
    if len(identifier.encode()) > MAX_ID_BYTES:
        return f"must not be longer than {MAX_ID_BYTES} bytes"
    if not identifier.isprintable():
        return "must hold printable characters only"
    return None


def describe_bad_run_id(run_id: str) -> str | None:
    """Returns what is wrong with the id of a run, whose braces would break the hash tag; None when nothing is."""
    if "{" in run_id or "}" in run_id:
        return "must not hold braces"
    return describe_bad_id(run_id)


class Checks:
    """Collects the violations of one request."""

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []

    def refuse(self, field: str, description: str) -> None:
        """Adds what is wrong with a field."""
        self._violations.append(FieldViolation(field, description))

    def id(self, field: str, value: str) -> None:
        """Refuses an id that cannot be used."""
        if trouble := describe_bad_id(value):
            self.refuse(field, trouble)

    def ids(self, field: str, values: Sequence[str], limit: int, suffix: str = "") -> None:
        """Refuses a list that is empty or too long, and in it ids that cannot be used or are there twice."""
        if not values:
            self.refuse(field, "must not be empty")
        self.count(field, values, limit)
        self.distinct((f"{field}[{index}]{suffix}", value) for index, value in enumerate(values))

    def distinct(self, named: Iterable[tuple[str, str]]) -> None:
        """Refuses ids, given with their fields, that cannot be used or are there twice."""
        seen: set[str] = set()
        for field, value in named:
            self.id(field, value)
            if value in seen:
                self.refuse(field, f"{value!r} is there twice")
            seen.add(value)

    def count(self, field: str, values: Sequence[object], limit: int) -> None:
        """Refuses a list that is too long."""
        if len(values) > limit:
            self.refuse(field, f"holds {len(values)} items, {limit} at most: send several calls")

    def packed(self, field: str, values: bytes) -> None:
        """Refuses packed tokens that are cut inside of one."""
        if len(values) % ITEM_BYTES:
            self.refuse(field, f"holds {len(values)} bytes, not {ITEM_BYTES} for each token")

    def digest(self, field: str, value: str) -> None:
        """Refuses what cannot name an image."""
        if not DIGEST.fullmatch(value):
            self.refuse(field, "must be a SHA-256 of 64 hexadecimal digits, in lower case")

    def finish(self) -> None:
        """Raises InvalidArgumentError when something was refused."""
        if self._violations:
            raise InvalidArgumentError.for_fields(self._violations[:MAX_VIOLATIONS])


def check_groups(groups: Sequence[pb.NewGroup], limits: LimitsConfig) -> None:
    """Raises InvalidArgumentError for groups that cannot be created."""
    checks = Checks()
    checks.ids("groups", [group.group_id for group in groups], limits.groups, ".group_id")
    trajectory_ids = [
        (f"groups[{index}].trajectory_ids[{position}]", trajectory_id)
        for index, group in enumerate(groups)
        for position, trajectory_id in enumerate(group.trajectory_ids)
    ]
    checks.count("groups.trajectory_ids", trajectory_ids, limits.trajectories)
    checks.distinct(trajectory_ids)
    for index, group in enumerate(groups):
        checks.id(f"groups[{index}].prompt_id", group.prompt_id)
        if not group.trajectory_ids:
            checks.refuse(f"groups[{index}].trajectory_ids", "must not be empty")
        if not group.prompt_token_ids:
            checks.refuse(f"groups[{index}].prompt_token_ids", "must not be empty")
        checks.packed(f"groups[{index}].prompt_token_ids", group.prompt_token_ids)
        if len(group.image_digests) > count_tokens(group.prompt_token_ids):
            checks.refuse(f"groups[{index}].image_digests", "holds more images than the prompt has tokens")
        for position, digest in enumerate(group.image_digests):
            checks.digest(f"groups[{index}].image_digests[{position}]", digest)
    checks.finish()


def check_pieces(pieces: Sequence[pb.ImagePiece], limits: LimitsConfig, images: ImagesConfig) -> None:
    """Raises InvalidArgumentError for pieces that no image can have."""
    checks = Checks()
    if not pieces:
        checks.refuse("pieces", "must not be empty")
    checks.count("pieces", pieces, limits.images)
    for index, piece in enumerate(pieces):
        checks.digest(f"pieces[{index}].digest", piece.digest)
        if not 0 < piece.image_bytes <= images.max_image_bytes:
            checks.refuse(
                f"pieces[{index}].image_bytes",
                f"is {piece.image_bytes}, not from 1 to buffer.images.max_image_bytes ({images.max_image_bytes})",
            )
        elif piece.offset + len(piece.content) > piece.image_bytes:
            checks.refuse(f"pieces[{index}].content", f"passes the {piece.image_bytes} bytes of the image")
        elif piece.offset and not piece.content:
            checks.refuse(f"pieces[{index}].content", "must not be empty after the first piece")
    checks.finish()


def check_digests(digests: Sequence[str], limits: LimitsConfig) -> None:
    """Raises InvalidArgumentError for digests that cannot name images."""
    checks = Checks()
    if not digests:
        checks.refuse("digests", "must not be empty")
    checks.count("digests", digests, limits.images)
    for index, digest in enumerate(digests):
        checks.digest(f"digests[{index}]", digest)
    checks.finish()


def check_chunks(chunks: Sequence[pb.Chunk], limits: LimitsConfig) -> None:
    """Raises InvalidArgumentError for chunks that cannot be appended to any trajectory."""
    checks = Checks()
    if not chunks:
        checks.refuse("chunks", "must not be empty")
    checks.count("chunks", chunks, limits.chunks)
    for index, chunk in enumerate(chunks):
        _check_chunk(f"chunks[{index}]", chunk, checks, limits)
    checks.finish()


def _check_chunk(field: str, chunk: pb.Chunk, checks: Checks, limits: LimitsConfig) -> None:
    tokens = count_tokens(chunk.token_ids)
    checks.id(f"{field}.trajectory_id", chunk.trajectory_id)
    checks.packed(f"{field}.token_ids", chunk.token_ids)
    if chunk.epoch < 1:
        checks.refuse(f"{field}.epoch", "must be the epoch of a lease, 1 or more")
    if len(chunk.logprobs) != len(chunk.token_ids):
        checks.refuse(f"{field}.logprobs", f"holds {len(chunk.logprobs)} bytes, token_ids {len(chunk.token_ids)}")
    elif not len(chunk.logprobs) % ITEM_BYTES and not all_finite(chunk.logprobs):
        checks.refuse(f"{field}.logprobs", "must be finite numbers")
    if len(chunk.experts) % max(tokens, 1) or (chunk.experts and not tokens):
        checks.refuse(f"{field}.experts", f"holds {len(chunk.experts)} bytes, not as many for each of {tokens} tokens")
    if (spanned := sum(span.tokens for span in chunk.versions)) != tokens:
        checks.refuse(f"{field}.versions", f"spans {spanned} tokens, the chunk has {tokens}")
    if chunk.offset + tokens > limits.trajectory_tokens:
        checks.refuse(f"{field}.offset", f"passes the limit of {limits.trajectory_tokens} tokens per trajectory")
    if not tokens and not chunk.end_reason:
        checks.refuse(field, "holds neither tokens nor an end reason")
    if chunk.end_reason not in END_REASONS:
        checks.refuse(f"{field}.end_reason", f"{chunk.end_reason} is not an end reason")


def check_ids(field: str, values: Sequence[str], limits: LimitsConfig, *, worker_id: str | None = None) -> None:
    """Raises InvalidArgumentError for trajectory ids, or an id of a worker, that cannot be used."""
    checks = Checks()
    if worker_id is not None:
        checks.id("worker_id", worker_id)
    checks.ids(field, values, limits.trajectories)
    checks.finish()


def check_verdicts(verdicts: Sequence[pb.TrajectoryVerdict], limits: LimitsConfig) -> None:
    """Raises InvalidArgumentError for verdicts whose reward does not fit them."""
    checks = Checks()
    checks.ids("verdicts", [item.trajectory_id for item in verdicts], limits.trajectories, ".trajectory_id")
    for index, item in enumerate(verdicts):
        field = f"verdicts[{index}]"
        has_reward = item.HasField("reward")
        if item.verdict not in VERDICTS:
            checks.refuse(f"{field}.verdict", "must be a verdict")
        if has_reward and not math.isfinite(item.reward):
            checks.refuse(f"{field}.reward", "must be a finite number")
        if item.verdict == pb.VERDICT_FAILED and has_reward:
            checks.refuse(f"{field}.reward", "must be absent: a failed verdict has no reward")
        if item.verdict in (pb.VERDICT_CORRECT, pb.VERDICT_WRONG) and not has_reward:
            checks.refuse(f"{field}.reward", "is required with this verdict")
    checks.finish()


def check_commit(request: pb.CommitIterationRequest, limits: LimitsConfig) -> None:
    """Raises InvalidArgumentError for a commit that no run can take."""
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
