"""What iterations and fine-tuning have in common: both are jobs.

A job is a collective: every rank runs it with the same arguments, reports to its caller, and ends when that one leaves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from perigee.errors import CancelledError, FieldViolation
from perigee.trainer.v1 import trainer_pb2 as pb
from services.trainer.megatron.parallel import ObjectChannel

_CONTINUE, _REPORT, _CANCEL = 0, 1, 2
# Micro-batches evaluated between two looks at whether the caller is still there.
SLICE = 8


@dataclass
class JobContext:
    """Channels of a job to its other ranks and, on rank 0, to its caller."""

    everyone: ObjectChannel
    replica: ObjectChannel
    report: Callable[[Any], None] = lambda _: None
    is_cancelled: Callable[[], bool] = lambda: False
    interval_s: float = 0.5
    _last_report: float = field(default_factory=time.monotonic)

    def check(self) -> bool:
        """Returns whether a report is due, the same on every rank; raises CancelledError when the caller left."""
        code = _CONTINUE
        if self.is_cancelled():
            code = _CANCEL
        elif time.monotonic() - self._last_report >= self.interval_s:
            code = _REPORT
            self._last_report = time.monotonic()
        code = self.everyone.agree(code)
        if code == _CANCEL:
            raise CancelledError("the caller left; the trainer has the version loaded that it had before")
        return code == _REPORT


def find_optimizer_violations(optimizer: pb.Optimizer) -> Iterator[FieldViolation]:
    """Yields the fields of an optimizer that are out of range."""
    for name in ("learning_rate", "beta1", "beta2", "weight_decay", "max_grad_norm", "min_lr_ratio"):
        value = getattr(optimizer, name)
        if not math.isfinite(value) or value < 0:
            yield FieldViolation(f"optimizer.{name}", f"{value} is not a number of at least 0")
    for name in ("beta1", "beta2"):
        if getattr(optimizer, name) >= 1:
            yield FieldViolation(f"optimizer.{name}", f"{getattr(optimizer, name)} is not below 1")
    if optimizer.learning_rate == 0:
        yield FieldViolation("optimizer.learning_rate", "0 would train nothing")
