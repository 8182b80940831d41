"""Votes of a judge and their majority; a vote that failed decides nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.reward.verifiers.base import Outcome, PartScore, Verdict

MAX_REASON_CHARACTERS = 1000
REWARDS = {Verdict.CORRECT: 1.0, Verdict.WRONG: 0.0, Verdict.UNGRADABLE: 0.0, Verdict.FAILED: None}


class VoteError(Exception):
    """A vote that came to nothing; `retryable` says whether asking again may help, `retry_after_s` when."""

    retryable = False

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


class TransientError(VoteError):
    """The endpoint is down, slow or busy: worth another try within the deadline."""

    retryable = True


class RubbishError(VoteError):
    """The endpoint answered, but not with a judgement: worth one more try."""

    retryable = True


@dataclass(frozen=True)
class Vote:
    """One vote: a verdict with the judge's reasoning, or FAILED with what went wrong."""

    verdict: Verdict
    reason: str
    retryable: bool = False
    retry_after_s: float | None = None

    @classmethod
    def failed(cls, error: VoteError) -> Vote:
        """The vote that an error stands for."""
        return cls(Verdict.FAILED, error.reason, error.retryable, error.retry_after_s)


def tally(votes: Sequence[Vote], extracted: str) -> Outcome:
    """The verdict of more than half of all votes, failed ones counted; FAILED without one."""
    counts = Counter(vote.verdict for vote in votes)
    parts = tuple(
        PartScore(f"vote {number}", vote.verdict, REWARDS[vote.verdict], vote.reason[:MAX_REASON_CHARACTERS])
        for number, vote in enumerate(votes, start=1)
    )
    verdict, count = counts.most_common(1)[0]
    if verdict is not Verdict.FAILED and 2 * count > len(votes):
        reason = next(vote.reason for vote in votes if vote.verdict is verdict)
        return Outcome(verdict, REWARDS[verdict], extracted, reason[:MAX_REASON_CHARACTERS], parts=parts)
    failures = [vote for vote in votes if vote.verdict is Verdict.FAILED]
    retryable = all(vote.retryable for vote in failures)
    hints = [vote.retry_after_s for vote in failures if vote.retry_after_s is not None]
    failed = Outcome.failed(
        _explain(counts, failures, len(votes)),
        retryable=retryable,
        extracted=extracted,
        retry_after_s=max(hints, default=None) if retryable else None,
    )
    return replace(failed, parts=parts)


def _explain(counts: Counter[Verdict], failures: Sequence[Vote], votes: int) -> str:
    if len(failures) == votes == 1:
        return failures[0].reason
    split = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict])
    # What cannot be cured comes first.
    first = min(failures, key=lambda vote: vote.retryable, default=None)
    return f"no majority among {votes} votes: {split}" + (f"; {first.reason}" if first else "")
