"""`perigee reward train`: checks the settings, trains, and reports progress in plain lines."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from perigee.config import merge, parse_override, validate
from services.reward.value_head.data import TrainingConfig

if TYPE_CHECKING:
    from services.reward.value_head.training import Evaluation, Report


def train_value_head(values: Mapping[str, Any], overrides: Sequence[str]) -> int:
    """Trains to the end and returns 0, or 128 + n when signal n ended it; a checkpoint is written then.

    Raises InvalidArgumentError naming a wrong setting, and what training raises.
    """
    settings = dict(values)
    for override in overrides:
        merge(settings, parse_override(override))
    config = validate(TrainingConfig, settings, "perigee reward train", "")
    # Only now, because torch takes seconds to load.
    from services.reward.value_head.training import train

    with catching_signals() as caught:
        summary = train(config, lambda report: print(progress_line(report), flush=True), lambda: bool(caught()))
    if summary.reason == "interrupted":
        print(f"stopped after step {summary.step}; resume with the same command and --resume")
        return 128 + caught()
    print(f"{summary.reason} after step {summary.step}")
    assert summary.best is not None
    print(f"model: {summary.model}  threshold {summary.best.threshold:.4f}  {figures(summary.best)}")
    return 0


def progress_line(report: Report) -> str:
    """Returns one evaluation in one line."""
    mark = "  best" if report.best else ""
    return f"step {report.step} of {report.steps}  loss {report.loss:.4f}  {figures(report.evaluation)}{mark}"


def figures(evaluation: Evaluation) -> str:
    """Returns the figures of an evaluation in words."""
    pairs = "" if evaluation.pair_accuracy is None else f"  pairs {evaluation.pair_accuracy:.3f}"
    return (
        f"held out: loss {evaluation.loss:.4f}  accuracy {evaluation.accuracy:.3f}  AUC {evaluation.auc:.3f}{pairs} "
        f"({evaluation.responses} responses)"
    )


@contextmanager
def catching_signals() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the first SIGINT, SIGTERM or SIGHUP, 0 before; the second one acts as usual."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    caught = 0

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal caught
        caught = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in numbers:
        signal.signal(number, receive)
    try:
        yield lambda: caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
