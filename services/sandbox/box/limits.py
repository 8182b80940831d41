"""The limits of one program, as the service resolves them and the agent enforces them."""

from __future__ import annotations

from dataclasses import dataclass

HOME = "/box"
"""The working folder of every program in a box."""


@dataclass(frozen=True)
class BoxLimits:
    """All limits, set: times in milliseconds hold per test, sizes in bytes for the whole box."""

    wall_ms: int
    cpu_ms: int
    memory_bytes: int
    processes: int
    file_bytes: int
    output_bytes: int
