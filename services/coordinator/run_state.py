"""What a run must remember between iterations; each commit stores it in the buffer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from perigee.errors import DataLossError
from services.coordinator.sampling import SamplerState


@dataclass
class Totals:
    """Sums over the iterations committed so far."""

    tokens_generated: int = 0
    trajectories_trained: int = 0
    trajectories_multi_version: int = 0
    max_logprob_difference: float = 0.0
    # Seconds per phase, those before the first iteration included.
    seconds: dict[str, float] = field(default_factory=dict)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Adds to a phase's seconds."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


@dataclass
class CoordinatorState:
    """The opaque state of the buffer's run."""

    sampler: SamplerState
    # Number of the next group.
    next_group: int = 0
    # Age of the run, time in which no coordinator ran left out.
    elapsed_seconds: float = 0.0
    # Age at which the first iteration began.
    started_seconds: float | None = None
    totals: Totals = field(default_factory=Totals)
    # The last committed iteration's line of metrics.jsonl: written again when a crash lost it.
    last_line: dict[str, Any] | None = None

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()


def decode_state(data: bytes) -> CoordinatorState:
    """From JSON; raises DataLossError when it is not a state."""
    try:
        values = json.loads(data)
        values["sampler"] = SamplerState(**values["sampler"])
        values["totals"] = Totals(**values["totals"])
        return CoordinatorState(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise DataLossError(f"The run's state in the buffer cannot be read: {error}") from error
