"""Suites with images: where the images of a prompt stand, and the ground truths of MathVista, MathVision and MMMU."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from perigee.errors import InvalidArgumentError

Record = dict[str, Any]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Decimals to which MMMU's evaluator rounds numbers.
MMMU_DECIMALS = 2
_PLACE = re.compile(r"<image ?([0-9]+)>")
_FURTHER = re.compile(r"<image ?([2-9])>")
_NUMBER = re.compile(r"[+-]?[0-9][0-9,]*(?:\.[0-9]+)?|[+-]?\.[0-9]+")


def show_images(prompt: str, images: Sequence[object], place: str) -> list[dict[str, Any]]:
    """Returns the parts of a message that shows the images, those that are None left out; nothing without any.

    Each stands where the prompt has its number first, as `<image 2>` or `<image2>`, or before the text. Raises
    InvalidArgumentError for the number of an image that is not there.
    """
    left = {number: image for number, image in enumerate(images, start=1) if image is not None}
    if not left:
        return []
    texts = _PLACE.split(prompt)
    if missing := sorted({int(number) for number in texts[1::2]} - left.keys()):
        raise InvalidArgumentError.for_field(place, f"has no image {missing[0]}, which its prompt shows")
    parts: list[dict[str, Any]] = []
    for position, text in enumerate(texts):
        if position % 2 == 0:
            parts.append({"type": "text", "text": text})
        elif (image := left.pop(int(text), None)) is not None:
            parts.append({"type": "image", "image": image})
        else:
            parts.append({"type": "text", "text": f"image {text}"})
    first = [{"type": "image", "image": image} for image in left.values()]
    return first + [part for part in parts if part.get("text") != ""]


def write_choices(options: Sequence[str]) -> str:
    """Returns the options, each on a line of its own after its letter."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def read_mathvista(record: Record) -> Record:
    """Returns a record of MathVista with its verifier: letter or text of an option, or a number as it is to be rounded.

    Raises ValueError for an answer that is none of the options.
    """
    answer, kind = str(record["answer"]), record["answer_type"]
    if record["question_type"] == "multi_choice":
        verifier = _choose(list(record["choices"]), answer, by_text=True)
    elif kind == "float" and record["precision"] is not None:
        verifier = {"math": {"reference": answer, "decimals": int(record["precision"])}}
    else:
        verifier = {"math": {"reference": answer}}
    return record | {"verifier": verifier, "domain": (record.get("metadata") or {}).get("task") or "default"}


def read_mathvision(record: Record) -> Record:
    """Returns a record of MathVision with its options as text, and its verifier: an option or a value."""
    options, answer = [str(option) for option in record["options"] or ()], str(record["answer"])
    verifier = _choose(options, answer) if options else {"math": {"reference": answer}}
    # Options that are drawn in the picture are letters alone.
    choices = "" if options == list(LETTERS[: len(options)]) else write_choices(options)
    # Several figures of a question are in one file.
    question = _FURTHER.sub(r"image \1", record["question"])
    return record | {"question": question, "verifier": verifier, "choices": choices}


def read_mmmu(record: Record) -> Record:
    """Returns a record of MMMU with its options as text, its subject, and its verifier: an option, numbers or words.

    Options and answers are lists as Python writes them, or one text. Raises ValueError for an answer that is none of
    the options.
    """
    options, answers = read_list(record["options"]), read_list(record["answer"])
    if record["question_type"] == "multiple-choice":
        verifier = _choose(options, answers[0])
    elif all(_NUMBER.fullmatch(answer) for answer in answers):
        first, *others = [f"{float(answer.replace(',', '')):.{MMMU_DECIMALS}f}" for answer in answers]
        verifier = {"math": {"reference": first, "alternatives": others, "decimals": MMMU_DECIMALS}}
    else:
        verifier = {"short_answer": {"references": answers}}
    subject = str(record["id"]).partition("_")[2].rpartition("_")[0].replace("_", " ")
    return record | {"verifier": verifier, "choices": write_choices(options), "subject": subject or "default"}


def read_list(value: object) -> list[str]:
    """Returns the items of a list, also of one that is written as Python writes it; other texts are one item."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.lstrip().startswith("[") else [value]
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = [value]
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _choose(options: Sequence[str], answer: str, by_text: bool = False) -> dict[str, Any]:
    """Returns the verifier of an option by its letter, or else by its text; `by_text` looks at texts first.

    Options may be letters in another order. Raises ValueError for an answer that is none.
    """
    letters = LETTERS[: len(options)]
    is_letter = answer in tuple(letters)
    if answer in options and (by_text or not is_letter):
        letter = letters[list(options).index(answer)]
    elif is_letter:
        letter = answer
    else:
        raise ValueError(f"has the answer {answer!r}, which is none of its options")
    return {"choice": {"reference": letter, "options": list(options)}}
