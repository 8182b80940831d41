"""When the phases of an iteration began and how long they took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from services.coordinator import metrics


@dataclass
class PhaseTime:
    """Seconds from the iteration's start to the phase's, and seconds that it took."""

    start: float
    seconds: float


@dataclass
class Timeline:
    """The phases of one iteration; they may overlap."""

    started: float = field(default_factory=time.monotonic)
    phases: dict[str, PhaseTime] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the block."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self.phases[name] = PhaseTime(start - self.started, seconds)
            metrics.PHASE_SECONDS.labels(name).observe(seconds)

    @property
    def seconds(self) -> float:
        """Seconds since the iteration's start."""
        return time.monotonic() - self.started
