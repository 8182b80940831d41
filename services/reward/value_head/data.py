"""Labelled responses from JSON Lines, split by question, as tokens and as pairs of a right and a wrong one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from perigee.errors import InvalidArgumentError
from services.reward.value_head.template import Encoder

Loss = Literal["pointwise", "pairwise", "both"]
# Verdicts, as files of outcomes and of labelled items have them.
VERDICTS = {"correct": True, "wrong": False, "ungradable": False}


class LabelledResponse(BaseModel):
    """A line {"question", "reference", "response", "label"}; the label is true, 1 or "correct" for a right response."""

    model_config = ConfigDict(frozen=True)

    question: str
    reference: str
    response: str
    label: bool

    @field_validator("label", mode="before")
    @classmethod
    def _read_verdict(cls, label: Any) -> Any:
        return VERDICTS.get(label, label) if isinstance(label, str) else label


class Preference(BaseModel):
    """A line {"question", "reference", "chosen", "rejected"}: the chosen response is right, the rejected one wrong."""

    model_config = ConfigDict(frozen=True)

    question: str
    reference: str
    chosen: str
    rejected: str


Example = LabelledResponse | Preference


@dataclass(frozen=True)
class ResponseSet:
    """Responses as tokens, which of them are right, and pairs (right, wrong) of responses to the same question."""

    tokens: list[NDArray[np.int32]]
    correct_N: NDArray[np.bool_]
    pairs: list[tuple[int, int]]

    def units(self, loss: Loss) -> list[tuple[int, ...]]:
        """What a step of training counts: single responses, pairs, or pairs and what is in none."""
        if loss == "pairwise":
            return list(self.pairs)
        paired = {index for pair in self.pairs for index in pair} if loss == "both" else set()
        singles = [(index,) for index in range(len(self.tokens)) if index not in paired]
        return [*self.pairs, *singles] if loss == "both" else list(singles)


def read_examples(path: Path) -> list[Example]:
    """The examples of a file; keys that are not known are left alone.

    Raises InvalidArgumentError naming file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError.of("data", f"{path} cannot be read: {error}") from error
    examples = [_read_line(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not examples:
        raise InvalidArgumentError.of("data", f"{path} holds no example")
    return examples


def split_by_question(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """What to train on and what to evaluate on; no question is in both.

    Raises InvalidArgumentError when there are not two questions.
    """
    questions = list(dict.fromkeys(example.question for example in examples))
    if len(questions) < 2:
        raise InvalidArgumentError.of("data", "at least two different questions are needed, one to evaluate on")
    count = min(max(1, round(len(questions) * share)), len(questions) - 1)
    chosen = np.random.default_rng(seed).permutation(len(questions))[:count]
    held_out = {questions[index] for index in chosen}
    return (
        [example for example in examples if example.question not in held_out],
        [example for example in examples if example.question in held_out],
    )


def encode_examples(examples: Iterable[Example], encoder: Encoder, seed: int) -> ResponseSet:
    """All responses as tokens. Labelled ones are paired within their question, each right and each wrong one at least
    once; where there are more of one kind, those of the other come several times.
    """
    tokens: list[NDArray[np.int32]] = []
    correct: list[bool] = []
    pairs: list[tuple[int, int]] = []
    by_question: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def add(example: Example, response: str, label: bool) -> int:
        ids = encoder.encode(example.question, example.reference, response)
        tokens.append(np.array(ids, dtype=np.int32))
        correct.append(label)
        return len(tokens) - 1

    for example in examples:
        if isinstance(example, Preference):
            pairs.append((add(example, example.chosen, True), add(example, example.rejected, False)))
        else:
            kinds = by_question.setdefault((example.question, example.reference), ([], []))
            kinds[not example.label].append(add(example, example.response, example.label))
    generator = np.random.default_rng(seed)
    for right, wrong in by_question.values():
        if right and wrong:
            count = max(len(right), len(wrong))
            rights, wrongs = (np.resize(generator.permutation(kind), count).tolist() for kind in (right, wrong))
            pairs += zip(rights, wrongs, strict=True)
    return ResponseSet(tokens, np.array(correct, dtype=np.bool_), pairs)


def _read_line(path: Path, number: int, line: str) -> Example:
    where = f"{path} line {number}"
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InvalidArgumentError.of("data", f"{where} is not JSON: {error}") from error
    is_preference = isinstance(value, dict) and "chosen" in value
    try:
        return Preference.model_validate(value) if is_preference else LabelledResponse.model_validate(value)
    except ValidationError as error:
        detail = error.errors()[0]
        field = f"{detail['loc'][0]}: " if detail["loc"] else ""
        raise InvalidArgumentError.of(
            "data",
            f"{where}: {field}{detail['msg']}; a line holds question, reference, response and label, or question, "
            "reference, chosen and rejected",
        ) from error
