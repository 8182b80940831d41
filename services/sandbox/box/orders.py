"""What a box is told to run, and what it tells of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .limits import BoxLimits


@dataclass(frozen=True)
class Order:
    """One process to run.

    `mode` is `exec` (a command) or one of Python's own in `modes`. Messages carry the process's descriptors beside the
    order, from 0 on; for the modes of Python the last of them is the job's parcel. A process with `answers` tells each
    answer by a byte of progress and has its limits anew for the next. What a run with `keep` leaves in the working
    folder is there for the later runs of the box. With `brings_files` one descriptor more comes with the order: a
    parcel of files for this run alone.
    """

    mode: str
    limits: BoxLimits
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    answers: int = 0
    keep: bool = False
    brings_files: bool = False
    collect: list[str] = field(default_factory=list)
    collect_bytes: int = 0

    def to_header(self) -> dict[str, Any]:
        """The order as a message."""
        return {"kind": "run", **vars(self), "limits": vars(self.limits)}


def read_order(header: dict[str, Any]) -> Order:
    """The order in a message."""
    fields = {name: value for name, value in header.items() if name not in ("kind", "begun")}
    return Order(**{**fields, "limits": BoxLimits(**fields["limits"])})


@dataclass
class Outcome:
    """How a process ended.

    `stop` is None when it ended by itself, else wall, cpu, memory, output, told (the service ended it) or died (before
    its last answer). `exit_code` is None when a signal ended it. Times are in microseconds; `answers_us` are those of
    the answers. `peak_bytes` is None where nothing measures memory. `start_error` is an errno when the command could
    not be executed.
    """

    stop: str | None = None
    exit_code: int | None = 0
    signal: int = 0
    wall_us: int = 0
    cpu_us: int = 0
    peak_bytes: int | None = None
    answers_us: list[int] = field(default_factory=list)
    finished: bool = False
    start_error: int = 0

    @property
    def wall_ms(self) -> int:
        """Wall time, rounded up: what ran took some."""
        return -(-self.wall_us // 1000)

    @property
    def cpu_ms(self) -> int:
        """CPU time, rounded up."""
        return -(-self.cpu_us // 1000)
