"""Checks score requests and turns them into items; a new verifier adds its parameters here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.scoring import Scorer
from services.reward.verifiers.base import Item, Parameters
from services.reward.verifiers.code import CodeParameters
from services.reward.verifiers.math import MathParameters

# More would not fit into an error's trailing metadata.
MAX_VIOLATIONS = 20


def read_items(request: pb.ScoreRequest, scorer: Scorer, max_response_bytes: int) -> list[Item[Any]]:
    """The request's items.

    Raises InvalidArgumentError with a violation for each wrong field, the first 20 of them.
    """
    items: list[Item[Any]] = []
    violations: list[FieldViolation] = []
    seen: set[str] = set()
    for index, message in enumerate(request.items):
        found = find_violations(message, seen, max_response_bytes)
        seen.add(message.id)
        parameters = read_parameters(message)
        if parameters is not None:
            item = Item(message.id, message.response, message.answer_marker, parameters)
            found += scorer.verifier_of(item).find_violations(parameters)
            items.append(item)
        violations += [FieldViolation(f"items[{index}].{v.field}", v.description) for v in found]
        if len(violations) >= MAX_VIOLATIONS:
            break
    raise_first(violations[:MAX_VIOLATIONS])
    return items


def find_violations(message: pb.ScoreItem, seen: set[str], max_response_bytes: int) -> list[FieldViolation]:
    """What is wrong with an item, its verifier's parameters aside."""
    violations = []
    if not message.id:
        violations.append(FieldViolation("id", "is required: outcomes are told apart by it"))
    elif message.id in seen:
        violations.append(FieldViolation("id", f"{message.id!r} is used twice in this call"))
    size = len(message.response.encode())
    if size > max_response_bytes:
        violations.append(FieldViolation("response", f"has {size} bytes, more than {max_response_bytes}"))
    if message.WhichOneof("verifier") is None:
        violations.append(FieldViolation("verifier", "is required: math or code"))
    return violations


def read_parameters(message: pb.ScoreItem) -> Parameters | None:
    """The parameters of the item's verifier; None when it names none."""
    match message.WhichOneof("verifier"):
        case "math":
            return MathParameters(message.math.reference)
        case "code":
            code = message.code
            return CodeParameters(
                language=code.language,
                function_name=code.function_name,
                tests=tuple(test.SerializeToString(deterministic=True) for test in code.tests),
                partial_credit=code.partial_credit,
                limits=code.limits.SerializeToString(deterministic=True) if code.HasField("limits") else b"",
            )
    return None


def raise_first(violations: Sequence[FieldViolation]) -> None:
    """Raises InvalidArgumentError when there are violations."""
    if violations:
        first = violations[0]
        raise InvalidArgumentError(f"{first.field}: {first.description}", violations=violations)
