"""What a scored file comes to: verdicts by verifier, mean rewards, reasons of failures, agreement with labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

VERDICTS = ("correct", "wrong", "ungradable", "failed")
REASONS_SHOWN = 10


@dataclass
class VerifierSummary:
    """Verdicts of one verifier, and the rewards of what was judged."""

    verdicts: Counter[str] = field(default_factory=Counter)
    rewards: list[float] = field(default_factory=list)

    @property
    def mean_reward(self) -> float | None:
        """Over judged items; None when none was."""
        return sum(self.rewards) / len(self.rewards) if self.rewards else None


@dataclass
class Agreement:
    """How verdicts compare with labels, over judged items that have one."""

    labelled: int = 0
    agreed: int = 0
    called_correct: int = 0
    called_not_correct: int = 0


@dataclass
class Summary:
    """All of it."""

    verifiers: dict[str, VerifierSummary]
    reasons: Counter[str]
    agreement: Agreement

    @property
    def failed(self) -> int:
        """Items that could not be judged."""
        return sum(summary.verdicts["failed"] for summary in self.verifiers.values())


def summarize(outcomes: Sequence[Mapping[str, Any]], labels: Sequence[str | None]) -> Summary:
    """The summary of outcomes and their items' labels, in the same order."""
    summary = Summary(defaultdict(VerifierSummary), Counter(), Agreement())
    for outcome, label in zip(outcomes, labels, strict=True):
        verifier = summary.verifiers[outcome["verifier"]]
        verifier.verdicts[outcome["verdict"]] += 1
        if outcome["verdict"] == "failed":
            summary.reasons[outcome["reason"]] += 1
            continue
        verifier.rewards.append(outcome["reward"])
        if label is not None:
            _compare(summary.agreement, outcome["verdict"], label)
    return summary


def show_summary(summary: Summary, console: Console) -> None:
    """Prints the tables."""
    table = Table("verifier", *VERDICTS, "mean reward", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in sorted(summary.verifiers):
        verifier = summary.verifiers[name]
        counts = [f"{verifier.verdicts[verdict]:,}" for verdict in VERDICTS]
        mean = "" if verifier.mean_reward is None else f"{verifier.mean_reward:.4f}"
        table.add_row(name, *counts, mean)
    console.print(table, highlight=False)
    if summary.reasons:
        console.print(f"{summary.failed:,} could not be judged and have no reward:", highlight=False)
    for reason, count in summary.reasons.most_common(REASONS_SHOWN):
        console.print(f"  {count:,}  {reason}", highlight=False, markup=False, soft_wrap=True)
    if len(summary.reasons) > REASONS_SHOWN:
        console.print(f"  and {len(summary.reasons) - REASONS_SHOWN:,} more reasons", highlight=False)
    found = summary.agreement
    if found.labelled:
        console.print(
            f"agreement with labels: {found.agreed:,} of {found.labelled:,} ({found.agreed / found.labelled:.1%}); "
            f"{found.called_correct:,} called correct against the label, {found.called_not_correct:,} not correct",
            highlight=False,
            soft_wrap=True,
        )


def _compare(agreement: Agreement, verdict: str, label: str) -> None:
    agreement.labelled += 1
    # A label tells right from not right; which of the two ways of being not right matters only where it says so.
    if verdict == label or (label == "wrong" and verdict == "ungradable"):
        agreement.agreed += 1
    elif verdict == "correct":
        agreement.called_correct += 1
    else:
        agreement.called_not_correct += label == "correct"
