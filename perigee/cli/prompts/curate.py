"""`perigee prompts curate`: the stages in order, and the files that come of them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from perigee.cli.ending import Interrupt, run_interruptible
from perigee.cli.prompts.asking import read_policy_version
from perigee.cli.prompts.candidates import Candidate, CandidateSet, Columns, read_candidates
from perigee.cli.prompts.duplicates import find_duplicates
from perigee.cli.prompts.folder import CurationFolder, describe_model
from perigee.cli.prompts.model_stages import AskedModel, ModelStage, ask_about, difficulty_stage, guessing_stage
from perigee.cli.prompts.report import build_report, write_report
from perigee.cli.prompts.settings import CurationSettings
from perigee.cli.prompts.stages import Find, StageResult, run_stage, whole
from perigee.cli.view import ProgressView
from perigee.curation.balance import Buckets, balance
from perigee.curation.domains import find_domains
from perigee.curation.findings import Decision, Finding, Question
from perigee.curation.question_kinds import find_question_kinds
from perigee.errors import InvalidArgumentError, PerigeeError
from perigee.files import write_atomically, write_lines
from perigee.reward.client import RewardClient
from perigee.reward.items import PromptLine, read_prompt_line
from perigee.rollout.client import RolloutClient
from perigee.rpc import ChannelOptions
from services.kit.hf import open_model_folder

NOT_ASKED = "no model was asked: name --rollout and --model"


@dataclass(frozen=True)
class ModelAccess:
    """Where the model that is asked is served."""

    rollout: Sequence[str]
    reward: str
    model: Path | None
    push: bool
    token: str | None
    ca_file: Path | None
    unavailable_s: float

    @property
    def channel(self) -> ChannelOptions:
        """How the services are reached."""
        return ChannelOptions(token=self.token, ca_file=os.fspath(self.ca_file) if self.ca_file else None)


@dataclass(frozen=True)
class CurateCommand:
    """What the command line asks for."""

    source: Path
    out: Path
    columns: Columns
    settings: CurationSettings
    access: ModelAccess
    restart: bool
    plain: bool


def run_curate(command: CurateCommand) -> int:
    """Curates the prompts and returns the exit code: 0, or 128 + n on signal n.

    Raises InvalidArgumentError naming bad lines or settings, and what a service fails with.
    """
    if command.settings.sampling is not None and command.access.model is None:
        raise InvalidArgumentError.of("--model", "is required with --rollout: its tokenizer makes the prompts' tokens")
    console = Console()
    candidates = read_candidates(command.source, command.columns)
    folder = CurationFolder(command.out)
    head = {"input": candidates.digest, "settings": json.loads(command.settings.model_dump_json())}
    if folder.open(head, restart=command.restart):
        console.print(f"going on with the curation in {command.out}", highlight=False, soft_wrap=True)
    curation = _Curation(command, candidates, folder, console)

    async def work(interrupt: Interrupt) -> int:
        await curation.run()
        return 0

    again = "what was found is kept; the same command goes on"
    try:
        code = run_interruptible(work)
    except PerigeeError as error:
        raise type(error)(f"{error.message}; {again}") from error
    if code:
        print(f"stopped; {again}: perigee {shlex.join(sys.argv[1:])}", file=sys.stderr)
    return code


class _Curation:
    """One run of the command."""

    def __init__(
        self, command: CurateCommand, candidates: CandidateSet, folder: CurationFolder, console: Console
    ) -> None:
        self._command = command
        self._candidates = candidates
        self._folder = folder
        self._console = console
        self._stages: list[StageResult] = []

    async def run(self) -> None:
        """Runs all stages and writes the results."""
        settings = self._command.settings
        questions = [candidate.question for candidate in self._candidates.candidates]
        threshold = settings.near_duplicates
        questions = await self._find("duplicates", questions, lambda all_of: find_duplicates(all_of, threshold))
        if settings.drop_question_kinds:
            questions = await self._find("question-kinds", questions, find_question_kinds)
        else:
            self._skip("question-kinds", questions, "--keep-question-kinds")
        questions = await self._find("domains", questions, find_domains)
        questions = await self._ask(questions)
        buckets = Buckets.over(questions, settings.buckets)
        before = questions
        questions = await self._find(
            "balance", questions, lambda all_of: balance(list(all_of), buckets, settings.cap, settings.seed)
        )
        self._write(before, questions, buckets)

    async def _find(self, name: str, questions: Sequence[Question], find: Find) -> list[Question]:
        result = await run_stage(name, self._path(name), questions, whole(find, questions))
        return self._end(result)

    async def _ask(self, questions: list[Question]) -> list[Question]:
        sampling, access = self._command.settings.sampling, self._command.access
        if sampling is None or access.model is None:
            self._skip("difficulty", questions, NOT_ASKED)
            self._skip("guessing", questions, NOT_ASKED)
            return questions
        lines = self._lines(questions)
        async with AsyncExitStack() as stack:
            workers = [
                await stack.enter_async_context(RolloutClient(address, access.channel)) for address in access.rollout
            ]
            reward = await stack.enter_async_context(RewardClient(access.reward, access.channel))
            if access.push:
                from perigee.cli.prompts.push import push_weights

                await push_weights(access.model, access.rollout, access.channel)
            version, context_tokens = await read_policy_version(workers)
            self._folder.pin("model", describe_model(access.model))
            self._folder.pin("policy_version", version)
            folder = open_model_folder(access.model, "--model")
            context_tokens = min(context_tokens, folder.context_tokens)
            tokenizer = folder.open_tokenizer()
            model = AskedModel(workers, reward, tokenizer, context_tokens, version, access.unavailable_s)
            questions = await self._ask_stage(difficulty_stage(sampling), model, lines, questions)
            if sampling.guesses:
                return await self._ask_stage(guessing_stage(sampling), model, lines, questions)
        self._skip("guessing", questions, "--guesses 0")
        return questions

    async def _ask_stage(
        self, stage: ModelStage, model: AskedModel, lines: dict[str, PromptLine], questions: list[Question]
    ) -> list[Question]:
        settings = self._command.settings
        assert settings.sampling is not None
        produce = ask_about(stage, model, lines, settings.sampling, settings.seed)
        with ProgressView(self._console, stage.name, len(questions), plain=self._command.plain) as progress:

            async def produce_and_show(missing: Sequence[Question]) -> AsyncIterator[Sequence[Finding]]:
                progress.advance(len(questions) - len(missing))
                async for findings in produce(missing):
                    progress.advance(len(findings))
                    yield findings

            result = await run_stage(stage.name, self._path(stage.name), questions, produce_and_show)
        return self._end(result)

    def _skip(self, name: str, questions: Sequence[Question], why: str) -> None:
        self._stages.append(StageResult(name, questions, skipped=why))
        self._console.print(f"{name}: skipped, {why}", highlight=False, soft_wrap=True)

    def _end(self, result: StageResult) -> list[Question]:
        self._stages.append(result)
        survivors = result.survivors()
        aside = sum(finding.decision is Decision.ASIDE for finding in result.findings.values())
        self._console.print(
            f"{result.name}: {len(survivors):,} of {len(result.questions):,} stay"
            + (f", {aside:,} put aside" if aside else ""),
            highlight=False,
        )
        return survivors

    def _path(self, name: str) -> Path:
        return self._folder.stage_path(len(self._stages) + 1, name)

    def _lines(self, questions: Sequence[Question]) -> dict[str, PromptLine]:
        wanted = {question.id for question in questions}
        return {
            candidate.question.id: read_prompt_line(candidate.line, candidate.question.id)
            for candidate in self._candidates.candidates
            if candidate.question.id in wanted
        }

    def _write(self, before: Sequence[Question], kept: Sequence[Question], buckets: Buckets) -> None:
        out = self._command.out
        by_id = {candidate.question.id: candidate for candidate in self._candidates.candidates}
        write_lines(out / "prompts.jsonl", (describe_kept(by_id[question.id], question) for question in kept))
        for decision, name in ((Decision.DROP, "dropped.jsonl"), (Decision.ASIDE, "aside.jsonl")):
            write_lines(
                out / name,
                (
                    {"stage": stage.name, **finding.to_line(), "prompt": by_id[finding.id].question.text}
                    for stage in self._stages
                    for question in stage.questions
                    if (finding := stage.findings.get(question.id)) is not None and finding.decision is decision
                ),
            )
        report = build_report(self._stages, before, kept, buckets, self._candidates.left_out)
        report["settings"] = json.loads(self._command.settings.model_dump_json())
        write_atomically(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n")
        write_report(out / "report.md", report)
        self._console.print(f"{len(kept):,} prompts: {out / 'prompts.jsonl'}", highlight=False, soft_wrap=True)
        self._console.print(f"report: {out / 'report.md'}", highlight=False, soft_wrap=True)


def describe_kept(candidate: Candidate, question: Question) -> dict[str, object]:
    """The line of a prompt that stays, in the recipe's format, with what was found out."""
    line = {**candidate.line, "domain": question.domain or "default"}
    if question.difficulty is not None:
        line["difficulty"] = question.difficulty
    return line
