"""Votes of a judge: how one is read from an answer, what fails one, and the majority of several.

The judgement that is asked for is JSON. With structured output the whole answer is the JSON object. Asked in words, a
model may write before it; then the object has to end the answer and to begin with the request's random id, which no
quoted text can hold. A vote that failed decides nothing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from services.reward.verifiers.base import Outcome, PartScore, Verdict

CODE_BLOCK = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
SHOWN_CHARACTERS = 80
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


class MalformedResponseError(VoteError):
    """The endpoint answered, but not with a judgement: worth one more try."""

    retryable = True


class Judgement(BaseModel):
    """Decision of a judge; the reasoning comes first, so that it is written first."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    reasoning: str
    verdict: Literal["correct", "wrong", "ungradable"]


class SignedJudgement(Judgement):
    """A judgement with the id of the request that it answers."""

    id: str


# "title" and "description" left out: strict servers know few keywords.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "reasoning": {"type": "string"},
        "verdict": {"type": "string", "enum": ["correct", "wrong", "ungradable"]},
    },
    "required": ["reasoning", "verdict"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Vote:
    """One vote: a verdict with the judge's reasoning, or FAILED with what went wrong."""

    verdict: Verdict
    reason: str
    retryable: bool = False
    retry_after_s: float | None = None

    @classmethod
    def failed(cls, error: VoteError) -> Vote:
        """Returns the vote that an error stands for."""
        return cls(Verdict.FAILED, error.reason, error.retryable, error.retry_after_s)


def tally(votes: Sequence[Vote], extracted: str) -> Outcome:
    """Returns the verdict of more than half of all votes, failed ones counted; FAILED without one."""
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


def read_judgement(answer: str) -> Judgement:
    """Returns the judgement that the whole answer is, a code block around it aside.

    Raises MalformedResponseError.
    """
    text = answer.strip()
    if match := CODE_BLOCK.fullmatch(text):
        text = match[1]
    return _validate(Judgement, text)


def read_signed_judgement(answer: str, request_id: str) -> Judgement:
    """Returns the judgement that ends the answer and begins with `request_id`.

    Raises MalformedResponseError.
    """
    text = answer.strip().removesuffix("```").rstrip()
    starts = [match.start() for match in re.finditer(rf'\{{\s*"id"\s*:\s*"{re.escape(request_id)}"', text)]
    if not starts:
        raise MalformedResponseError(f"the answer does not end with a judgement: {_show(answer)}")
    return _validate(SignedJudgement, text[starts[-1] :])


def _validate(model: type[Judgement], text: str) -> Judgement:
    if not text:
        raise MalformedResponseError("the answer is empty")
    try:
        return model.model_validate(json.loads(text, object_pairs_hook=_refuse_repeated_keys))
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(str(part) for part in detail["loc"]) or "judgement"
        raise MalformedResponseError(f"the answer is no judgement: {field}: {detail['msg']}: {_show(text)}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedResponseError(f"the answer is not JSON: {_show(text)}") from error


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _show(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def _explain(counts: Counter[Verdict], failures: Sequence[Vote], votes: int) -> str:
    if len(failures) == votes == 1:
        return failures[0].reason
    split = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict])
    # What cannot be cured comes first.
    first = min(failures, key=lambda vote: vote.retryable, default=None)
    return f"no majority among {votes} votes: {split}" + (f"; {first.reason}" if first else "")
