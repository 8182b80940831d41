"""`perigee prompts curate`: the stages in order, and the folder and files of their results."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from perigee.cli.ending import Interrupt, run_interruptible
from perigee.cli.prompts.candidates import Candidate, CandidateSet, read_candidates
from perigee.cli.prompts.duplicates import find_duplicates
from perigee.cli.prompts.sampling import (
    CurationSettings,
    Find,
    ModelStage,
    SampledModel,
    StageResult,
    difficulty_stage,
    guessing_stage,
    read_policy_version,
    run_stage,
    sample_model,
    whole,
)
from perigee.cli.view import ProgressView
from perigee.curation.domains import find_domains
from perigee.curation.findings import Buckets, Cell, Decision, Question, balance, count_cells, shares
from perigee.curation.pictures import Look, look_at
from perigee.curation.question_kinds import find_question_kinds
from perigee.errors import InvalidArgumentError, PerigeeError, UnavailableError
from perigee.files import write_atomically, write_lines
from perigee.image_sources import IMAGES_FOLDER, ImageReader, ImageStore
from perigee.images import decode_image
from perigee.json_codec import write_message
from perigee.reward.client import RewardClient
from perigee.reward.items import PromptLine, read_prompt_line
from perigee.reward.sources import Columns, image_base
from perigee.rollout.client import RolloutClient
from perigee.rpc import ChannelOptions
from perigee.trainer.v1.trainer_pb2 import ChatSettings
from perigee.weights.client import WeightReceiverClient
from services.kit.chat import open_encoder
from services.kit.hf import open_model_folder


class CurationFolder:
    """Files of one curation. Resuming it needs the same prompts, settings and policy version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = ImageStore(path / IMAGES_FOLDER)
        self._head_path = path / "curation.json"
        self._head: dict[str, Any] = {}

    def check(self, *, restart: bool) -> None:
        """Raises InvalidArgumentError when the folder holds something else than a curation."""
        if restart or self._head_path.exists() or not self.path.is_dir():
            return
        # Images alone are those of a curation that was cut short as it read its prompts.
        if any(each.name != IMAGES_FOLDER for each in self.path.iterdir()):
            raise InvalidArgumentError.for_field(str(self.path), "holds other files; name an empty folder")

    def open(self, head: Mapping[str, Any], *, restart: bool) -> bool:
        """Begins a curation, or resumes the one that is there; returns True when it resumes.

        Raises InvalidArgumentError when the folder holds a curation with another head.
        """
        if restart and self._head_path.exists():
            shutil.rmtree(self.path / "stages", ignore_errors=True)
            self._head_path.unlink()
        if not self._head_path.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_head(dict(head))
            return False
        self._head = json.loads(self._head_path.read_text())
        for name, value in head.items():
            self._check(name, value)
        return True

    def pin(self, name: str, value: Any) -> None:
        """Records a value that is known only later; raises InvalidArgumentError when it was something else before."""
        if name in self._head:
            self._check(name, value)
        else:
            self._write_head(self._head | {name: value})

    def _check(self, name: str, value: Any) -> None:
        """Raises InvalidArgumentError naming what differs from the curation in the folder."""
        held = self._head.get(name)
        if held == value:
            return
        if isinstance(held, dict) and isinstance(value, dict):
            name, held, value = next(
                (key, held.get(key), value.get(key)) for key in held | value if held.get(key) != value.get(key)
            )
        raise InvalidArgumentError.for_field(
            str(self.path),
            f"holds a curation with another {name}: {held!r}, now {value!r}; name another folder, or --restart",
        )

    def _write_head(self, head: dict[str, Any]) -> None:
        self._head = head
        write_atomically(self._head_path, json.dumps(head, indent=2).encode() + b"\n")


def describe_model(path: Path) -> str:
    """Returns a name that differs with a model's configuration, tokenizer and the sizes of their weight files."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ("config.json", "tokenizer.json"):
        digest.update((path / name).read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return f"{path.name} ({digest.hexdigest()})"


EXAMPLES = 3
EXAMPLE_CHARACTERS = 160


def build_report(
    stages: Sequence[StageResult],
    before: Sequence[Question],
    kept: Sequence[Question],
    buckets: Buckets,
    left_out: Sequence[str],
) -> dict[str, Any]:
    """Returns counts by stage and reason, and the set by domain and difficulty before and after the balance."""
    cells_before, cells_after = count_cells(before, buckets), count_cells(kept, buckets)
    return {
        "prompts": len(stages[0].questions),
        "kept": len(kept),
        "dropped": sum(_count(stage, Decision.DROP).total() for stage in stages),
        "undecided": sum(_count(stage, Decision.UNDECIDED).total() for stage in stages),
        "columns_left_out": list(left_out),
        "stages": [_describe(stage) for stage in stages],
        "domains": {
            "before_balance": shares(cells_before),
            "kept": shares(cells_after),
        },
        "buckets": [buckets.name(bucket) for bucket in range(buckets.count)],
        "cells": {
            domain: {
                "before_balance": _row(cells_before, domain, buckets),
                "kept": _row(cells_after, domain, buckets),
            }
            for domain in sorted({cell.domain for cell in cells_before})
        },
    }


def _describe(stage: StageResult) -> dict[str, Any]:
    if stage.skipped:
        return {"name": stage.name, "seen": len(stage.questions), "skipped": stage.skipped}
    examples: dict[str, list[dict[str, Any]]] = {}
    for question in stage.questions:
        finding = stage.findings[question.id]
        if finding.decision is Decision.KEEP or len(examples.setdefault(finding.reason, [])) >= EXAMPLES:
            continue
        text = " ".join(question.text.split())
        cut = text if len(text) <= EXAMPLE_CHARACTERS else f"{text[:EXAMPLE_CHARACTERS]}..."
        examples[finding.reason].append({"id": question.id, "prompt": cut, "details": dict(finding.details)})
    return {
        "name": stage.name,
        "seen": len(stage.questions),
        "kept": len(stage.survivors()),
        "dropped": dict(_count(stage, Decision.DROP)),
        "undecided": dict(_count(stage, Decision.UNDECIDED)),
        "examples": examples,
    }


def _count(stage: StageResult, decision: Decision) -> Counter[str]:
    return Counter(finding.reason for finding in stage.findings.values() if finding.decision is decision)


def _row(cells: Mapping[Cell, int], domain: str, buckets: Buckets) -> list[int]:
    return [cells.get(Cell(domain, bucket), 0) for bucket in range(buckets.count)]


def _lines(report: Mapping[str, Any]) -> Iterable[str]:
    yield "# Curation report"
    yield ""
    yield (
        f"{report['kept']:,} of {report['prompts']:,} prompts are kept (`prompts.jsonl`), {report['dropped']:,} are "
        f"dropped (`dropped.jsonl`), {report['undecided']:,} undecided (`undecided.jsonl`)."
    )
    if report["columns_left_out"]:
        yield ""
        yield f"Columns that are no fields of a prompt and were left out: {', '.join(report['columns_left_out'])}."
    yield ""
    yield "## Stages"
    yield ""
    yield "| stage | seen | kept | dropped | undecided |"
    yield "|---|---|---|---|---|"
    for stage in report["stages"]:
        if "skipped" in stage:
            yield f"| {stage['name']} | {stage['seen']:,} | skipped: {stage['skipped']} | | |"
            continue
        dropped, undecided = _reasons(stage["dropped"]), _reasons(stage["undecided"])
        yield f"| {stage['name']} | {stage['seen']:,} | {stage['kept']:,} | {dropped} | {undecided} |"
    yield from _example_lines(report["stages"])
    yield ""
    yield "## Domains and difficulty"
    yield ""
    yield "Kept prompts, and in brackets those before the balance where there were more."
    yield ""
    yield f"| domain | share | {' | '.join(report['buckets'])} |"
    yield "|---" * (2 + len(report["buckets"])) + "|"
    for domain, cells in report["cells"].items():
        share = report["domains"]["kept"].get(domain, 0.0)
        yield f"| {domain} | {share:.1%} | {' | '.join(_cells(cells))} |"


def _example_lines(stages: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for stage in stages:
        for reason, examples in stage.get("examples", {}).items():
            yield ""
            yield f"### {stage['name']}: {reason}"
            yield ""
            for example in examples:
                details = ", ".join(f"{key} {value}" for key, value in example["details"].items())
                yield f"- `{example['id']}`: {example['prompt']}" + (f" ({details})" if details else "")


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda pair: -pair[1]))


def _cells(cells: Mapping[str, Sequence[int]]) -> Iterable[str]:
    for kept, before in zip(cells["kept"], cells["before_balance"], strict=True):
        yield f"{kept:,}" + (f" ({before:,})" if before > kept else "")


RUN_ID = "curation"
SHARD_BYTES = 256 << 20


async def push_weights(model: Path, addresses: Sequence[str], channel: ChannelOptions) -> None:
    """Pushes the folder's weights to all workers, as policy version 0.

    Raises InvalidArgumentError when the folder has none, UnavailableError naming the workers that did not take them.
    """
    from perigee.trainer.v1.trainer_pb2 import PushTarget
    from services.weights.config import WeightsConfig
    from services.weights.manifest import export_image
    from services.weights.send import WeightSender

    sender = WeightSender(WeightsConfig(), lambda address: WeightReceiverClient(address, channel))
    image = export_image(RUN_ID, 0, _read_tensors(model), SHARD_BYTES)
    try:
        outcomes = await sender.push(image, [PushTarget(worker_id=address, address=address) for address in addresses])
    finally:
        image.close()
        await sender.close()
    if reasons := [f"{outcome.worker_id}: {outcome.reason}" for outcome in outcomes if not outcome.committed]:
        raise UnavailableError(f"the weights of {model} were not taken by {'; '.join(reasons)}")


def _read_tensors(model: Path) -> Iterator[tuple[str, Any]]:
    """Yields the tensors of a model folder by name."""
    from safetensors import safe_open

    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise InvalidArgumentError.for_field("--model", f"{model} holds no *.safetensors to push")
    for file in files:
        with safe_open(os.fspath(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no mapping
                yield name, tensors.get_tensor(name)


NOT_ASKED = "no model was asked: name --rollout and --model"


@dataclass(frozen=True)
class ModelAccess:
    """Addresses and folder of the model to sample, and how the services are reached."""

    rollout: Sequence[str]
    reward: str
    model: Path | None
    push: bool
    channel: ChannelOptions
    unavailable_s: float
    chat: ChatSettings


@dataclass(frozen=True)
class CurateCommand:
    """Options of the command line."""

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
        raise InvalidArgumentError.for_field(
            "--model", "is required with --rollout: its tokenizer makes the prompts' tokens"
        )
    console = Console()
    folder = CurationFolder(command.out)
    folder.check(restart=command.restart)
    read_image = ImageReader(image_base(str(command.source)), store=folder.images)
    candidates = read_candidates(command.source, command.columns, read_image)
    head = {"input": candidates.digest, "settings": json.loads(command.settings.model_dump_json())}
    if command.access.chat != ChatSettings():
        head["chat"] = write_message(command.access.chat)
    if folder.open(head, restart=command.restart):
        console.print(f"resuming the curation in {command.out}", highlight=False, soft_wrap=True)
    curation = _Curation(command, candidates, folder, console)

    async def work(interrupt: Interrupt) -> int:
        await curation.run()
        return 0

    again = "what was found is kept; the same command resumes"
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
        self._images = {image.digest: image for candidate in candidates.candidates for image in candidate.images}

    async def run(self) -> None:
        """Runs all stages and writes the results."""
        settings = self._command.settings
        questions = [candidate.question for candidate in self._candidates.candidates]
        threshold = settings.near_duplicates
        questions = await self._find(
            "duplicates", questions, lambda all_of: find_duplicates(all_of, threshold, self._look)
        )
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

    def _look(self, digest: str) -> Look:
        """Returns what one of the images looks like."""
        return look_at(decode_image(self._folder.images.read(self._images[digest]), digest))

    async def _find(self, name: str, questions: Sequence[Question], find: Find) -> list[Question]:
        """Runs a stage that looks at all prompts at once."""
        return self._end(await run_stage(name, self._path(name), questions, whole(find, questions)))

    async def _ask(self, questions: list[Question]) -> list[Question]:
        """Runs the two stages that sample a model, where there is one."""
        sampling, access = self._command.settings.sampling, self._command.access
        if sampling is None or access.model is None:
            self._skip("difficulty", questions, NOT_ASKED)
            self._skip("guessing", questions, NOT_ASKED)
            return questions
        wanted = {question.id for question in questions}
        kept = [each for each in self._candidates.candidates if each.id in wanted]
        read_image = ImageReader(os.fspath(self._folder.path), store=self._folder.images)
        lines = {each.id: read_prompt_line(each.line, each.id, read_image) for each in kept}
        async with AsyncExitStack() as stack:
            workers = [
                await stack.enter_async_context(RolloutClient(address, access.channel)) for address in access.rollout
            ]
            reward = await stack.enter_async_context(RewardClient(access.reward, access.channel))
            if access.push:
                await push_weights(access.model, access.rollout, access.channel)
            version, context_tokens = await read_policy_version(workers)
            self._folder.pin("model", describe_model(access.model))
            self._folder.pin("policy_version", version)
            folder = open_model_folder(access.model, "--model")
            context_tokens = min(context_tokens, folder.context_tokens)
            encoder = open_encoder(folder, access.chat)
            temperature, seed = sampling.temperature, self._command.settings.seed
            model = SampledModel(
                *(workers, reward, encoder, context_tokens, version, temperature, seed, access.unavailable_s),
                self._folder.images,
            )
            questions = await self._ask_stage(difficulty_stage(sampling), model, lines, questions)
            if sampling.guesses:
                # A guess is asked for without what the instruction says of reasoning.
                bare = ChatSettings(mode=access.chat.mode, system_prompt=access.chat.system_prompt)
                guessed = replace(model, encoder=replace(encoder, settings=bare))
                return await self._ask_stage(guessing_stage(sampling), guessed, lines, questions)
        self._skip("guessing", questions, "--guesses 0")
        return questions

    async def _ask_stage(
        self, stage: ModelStage, model: SampledModel, lines: dict[str, PromptLine], questions: list[Question]
    ) -> list[Question]:
        """Runs one stage that samples a model, with a progress line."""
        with ProgressView(self._console, stage.name, len(questions), plain=self._command.plain) as progress:
            produce = sample_model(stage, model, lines)
            result = await run_stage(stage.name, self._path(stage.name), questions, produce, progress.advance)
        return self._end(result)

    def _skip(self, name: str, questions: Sequence[Question], why: str) -> None:
        """Records that a stage did not run."""
        self._stages.append(StageResult(name, questions, skipped=why))
        self._console.print(f"{name}: skipped, {why}", highlight=False, soft_wrap=True)

    def _end(self, result: StageResult) -> list[Question]:
        """Records a stage and returns the prompts that stay."""
        self._stages.append(result)
        survivors = result.survivors()
        undecided = sum(finding.decision is Decision.UNDECIDED for finding in result.findings.values())
        self._console.print(
            f"{result.name}: {len(survivors):,} of {len(result.questions):,} stay"
            + (f", {undecided:,} undecided" if undecided else ""),
            highlight=False,
        )
        return survivors

    def _path(self, name: str) -> Path:
        return self._folder.path / "stages" / f"{len(self._stages) + 1}-{name}.jsonl"

    def _write(self, before: Sequence[Question], kept: Sequence[Question], buckets: Buckets) -> None:
        """Writes kept, dropped and undecided prompts and the report."""
        out = self._command.out
        by_id = {candidate.question.id: candidate for candidate in self._candidates.candidates}
        write_lines(out / "prompts.jsonl", (describe_kept(by_id[question.id], question) for question in kept))
        for decision, name in ((Decision.DROP, "dropped.jsonl"), (Decision.UNDECIDED, "undecided.jsonl")):
            write_lines(
                out / name,
                (
                    {"stage": stage.name, **finding.to_line(), "prompt": by_id[finding.id].question.text}
                    for stage in self._stages
                    for question in stage.questions
                    if (finding := stage.findings.get(question.id)) is not None and finding.decision is decision
                ),
            )
        wanted = {digest for question in kept for digest in question.images}
        for digest in self._images.keys() - wanted:
            self._folder.images.path(digest).unlink(missing_ok=True)
        report = build_report(self._stages, before, kept, buckets, self._candidates.left_out)
        report["settings"] = json.loads(self._command.settings.model_dump_json())
        write_atomically(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n")
        write_atomically(out / "report.md", ("\n".join(_lines(report)) + "\n").encode())
        self._console.print(f"{len(kept):,} prompts: {out / 'prompts.jsonl'}", highlight=False, soft_wrap=True)
        self._console.print(f"report: {out / 'report.md'}", highlight=False, soft_wrap=True)


def describe_kept(candidate: Candidate, question: Question) -> dict[str, object]:
    """Returns the line of a prompt that stays, in the recipe's format, with what was found out."""
    line = {**candidate.line, "domain": question.domain or "default"}
    if question.difficulty is not None:
        line["difficulty"] = question.difficulty
    return line
