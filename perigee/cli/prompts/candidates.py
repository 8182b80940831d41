"""Prompts to curate: lines in the recipe's format, from JSON Lines or a folder of Hugging Face datasets."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perigee.curation.domains import EMPTY_TAGS
from perigee.curation.findings import Question
from perigee.curation.question_kinds import KINDS
from perigee.errors import InvalidArgumentError
from perigee.reward.items import VERIFIERS, prompt_keys, read_lines, read_object, read_prompt_line, read_rows

# Columns of images are of many forms, which no stage looks at.
KNOWN_FIELDS = prompt_keys() - {"images"}


@dataclass(frozen=True)
class Columns:
    """Mapping from columns of the input to fields of a prompt line."""

    renames: Mapping[str, str] = field(default_factory=dict)
    """Field by column."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Values of fields that the input lacks."""
    answer_after: str = ""
    """The answer is what follows this in its column."""
    split: str | None = None
    """The split of a saved DatasetDict."""


@dataclass(frozen=True)
class Candidate:
    """A prompt to curate, and its line for the recipe."""

    question: Question
    line: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The prompt's id."""
        return self.question.id


@dataclass(frozen=True)
class CandidateSet:
    """All prompts, columns that were left out, and a digest of the rest."""

    candidates: Sequence[Candidate]
    left_out: Sequence[str]

    @property
    def digest(self) -> str:
        """Digest of the prompts, their order and all that is known of them."""
        digest = hashlib.blake2b(digest_size=16)
        for candidate in self.candidates:
            digest.update(json.dumps(candidate.line, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


def make_columns(renames: Sequence[str], defaults: Sequence[str], answer_after: str, split: str | None) -> Columns:
    """Returns how columns become fields. Raises InvalidArgumentError for a pair without an equals sign."""
    fields = dict(_split_pair("--rename", pair) for pair in renames)
    return Columns(
        {column: field for field, column in fields.items()},
        dict(_split_pair("--default", pair) for pair in defaults),
        answer_after,
        split,
    )


def read_candidates(path: Path, columns: Columns) -> CandidateSet:
    """Returns the prompts of a file or folder; one without an id is named after its place.

    Raises InvalidArgumentError with a violation per line that is no prompt.
    """
    left_out: Counter[str] = Counter()
    numbers = itertools.count(1)

    def read(row: str | Mapping[str, Any], place: str) -> Candidate:
        default_id = f"{path.stem}-{next(numbers):06d}"
        values = read_object(row, place) if isinstance(row, str) else row
        return make_candidate(_read_fields(values, columns, place, default_id, left_out), place)

    return CandidateSet(read_rows(_read_rows(path, columns.split), read, "IN"), sorted(left_out))


def make_candidate(values: dict[str, Any], place: str) -> Candidate:
    """Returns the candidate of a line's fields.

    A line of a kind that the recipe does not know is one only when the kind is one to drop.
    Raises InvalidArgumentError naming the place and the field.
    """
    kind = values.get("verifier")
    if kind in VERIFIERS or kind not in KINDS:
        read_prompt_line(values, place)
    elif not isinstance(values.get("prompt"), str):
        raise InvalidArgumentError.for_field(f"{place}: prompt", "is required")
    domain, answers = str(values.get("domain", "")), values.get("answers", [])
    answer = answers[0] if len(answers) == 1 else values.get("answer", "")
    question = Question(
        id=str(values["id"]),
        text=values["prompt"],
        kind=str(kind),
        reference=answer if isinstance(answer, str) else json.dumps(answer),
        domain="" if domain in EMPTY_TAGS else domain,
        difficulty=values.get("difficulty"),
    )
    return Candidate(question, values)


def _split_pair(option: str, pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not name or not equals:
        raise InvalidArgumentError.for_field(option, f"{pair!r} is not of the form A=B")
    return name, value


def _read_fields(
    row: Mapping[str, Any], columns: Columns, place: str, default_id: str, left_out: Counter[str]
) -> dict[str, Any]:
    """Returns the fields of a row, with columns renamed; unknown columns are counted and left out."""
    values: dict[str, Any] = {"id": default_id, **columns.defaults}
    names = {columns.renames.get(column, column) for column in row}
    for column, value in row.items():
        name = columns.renames.get(column, column)
        if value is None:
            continue
        if name not in KNOWN_FIELDS:
            near = difflib.get_close_matches(name, KNOWN_FIELDS, n=1, cutoff=0.8)
            if near and near[0] not in names:
                raise InvalidArgumentError.for_field(
                    f"{place}: {name}", f"is no field of a prompt; did you mean {near[0]}?"
                )
            left_out[name] += 1
            continue
        values[name] = value
    if columns.answer_after and isinstance(answer := values.get("answer"), str):
        _, found, rest = answer.rpartition(columns.answer_after)
        if not found:
            raise InvalidArgumentError.for_field(f"{place}: answer", f"has no {columns.answer_after!r}")
        values["answer"] = rest.strip()
    return values


def _read_rows(path: Path, split: str | None) -> Iterator[tuple[str, str | Mapping[str, Any]]]:
    """Yields the rows of the input, each after its place; of JSON Lines the text."""
    if path.is_dir():
        yield from _read_folder(path, split)
    elif path.suffix == ".parquet":
        yield from _read_files(path, "parquet", [path])
    else:
        yield from read_lines(path, "IN")


def _read_folder(path: Path, split: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _read_saved(path, split)
        return
    for kind, pattern in (("parquet", "*.parquet"), ("json", "*.jsonl")):
        if files := sorted(path.rglob(pattern)):
            yield from _read_files(path, kind, files)
            return
    raise InvalidArgumentError.for_field(
        str(path), "is no folder of datasets: it has neither a saved dataset nor *.parquet nor *.jsonl"
    )


def _read_saved(path: Path, split: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the rows of a saved dataset."""
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        if split not in found:
            raise InvalidArgumentError.for_field("--split", f"must be one of {', '.join(found)}")
        found = found[split]
    for number, row in enumerate(found):
        yield f"{path}[{number}]", row


def _read_files(path: Path, kind: str, files: Iterable[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the rows of data files."""
    from datasets import load_dataset

    # Streaming keeps no copy in a cache.
    rows = load_dataset(kind, data_files=[str(file) for file in files], split="train", streaming=True)
    for number, row in enumerate(rows):
        yield f"{path}[{number}]", row
