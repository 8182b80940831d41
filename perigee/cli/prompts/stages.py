"""The stages of a curation, run one after another; each finding is on disk before it counts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from perigee.curation.findings import Decision, Finding, Question
from perigee.files import Journal

Find = Callable[[Sequence[Question]], Iterable[Finding]]
Produce = Callable[[Sequence[Question]], AsyncIterator[Sequence[Finding]]]


@dataclass
class StageResult:
    """What a stage was given and found; `skipped` says why it did not run."""

    name: str
    questions: Sequence[Question]
    findings: dict[str, Finding] = field(default_factory=dict)
    skipped: str = ""

    def survivors(self) -> list[Question]:
        """The prompts that stay, with what the stage found out about them."""
        if self.skipped:
            return list(self.questions)
        return [
            learn(question, self.findings[question.id])
            for question in self.questions
            if self.findings[question.id].decision is Decision.KEEP
        ]


def learn(question: Question, finding: Finding) -> Question:
    """The question with the domain and difficulty that were found."""
    known = {key: finding.details[key] for key in ("domain", "difficulty") if key in finding.details}
    return replace(question, **known)


async def run_stage(name: str, path: Path, questions: Sequence[Question], produce: Produce) -> StageResult:
    """Runs `produce` on the prompts without a finding at `path` and keeps what it finds there, group by group."""
    result = StageResult(name, questions)
    with Journal(path) as journal:
        result.findings = {line["id"]: Finding.from_line(line) for line in journal.lines}
        missing = [question for question in questions if question.id not in result.findings]
        if missing:
            async for findings in produce(missing):
                journal.append(finding.to_line() for finding in findings)
                result.findings |= {finding.id: finding for finding in findings}
    return result


def whole(find: Find, questions: Sequence[Question]) -> Produce:
    """A stage that looks at all prompts at once and asks nobody; it is quick, so it begins anew where it was cut."""

    async def produce(missing: Sequence[Question]) -> AsyncIterator[Sequence[Finding]]:
        wanted = {question.id for question in missing}
        yield [finding for finding in find(questions) if finding.id in wanted]

    return produce
