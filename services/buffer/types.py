"""The values that the buffer works with; numbers of the enumerations are those of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class EndReason(IntEnum):
    """Why a segment ended; OPEN while it goes on."""

    OPEN = 0
    STOP = 1
    REPETITION = 2
    RESPONSE_CAP = 3
    BUDGET = 4

    @property
    def finishes(self) -> bool:
        """Whether the trajectory is finished, not only its segment."""
        return self in (EndReason.STOP, EndReason.REPETITION, EndReason.RESPONSE_CAP)


class Outcome(IntEnum):
    """What became of a chunk."""

    APPENDED = 1
    DUPLICATE = 2
    FENCED = 3
    GAP = 4
    CONFLICT = 5
    UNKNOWN = 6


class Verdict(IntEnum):
    """What is known of a finished response."""

    UNSPECIFIED = 0
    CORRECT = 1
    WRONG = 2
    UNGRADABLE = 3
    FAILED = 4


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one policy version."""

    policy_version: int
    tokens: int


@dataclass(frozen=True)
class RunState:
    """What one commit per iteration moves forward."""

    run_id: str
    config_digest: str
    iteration: int
    policy_version: int
    coordinator_state: bytes


@dataclass(frozen=True)
class NewGroup:
    """A group to create; the prompt as packed little-endian 32-bit integers."""

    group_id: str
    prompt_id: str
    iteration: int
    prompt: bytes
    trajectory_ids: Sequence[str]


@dataclass(frozen=True)
class Trajectory:
    """A trajectory without its tokens."""

    trajectory_id: str
    tokens: int
    epoch: int
    ending: EndReason
    verdict: Verdict
    reward: float | None
    spans: Sequence[Span]


@dataclass(frozen=True)
class Group:
    """A group that no commit has consumed."""

    group_id: str
    prompt_id: str
    iteration: int
    trajectories: Sequence[Trajectory]


@dataclass(frozen=True)
class Lease:
    """A worker's right to append to a trajectory that holds `tokens` tokens."""

    trajectory_id: str
    epoch: int
    tokens: int


@dataclass(frozen=True)
class Chunk:
    """Tokens to append: packed 32-bit integers and floats of the same length, little-endian, and their versions."""

    trajectory_id: str
    epoch: int
    offset: int
    tokens: bytes
    logprobs: bytes
    versions: str
    ending: EndReason


@dataclass(frozen=True)
class Piece:
    """A part of a trajectory as read; the prompt comes with the first one."""

    trajectory_id: str
    prompt: bytes
    offset: int
    tokens: bytes
    logprobs: bytes
    spans: Sequence[Span]
    last: bool
    ending: EndReason
    epoch: int


@dataclass(frozen=True)
class TrajectoryVerdict:
    """The verdict of a trajectory; a failed one has no reward."""

    trajectory_id: str
    verdict: Verdict
    reward: float | None


@dataclass(frozen=True)
class PromptStatistics:
    """How often a prompt was answered, and how often correctly."""

    prompt_id: str
    trajectories: int
    correct: int


@dataclass(frozen=True)
class Commit:
    """What closes an iteration; `digest` tells a repeated commit from another one of the same iteration."""

    iteration: int
    policy_version: int
    consumed_group_ids: Sequence[str]
    increments: Sequence[PromptStatistics]
    coordinator_state: bytes
    digest: str
