"""`perigee sample`: responses to prompts, judged, and the training data that is selected of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from perigee.buffer.v1 import buffer_pb2
from perigee.chat import Asked, change_text
from perigee.cli.ending import Interrupt
from perigee.cli.eval.responses import ModelOptions, collect, note, open_target
from perigee.cli.eval.results import FAILED, Answer
from perigee.cli.eval.suites import LoadedSuite, Problem, SamplingSettings
from perigee.cli.sample.selection import (
    ALL,
    PAIRS,
    SHORTEST,
    PairRules,
    PromptSamples,
    Selection,
    describe_samples,
    select,
)
from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.files import dump_line, write_atomically
from perigee.image_sources import IMAGES_FOLDER, ImageReader, ImageStore
from perigee.json_codec import name_type
from perigee.reward.items import PromptLine, read_lines, read_object
from perigee.reward.sources import Columns, image_base, read_source

SAMPLES_FILE, REPORT_FILE = "samples.jsonl", "report.json"
FILES = {SHORTEST: "sft.jsonl", PAIRS: "pairs.jsonl", ALL: "all.jsonl"}
DEFAULT_COT, COT_PATH = "default", Path(__file__).parent / "long_cot.txt"
PROMPT_FIELD = "{prompt}"
VERDICTS = [name.removeprefix("VERDICT_").lower() for name in buffer_pb2.Verdict.keys()[1:]]


@dataclass(frozen=True)
class SampleOptions:
    """Arguments of `perigee sample`."""

    prompts: Path
    columns: Columns
    out: Path
    select: Sequence[str]
    rules: PairRules
    sampling: SamplingSettings
    model: ModelOptions
    cot: str | None = None
    """File with the words around a prompt, or `default`; they are none of the written prompt."""
    samples: Path | None = None
    """Samples that are there already, in the place of a model's."""
    limit: int | None = None


async def sample(options: SampleOptions, console: Console, interrupt: Interrupt) -> dict[str, Any]:
    """Draws and judges the samples that are not there yet, and writes what is selected of them; returns the report.

    Raises PerigeeError, with what to do, when an input is wrong, a service does not start or nothing can be selected;
    no file is written then but the answers that there are.
    """
    images = ImageStore(options.out / IMAGES_FOLDER)
    read_image = ImageReader(image_base(str(options.prompts)), store=images)
    lines = read_source(options.prompts, options.columns, "PROMPTS", "", read_image)
    options = replace(options, model=replace(options.model, images=images))
    wanted = lines[: options.limit]
    if options.samples is None:
        head, answers = await draw(options, wanted, console, interrupt)
    else:
        head, answers = {"samples": str(options.samples)}, read_samples(options.samples, lines)
    groups = group_samples(wanted, answers)
    selections = {kind: select(kind, groups, options.rules) for kind in options.select}
    report = head | describe_samples(groups) | {"selected": {kind: each.report for kind, each in selections.items()}}
    write_files(options.out, groups, selections, report)
    show(report, options.out, console)
    return report


async def draw(
    options: SampleOptions, lines: Sequence[PromptLine], console: Console, interrupt: Interrupt
) -> tuple[dict[str, Any], list[Answer]]:
    """Returns what the report says of the model, and its judged responses."""
    target = await open_target(options.model)
    attempts = target.plan(make_suite(options, lines), options.sampling)
    head = {
        "model": target.name,
        "endpoint": None if target.folder else target.endpoint.url,
        "sampling": options.sampling.model_dump(exclude={"greedy"}),
        "cot": options.cot,
    }
    return head, await collect(attempts, target, options.model, options.out, console, interrupt)


def make_suite(options: SampleOptions, lines: Sequence[PromptLine]) -> LoadedSuite:
    """Returns the prompts as problems, asked in the words of `--cot` where it is given."""
    template = None if options.cot is None else read_template(options.cot)
    name = options.prompts.stem
    problems = [Problem(name, line, line.asked if template is None else wrap(line.asked, template)) for line in lines]
    return LoadedSuite(name, options.sampling, problems, is_prompt_file=True)


def read_template(name: str) -> str:
    """Returns the words around a prompt. Raises InvalidArgumentError when they have no place for it."""
    path = COT_PATH if name == DEFAULT_COT else Path(name)
    try:
        template = path.read_text(encoding="utf-8").strip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError.for_field("--cot", f"{path} cannot be read: {error}") from error
    if PROMPT_FIELD not in template:
        raise InvalidArgumentError.for_field("--cot", f"{path} has no {PROMPT_FIELD}, where the prompt belongs")
    return template


def wrap(asked: Asked, template: str) -> Asked:
    """Returns what is asked with the template's words around it, or around the user's last message."""
    if isinstance(asked, str):
        return template.replace(PROMPT_FIELD, asked)
    last = max(index for index, message in enumerate(asked) if message["role"] == "user")
    wrapped = change_text(asked[last], lambda text: template.replace(PROMPT_FIELD, text))
    return (*asked[:last], wrapped, *asked[last + 1 :])


def read_samples(path: Path, lines: Sequence[PromptLine]) -> list[Answer]:
    """Returns the samples of a file, each of which has the id of a prompt, a response and a verdict.

    Raises InvalidArgumentError with a violation for each field that is wrong.
    """
    ids = {line.id for line in lines}
    violations: list[FieldViolation] = []
    samples: list[Answer] = []
    for place, text in read_lines(path, "--samples"):
        values = {"tokens": None, "truncated": False, "reward": None, "reason": "", **read_object(text, place)}
        found = find_faults(values, ids)
        violations += [FieldViolation(f"{place}: {each.field}", each.description) for each in found]
        samples.append(values)
    if violations:
        raise InvalidArgumentError.for_fields(violations)
    if not samples:
        raise InvalidArgumentError.for_field("--samples", f"{path} holds no samples")
    return samples


def find_faults(values: Mapping[str, Any], ids: set[str]) -> list[FieldViolation]:
    """Returns what keeps a sample from being selected."""
    faults = []
    if not isinstance(values.get("id"), str) or values["id"] not in ids:
        faults.append(FieldViolation("id", f"{values.get('id')!r} is the id of no prompt"))
    for key in ("response", "reason"):
        if not isinstance(values.get(key), str):
            faults.append(FieldViolation(key, f"must be a text, got {name_type(values.get(key))}"))
    if values.get("verdict") not in VERDICTS:
        given = f"got {values['verdict']!r}" if "verdict" in values else "perigee reward score judges responses"
        faults.append(FieldViolation("verdict", f"must be one of {', '.join(VERDICTS)}; {given}"))
    tokens = values["tokens"]
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int)):
        faults.append(FieldViolation("tokens", f"must be a number of tokens, got {name_type(tokens)}"))
    elif tokens is not None and tokens < 0:
        faults.append(FieldViolation("tokens", f"must be 0 or more, is {tokens}"))
    if not isinstance(values["truncated"], bool):
        faults.append(FieldViolation("truncated", f"must be true or false, got {name_type(values['truncated'])}"))
    return faults


def group_samples(lines: Sequence[PromptLine], answers: Sequence[Answer]) -> list[PromptSamples]:
    """Returns the samples by prompt, in the order of the prompts."""
    by_id: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_id[answer["id"]].append(answer)
    return [PromptSamples(line, by_id[line.id]) for line in lines]


def write_files(
    out: Path, groups: Sequence[PromptSamples], selections: Mapping[str, Selection], report: Mapping[str, Any]
) -> None:
    """Writes samples, selections and, last, the report; files of what is not selected are removed.

    Those may be of other samples, and a report that is there is of the files beside it.
    """
    (out / REPORT_FILE).unlink(missing_ok=True)
    for kind, file in FILES.items():
        if kind not in selections:
            (out / file).unlink(missing_ok=True)
    files: dict[str, Iterable[bytes]] = {
        SAMPLES_FILE: (dump_line(sample) for group in groups for sample in group.samples),
        **{FILES[kind]: map(dump_line, selection.lines) for kind, selection in selections.items()},
        REPORT_FILE: [f"{json.dumps(report, indent=2)}\n".encode()],
    }
    for file, content in files.items():
        # Under one name each time, so that what a killed command left is written over.
        write_atomically(out / file, content, staging=out / f".{file}.staging")


def show(report: Mapping[str, Any], out: Path, console: Console) -> None:
    """Prints what there is, what was selected of it, and what was dropped and why."""
    verdicts, unit = report["verdicts"], report["length_unit"]
    counts = ", ".join(f"{count:,} {verdict}" for verdict, count in verdicts.items() if count)
    note(console, f"{report['responses']:,} responses to {report['prompts']:,} prompts: {counts}")
    if verdicts[FAILED]:
        reason = next(iter(report["failures"]))
        note(console, f"most often failed because {reason}; the same command asks for them again")
    for kind, selected in report["selected"].items():
        if kind == PAIRS:
            size = f"{selected['pairs']:,} pairs"
            lengths = [selected[f"{name}_length"]["mean"] for name in ("chosen", "rejected")]
            words = f"{lengths[0]:,.1f} {unit} chosen and {lengths[1]:,.1f} rejected on average"
        else:
            size = f"{selected['examples']:,} examples"
            words = f"{selected['length']['mean']:,.1f} {unit} on average"
        note(console, f"{kind}: {size} of {selected['prompts']:,} prompts, {words}: {out / FILES[kind]}")
        for name in ("prompts", "responses"):
            dropped = selected[f"dropped_{name}"]
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
            if dropped:
                note(console, f"  {name} dropped: {sum(dropped.values()):,} ({reasons})")
    note(console, f"report: {out / REPORT_FILE}")
