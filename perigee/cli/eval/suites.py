"""Suites of problems: a YAML file that says how a data file's records become prompts with a verifier, or a prompt file.

`{column}` in a suite's texts stands for a record's column; a text that is nothing else takes the value as it is.
Readers and `options` add columns of their own.
"""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import io
import itertools
import json
import pickle
import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field

from perigee.chat import Asked, ChatMessage, ReadImage
from perigee.cli.eval.ifeval import read_ifeval
from perigee.cli.eval.vision import LETTERS, read_mathvision, read_mathvista, read_mmmu, show_images, write_choices
from perigee.config import Model, read_yaml, validate
from perigee.errors import FailedPreconditionError, InvalidArgumentError
from perigee.files import write_lines
from perigee.image_sources import IMAGES_FOLDER, ImageReader, ImageStore, keep_images
from perigee.reward.items import PromptLine, read_object, read_prompt_line, read_rows
from perigee.reward.sources import Columns, image_base, read_data, read_source

DATA_VARIABLE = "PERIGEE_EVAL_DATA"
DEFAULT_DATA = Path.home() / ".cache" / "perigee" / "eval"
SUITES_PATH = Path(__file__).parent / "suites"
# The first of them that a record has names its problem.
ID_COLUMNS = ("task_id", "id", "key", "pid")
_COLUMN = re.compile(r"\{([A-Za-z_][\w -]*)\}")
_CALL = re.compile(r"(\w+)\s*\(")

Record = dict[str, Any]


class SamplingSettings(Model):
    """How responses are drawn."""

    greedy: bool = True
    """One response to each problem by greedy decoding."""
    samples: int = Field(4, ge=0)
    """Further responses to each problem, drawn at `temperature`."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the samples."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Smallest probability mass that samples are drawn from."""
    max_tokens: int = Field(2048, ge=1)
    """Response tokens at most."""
    seed: int = Field(0, ge=0)
    """Seed of the samples, each with one of its own."""


class Suite(Model):
    """Problems, how a model is asked, and how its responses are judged."""

    description: str = ""
    source: str
    """Where the data comes from."""
    licence: str
    """Licence of the data."""
    size: int | None = None
    """Problems of the whole data file."""
    data: list[str]
    """Names of the data file, any of which serves: JSON Lines, also compressed by gzip, CSV or Parquet, or a folder."""
    split: str | None = None
    """Of a folder, the files whose names begin with it."""
    reader: str | None = None
    """Reader that adds columns: ifeval, livecodebench, mathvision, mathvista, mbpp or mmmu."""
    answer_after: dict[str, str] = {}
    """Columns of which only what follows the last marker counts, without the commas in its numbers."""
    options: str | list[str] | None = None
    """Column of a list of options, or columns of one option each, of which the first is right and all are shuffled."""
    images: list[str] = []
    """Columns of images. `<image 1>` in the prompt is where the first stands; before it stand those without a place."""
    system_prompt: str | None = None
    """System message."""
    prompt: str
    """User message."""
    line: dict[str, Any]
    """Verifier, ground truth and domain, as in the lines of a prompt file."""
    sampling: SamplingSettings = SamplingSettings()
    """How responses are drawn."""


@dataclass(frozen=True)
class Problem:
    """Problem of a suite, and what a model is asked."""

    suite: str
    line: PromptLine
    asked: Asked


@dataclass(frozen=True)
class LoadedSuite:
    """Suite with its problems; `name` is the one it is reported by."""

    name: str
    sampling: SamplingSettings
    problems: Sequence[Problem]
    is_prompt_file: bool = False


def suite_names() -> list[str]:
    """Returns the names of the suites that come with the package."""
    return sorted(path.stem for path in SUITES_PATH.glob("*.yaml"))


def read_suite(path: Path) -> Suite:
    """Returns a suite. Raises InvalidArgumentError that names the file and the field."""
    return validate(Suite, read_yaml(path), path.name, "")


def load_suite(name: str, data_path: Path, limit: int | None = None, images: ImageStore | None = None) -> LoadedSuite:
    """Returns the suite of a name, of a YAML file or of a prompt file, its first `limit` problems only.

    Images are kept in `images`.

    Raises what `open_suite` raises, and InvalidArgumentError when a record does not fit.
    """
    if name.endswith(".jsonl"):
        path = Path(name)
        lines = read_source(path, Columns(), name, "", ImageReader(image_base(name), store=images))[:limit]
        problems = [Problem(path.stem, line, line.asked) for line in lines]
        return LoadedSuite(path.stem, SamplingSettings(), problems, is_prompt_file=True)
    name, suite, rows = open_suite(name, data_path, limit)
    return LoadedSuite(name, suite.sampling, read_problems(name, suite, rows, ImageReader(store=images)))


def open_suite(name: str, data_path: Path, limit: int | None = None) -> tuple[str, Suite, list[tuple[str, Record]]]:
    """Returns the name that a suite is reported by, the suite, and its first records, each after its place.

    Raises InvalidArgumentError when there is none, FailedPreconditionError when its data is absent.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES_PATH / f"{name}.yaml"
    if not path.is_file():
        raise InvalidArgumentError.for_field(
            name, f"is no suite: give a YAML file, a prompt file (.jsonl) or one of {', '.join(suite_names())}"
        )
    suite = read_suite(path)
    file = find_data_file(path.stem, suite, [data_path, path.parent])
    rows = [
        (f"{file}:{number}", record) for number, record in enumerate(read_records(file, limit, suite.split), start=1)
    ]
    return path.stem, suite, rows


def write_prompt_file(name: str, data_path: Path, folder: Path) -> Path:
    """Writes a suite as a prompt file into a folder, for runs; returns its path. Raises what `load_suite` raises."""
    stem, suite, rows = open_suite(name, data_path)
    problems = read_problems(stem, suite, rows, ImageReader(store=ImageStore(folder / IMAGES_FOLDER)))
    lines = []
    for problem, (place, record) in zip(problems, rows, strict=True):
        line = make_line(suite, record, place)
        line = keep_images(line, problem.line.messages, problem.line.images)
        line["id"] = f"{stem}-{line['id']}"
        if suite.system_prompt:
            user = [{"role": "user", "content": line.pop("prompt")}] if "prompt" in line else line["messages"]
            line["messages"] = [{"role": "system", "content": suite.system_prompt}, *user]
        lines.append(line)
    write_lines(folder / f"{stem}.jsonl", lines)
    return folder / f"{stem}.jsonl"


def find_data_file(name: str, suite: Suite, folders: Sequence[Path]) -> Path:
    """Returns the suite's data file. Raises FailedPreconditionError that says where to get it and where to put it."""
    for folder in folders:
        for file in suite.data:
            if (folder / file).exists():
                return folder / file
    raise FailedPreconditionError(
        f"the data of suite {name} is not here: get {suite.source} and put it at {folders[0] / suite.data[0]}"
    )


def read_records(path: Path, limit: int | None = None, split: str | None = None) -> list[Record]:
    """Returns the first records of a data file, or of a folder's files of a split.

    Raises InvalidArgumentError when it cannot be read.
    """
    if path.suffix not in (".gz", ".csv"):
        rows = itertools.islice(read_data(path, split, str(path)), limit)
        return [read_object(row, place) if isinstance(row, str) else dict(row) for place, row in rows]
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                return list(itertools.islice(csv.DictReader(file), limit))
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = list(itertools.islice(filter(str.strip, file), limit))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidArgumentError.for_field(str(path), f"cannot be read: {error}") from error
    return [read_object(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def read_problems(name: str, suite: Suite, rows: Sequence[tuple[str, Record]], read_image: ReadImage) -> list[Problem]:
    """Returns the problems of records and their places. Raises InvalidArgumentError naming every one that is wrong."""
    by_id: dict[str, Problem] = {}

    def read(record: Record, place: str) -> PromptLine:
        line = read_prompt_line(make_line(suite, record, place), place, read_image)
        system = (ChatMessage(role="system", content=suite.system_prompt),) if suite.system_prompt else ()
        user = line.messages or (ChatMessage(role="user", content=line.item.prompt),)
        by_id[line.id] = Problem(name, line, (*system, *user))
        return line

    return [by_id[line.id] for line in read_rows(rows, read, name, "problems")]


def make_line(suite: Suite, record: Record, place: str) -> dict[str, Any]:
    """Returns the prompt line of a record."""
    columns = add_columns(suite, record, place)
    default_id = str(next(filter(None, map(columns.get, ID_COLUMNS)), place.rpartition(":")[2]))
    prompt = fill(suite.prompt, columns, place)
    content = show_images(prompt, [columns.get(column) for column in suite.images], place)
    asked = {"messages": [{"role": "user", "content": content}]} if content else {"prompt": prompt}
    return {"id": default_id, **asked, **fill_line(suite.line, columns, place)}


def add_columns(suite: Suite, record: Record, place: str) -> Record:
    """Returns the record with what the suite makes of its columns."""
    try:
        columns = READERS[suite.reader](record) if suite.reader else dict(record)
        for column, marker in suite.answer_after.items():
            _, found, answer = str(record[column]).rpartition(marker)
            if not found:
                raise InvalidArgumentError.for_field(f"{place}: {column}", f"has no {marker!r} before the answer")
            columns[column] = answer.strip()
        if isinstance(suite.options, str):
            columns["options"] = list(record[suite.options])
        elif suite.options:
            right, *_ = options = [str(record[column]).strip() for column in suite.options]
            random.Random(hashlib.blake2b("".join(options).encode()).digest()).shuffle(options)
            columns |= {"options": options, "letter": LETTERS[options.index(right)]}
    except KeyError as error:
        raise InvalidArgumentError.for_field(place, f"has no column {error}") from error
    except ValueError as error:
        raise InvalidArgumentError.for_field(place, str(error)) from error
    if suite.options:
        columns["choices"] = write_choices(columns["options"])
    return columns


def fill(template: Any, columns: Mapping[str, Any], place: str) -> Any:
    """Returns the template, at every depth, with columns for their names in braces.

    Raises InvalidArgumentError when the record lacks one.
    """
    if isinstance(template, Mapping):
        return {key: fill(value, columns, place) for key, value in template.items()}
    if isinstance(template, list):
        return [fill(value, columns, place) for value in template]
    if not isinstance(template, str):
        return template

    def column(match: re.Match[str]) -> Any:
        if match[1] not in columns:
            raise InvalidArgumentError.for_field(place, f"has no column {match[1]!r}")
        return columns[match[1]]

    whole = _COLUMN.fullmatch(template)
    return column(whole) if whole else _COLUMN.sub(lambda match: str(column(match)), template)


def fill_line(template: Mapping[str, Any], columns: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns the keys of a prompt line; those without a value are left out, and a mathematical answer is a text."""
    line = {key: value for key, value in fill(template, columns, place).items() if value not in (None, "")}
    if line.get("verifier") in ("math", "choice"):
        line["answer"] = str(line.get("answer", ""))
    return line


def read_mbpp(record: Record) -> Record:
    """Returns a record of MBPP with its tests as one text and the function that they call."""
    tests = "\n".join(record["test_list"])
    called = [name for name in _CALL.findall(tests) if f"def {name}" in record["code"]]
    imports = "\n".join([record.get("test_setup_code") or "", *(record.get("test_imports") or ())]).strip()
    text = record.get("text") or record.get("prompt")
    return record | {"text": text, "tests": tests, "function": (called or [""])[0], "test_setup_code": imports}


def read_livecodebench(record: Record) -> Record:
    """Returns a record of LiveCodeBench with all tests, public ones first, and the form that an answer is to have."""
    cases = [*json.loads(record["public_test_cases"]), *read_private_cases(record["private_test_cases"])]
    function = json.loads(record["metadata"] or "{}").get("func_name", "")
    if function:
        form = f"Complete this code in one Python code block:\n\n```python\n{record['starter_code']}\n```"
        tests = [
            {
                "arguments": [json.loads(line) for line in case["input"].split("\n") if line.strip()],
                "expected": json.loads(case["output"]),
            }
            for case in cases
        ]
    else:
        form = "Read from standard input, write to standard output, and answer with one Python code block."
        tests = [{"stdin": case["input"], "expected_stdout": case["output"]} for case in cases]
    return record | {"function": function, "form": form, "tests": tests}


class _TextUnpickler(pickle.Unpickler):
    """Reads plain values: a class in the data, which could do anything, is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuses every class."""
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")


def read_private_cases(text: str) -> list[dict[str, str]]:
    """Returns LiveCodeBench's hidden tests: JSON, or JSON that was pickled, compressed and written in base64."""
    if text.startswith("["):
        cases: list[dict[str, str]] = json.loads(text)
        return cases
    packed = io.BytesIO(zlib.decompress(base64.b64decode(text)))
    return list(json.loads(_TextUnpickler(packed).load()))


READERS: Mapping[str, Callable[[Record], Record]] = {
    "ifeval": read_ifeval,
    "livecodebench": read_livecodebench,
    "mathvision": read_mathvision,
    "mathvista": read_mathvista,
    "mmmu": read_mmmu,
    "mbpp": read_mbpp,
}
