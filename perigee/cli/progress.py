"""How far a long command is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 5.0


class ProgressView:
    """Counts what is done of `total` and shows it with a note; a context manager."""

    def __init__(self, console: Console, label: str, total: int, *, plain: bool = False) -> None:
        self._console = console
        self._label = label
        self._total = total
        self._done = 0
        self._shown_at = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal and not plain:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
            self._task = self._bar.add_task(label, total=total, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Takes `count` more as done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, advance=count, note=note)
            return
        now = time.monotonic()
        if now - self._shown_at >= PLAIN_EVERY_S or self._done == self._total:
            self._shown_at = now
            self._console.print(
                f"{self._label}: {self._done:,} of {self._total:,}" + (f", {note}" if note else ""),
                highlight=False,
                markup=False,
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
