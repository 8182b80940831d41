"""The result of a run in figures: accuracy before and after, with its intervals."""

from __future__ import annotations

from dataclasses import dataclass

from perigee.report.records import Estimate, Evaluation, RunRecords


@dataclass(frozen=True)
class Change:
    """How one accuracy changed: of a domain, or `overall`, by sampled or greedy answers."""

    domain: str
    kind: str
    before: Estimate
    after: Estimate

    @property
    def is_apart(self) -> bool:
        """Whether the two 95% intervals do not overlap; False when one has no bounds."""
        if None in (self.before.low, self.before.high, self.after.low, self.after.high):
            return False
        assert self.before.low is not None
        assert self.before.high is not None
        assert self.after.low is not None
        assert self.after.high is not None
        return self.after.low > self.before.high or self.before.low > self.after.high


def first_and_last(records: RunRecords) -> tuple[Evaluation, Evaluation] | None:
    """The evaluations to compare: those of the summary, else the first and last there are; None with fewer than two."""
    if records.before is not None and records.after is not None:
        return records.before, records.after
    if len(records.evaluations) >= 2:
        return records.evaluations[0], records.evaluations[-1]
    return None


def changes(records: RunRecords) -> list[Change]:
    """All changes, `overall` first, sampled before greedy."""
    pair = first_and_last(records)
    if pair is None:
        return []
    before, after = pair
    found = []
    for domain in after.domains:
        for kind, old, new in (("sampled", before.sampled, after.sampled), ("greedy", before.greedy, after.greedy)):
            if domain in old and domain in new:
                found.append(Change(domain, kind, old[domain], new[domain]))
    return found


def headline_lines(records: RunRecords) -> list[str]:
    """One line per change, for a terminal."""
    lines = []
    for change in changes(records):
        apart = "" if not change.is_apart else "  intervals apart"
        gain = change.after.mean - change.before.mean
        means = f"{describe(change.before)} -> {describe(change.after)}"
        lines.append(f"{change.domain:<10} {change.kind:<8} {means}  {gain:+.3f}{apart}")
    return lines or ["no accuracy to compare: the run holds fewer than two evaluations"]


def describe(estimate: Estimate) -> str:
    """The mean with its interval: 0.590 [0.561, 0.619]."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.3f}"
    return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
