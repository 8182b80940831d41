"""Answers that only a reader can judge: a language model reads question, reference and response, reasons, and decides.

Kimi k1.5, section 2.3.5: a chain-of-thought reward model judges better than a scalar head.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from perigee.errors import FieldViolation
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.config import MAX_VOTES, JudgeConfig
from services.reward.judges.endpoint import Endpoint, VoteError
from services.reward.judges.prompts import Case, Quoted
from services.reward.verifiers.base import Item, Outcome, Verdict, Verifier, graded_whole, read_answer

MAX_REASON_CHARACTERS = 1000


class JudgeVerifier(Verifier[pb.JudgeVerifier]):
    """Asks a configured judge for votes; more than half of them decide, and nothing less does."""

    name: ClassVar[str] = "judge"
    version: ClassVar[str] = "1"

    def __init__(self, config: JudgeConfig) -> None:
        self.endpoints = {
            name: Endpoint(name, judge, config.max_response_characters) for name, judge in config.judges.items()
        }
        self._default = config.default or next(iter(config.judges), "")
        self.unavailable = "" if self.endpoints else "no judge is configured: set reward.judge.judges"

    async def close(self) -> None:
        for endpoint in self.endpoints.values():
            await endpoint.close()

    def find_violations(self, parameters: pb.JudgeVerifier) -> list[FieldViolation]:
        violations = []
        if not parameters.reference.strip() and not parameters.rubric.strip():
            violations.append(FieldViolation("judge.reference", "is required where there is no rubric"))
        if parameters.judge and self.endpoints and parameters.judge not in self.endpoints:
            known = ", ".join(self.endpoints)
            violations.append(FieldViolation("judge.judge", f"{parameters.judge!r} is not configured: one of {known}"))
        if parameters.HasField("votes") and not 1 <= parameters.votes <= MAX_VOTES:
            violations.append(FieldViolation("judge.votes", f"must be 1 to {MAX_VOTES}, got {parameters.votes}"))
        return violations

    def graded_text(self, item: Item[pb.JudgeVerifier]) -> str | None:
        return graded_whole(item)

    async def judge(self, item: Item[pb.JudgeVerifier]) -> Outcome:
        answer = read_answer(item)
        if isinstance(answer, Outcome):
            return answer
        parameters = item.parameters
        endpoint = self.endpoints.get(parameters.judge or self._default)
        if endpoint is None:
            reason = self.unavailable or f"judge {parameters.judge!r} is not configured"
            return Outcome.failed(reason, retryable=False)
        case = Case(item.prompt, parameters.reference, parameters.rubric, answer, item.images)
        quoted = await asyncio.to_thread(Quoted.from_case, case)
        votes = parameters.votes if parameters.HasField("votes") else endpoint.config.votes
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(cast_vote(endpoint, quoted)) for _ in range(votes)]
        extracted = answer if item.answer_marker else ""
        return tally([task.result() for task in tasks], extracted)


async def cast_vote(endpoint: Endpoint, quoted: Quoted) -> Outcome:
    """Returns the outcome of one vote; an error makes it a failed one."""
    try:
        judgement = await endpoint.vote(quoted)
    except VoteError as error:
        return failed_vote(error)
    verdict = Verdict(judgement.verdict)
    return Outcome(verdict, float(verdict is Verdict.CORRECT), reason=judgement.reasoning[:MAX_REASON_CHARACTERS])


def failed_vote(error: VoteError) -> Outcome:
    """Returns the vote that an error stands for."""
    reason = error.reason[:MAX_REASON_CHARACTERS]
    return Outcome.failed(reason, retryable=error.retryable, retry_after_s=error.retry_after_s)


def tally(votes: Sequence[Outcome], extracted: str) -> Outcome:
    """Returns the verdict of more than half of all votes, failed ones counted; FAILED without one."""
    counts = Counter(vote.verdict for vote in votes)
    verdict, count = counts.most_common(1)[0]
    if verdict is not Verdict.FAILED and 2 * count > len(votes):
        decided = replace(next(vote for vote in votes if vote.verdict is verdict), extracted=extracted)
    else:
        failures = [vote for vote in votes if vote.verdict is Verdict.FAILED]
        decided = Outcome.failed_for(failures, _explain(counts, failures, len(votes)), extracted)
    return replace(decided, parts={f"vote {number}": vote for number, vote in enumerate(votes, start=1)})


def _explain(counts: Counter[Verdict], failures: Sequence[Outcome], votes: int) -> str:
    if len(failures) == votes == 1:
        return failures[0].reason
    split = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict if counts[verdict])
    # What cannot be cured comes first.
    first = min(failures, key=lambda vote: vote.retryable, default=None)
    return f"no majority among {votes} votes: {split}" + (f"; {first.reason}" if first else "")
