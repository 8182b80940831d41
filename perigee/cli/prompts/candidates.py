"""Prompts to curate: lines in the recipe's format, from JSON Lines or a folder of Hugging Face datasets."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perigee.chat import ReadImage, read_images
from perigee.curation.domains import EMPTY_TAGS
from perigee.curation.findings import Question
from perigee.curation.question_kinds import KINDS
from perigee.errors import InvalidArgumentError
from perigee.image_sources import keep_images
from perigee.images import ImageInfo
from perigee.reward.items import VERIFIERS, read_object, read_prompt_line, read_rows
from perigee.reward.sources import Columns, checked_rows, read_fields


@dataclass(frozen=True)
class Candidate:
    """A prompt to curate, and its line for the recipe."""

    question: Question
    line: Mapping[str, Any]
    images: tuple[ImageInfo, ...] = ()

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
    fields = dict(split_pair("--column", pair) for pair in renames)
    return Columns(
        {column: field for field, column in fields.items()},
        dict(split_pair("--default", pair) for pair in defaults),
        answer_after,
        split,
    )


def read_candidates(path: Path, columns: Columns, read_image: ReadImage | None = None) -> CandidateSet:
    """Returns the prompts of a file or folder; one without an id is named after its place. Images are refused where
    nothing reads them.

    Raises InvalidArgumentError with a violation per line that is no prompt.
    """
    left_out: Counter[str] = Counter()
    numbers = itertools.count(1)

    def read(row: str | Mapping[str, Any], place: str) -> Candidate:
        default_id = f"{path.stem}-{next(numbers):06d}"
        values = read_object(row, place) if isinstance(row, str) else row
        return make_candidate(read_fields(values, columns, place, default_id, left_out), place, read_image)

    return CandidateSet(read_rows(checked_rows(path, columns, "IN"), read, "IN"), sorted(left_out))


def make_candidate(values: dict[str, Any], place: str, read_image: ReadImage | None = None) -> Candidate:
    """Returns the candidate of a line's fields.

    A line of a kind that the recipe does not know is one only when the kind is one to drop.
    Raises InvalidArgumentError naming the place and the field.
    """
    kind = values.get("verifier")
    text = values.get("prompt")
    if kind in VERIFIERS or kind not in KINDS:
        line = read_prompt_line(values, place, read_image)
        text, images = line.item.prompt, line.images
        values = keep_images(values, line.messages, images)
    elif not isinstance(values.get("prompt"), str):
        raise InvalidArgumentError.for_field(f"{place}: prompt", "is required")
    else:
        images = read_images(values.get("images"), read_image, f"{place}: images")
        values = keep_images(values, (), images)
    domain, answers = str(values.get("domain", "")), values.get("answers", [])
    answer = answers[0] if len(answers) == 1 else values.get("answer", "")
    question = Question(
        id=str(values["id"]),
        text=str(text),
        kind=str(kind),
        reference=answer if isinstance(answer, str) else json.dumps(answer),
        domain="" if domain in EMPTY_TAGS else domain,
        difficulty=values.get("difficulty"),
        images=tuple(image.digest for image in images),
    )
    return Candidate(question, values, images)


def split_pair(option: str, pair: str) -> tuple[str, str]:
    """Returns A and B of A=B; raises InvalidArgumentError naming the option without an equals sign."""
    name, equals, value = pair.partition("=")
    if not name or not equals:
        raise InvalidArgumentError.for_field(option, f"{pair!r} is not of the form A=B")
    return name, value
