"""What a running job tells the caller, and how the caller stops it: agreed between all ranks once a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from perigee.errors import CancelledError, InternalError
from services.trainer.parallel import Control

_GO_ON, _REPORT, _CANCEL = 0, 1, 2


def _ignore(_progress: Any) -> None:
    return None


def _never() -> bool:
    return False


@dataclass
class JobContext:
    """Rank 0's line to the caller; on other ranks it is silent."""

    report: Callable[[Any], None] = _ignore
    is_cancelled: Callable[[], bool] = _never
    interval_s: float = 0.5
    _last_report: float = field(default_factory=time.monotonic)

    def check(self, control: Control) -> bool:
        """Whether a report is due; raises CancelledError when the caller left. The same on every rank."""
        code = _GO_ON
        if self.is_cancelled():
            code = _CANCEL
        elif time.monotonic() - self._last_report >= self.interval_s:
            code = _REPORT
            self._last_report = time.monotonic()
        code = control.agree(code)
        if code == _CANCEL:
            raise CancelledError("the caller left; the trainer holds the version that it held before")
        return code == _REPORT


def check_finite(name: str, value: float) -> None:
    """Raises InternalError when training has left the numbers."""
    if value != value or value in (float("inf"), float("-inf")):
        raise InternalError(f"the {name} is {value}; the trainer went back to the version that it held before")
