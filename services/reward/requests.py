"""Checks score requests and turns them into items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.images import ImageLimits, read_images
from services.reward.readers import READERS, read_parameters
from services.reward.scoring import Scorer
from services.reward.verifiers.base import Item

# More would not fit into an error's trailing metadata.
MAX_VIOLATIONS = 20


@dataclass(frozen=True)
class ItemLimits:
    """How large an item may be; texts in UTF-8."""

    response_bytes: int
    prompt_bytes: int
    images: ImageLimits


def read_items(request: pb.ScoreRequest, scorer: Scorer, limits: ItemLimits) -> list[Item[Any]]:
    """The request's items.

    Raises InvalidArgumentError with a violation for each wrong field, the first 20 of them.
    """
    items: list[Item[Any]] = []
    violations: list[FieldViolation] = []
    seen: set[str] = set()
    for index, message in enumerate(request.items):
        found = find_violations(message, seen, limits)
        seen.add(message.id)
        images, wrong_images = read_images(message, limits.images)
        found += wrong_images
        parameters = read_parameters(message)
        if parameters is not None:
            item = Item(message.id, message.response, message.answer_marker, parameters, message.prompt, images)
            found += scorer.verifier_of(parameters).find_violations(parameters)
            items.append(item)
        violations += [FieldViolation(f"items[{index}].{v.field}", v.description) for v in found]
        if len(violations) >= MAX_VIOLATIONS:
            break
    raise_first(violations[:MAX_VIOLATIONS])
    return items


def find_violations(message: pb.ScoreItem, seen: set[str], limits: ItemLimits) -> list[FieldViolation]:
    """What is wrong with an item, its images and its verifier's parameters aside."""
    violations = []
    if not message.id:
        violations.append(FieldViolation("id", "is required: outcomes are told apart by it"))
    elif message.id in seen:
        violations.append(FieldViolation("id", f"{message.id!r} is used twice in this call"))
    for name, text, most in (
        ("response", message.response, limits.response_bytes),
        ("prompt", message.prompt, limits.prompt_bytes),
    ):
        size = len(text.encode())
        if size > most:
            violations.append(FieldViolation(name, f"has {size} bytes, more than {most}"))
    verifier = message.WhichOneof("verifier")
    if verifier is None:
        violations.append(FieldViolation("verifier", f"is required: one of {', '.join(READERS)}"))
    elif verifier not in READERS:
        violations.append(FieldViolation("verifier", f"{verifier} is not offered: one of {', '.join(READERS)}"))
    return violations


def raise_first(violations: Sequence[FieldViolation]) -> None:
    """Raises InvalidArgumentError when there are violations."""
    if violations:
        first = violations[0]
        raise InvalidArgumentError(f"{first.field}: {first.description}", violations=violations)
