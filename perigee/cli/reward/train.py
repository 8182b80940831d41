"""`perigee reward train`: checks the settings, trains, and reports progress in plain lines."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from perigee.cli.ending import SIGNALS
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

    caught = catch_signals()
    summary = train(config, lambda report: print(progress_line(report), flush=True), lambda: bool(caught))
    if summary.reason == "interrupted":
        print(f"stopped after step {summary.step}; resume with the same command and --resume")
        return 128 + caught[0]
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


def catch_signals() -> list[int]:
    """Returns a list that gets the first SIGINT, SIGTERM or SIGHUP; a second one ends the process at once."""
    caught: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    for number in SIGNALS:
        signal.signal(number, receive)
    return caught
