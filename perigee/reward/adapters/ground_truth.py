"""Items from what other pipelines know of a response: a prompt, the response, and a ground truth of some form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perigee.errors import InvalidArgumentError
from perigee.reward.items import VERIFIERS, read_item
from perigee.reward.v1 import reward_pb2 as pb


@dataclass(frozen=True)
class GroundTruthOptions:
    """How a ground truth that is one value is judged."""

    verifier: str = "math"
    """The verifier that compares with it."""
    answer_marker: str = ""
    """What follows its last occurrence is the answer; empty: the verifier's own extraction."""


def make_item(item_id: str, prompt: str, response: str, ground_truth: Any, options: GroundTruthOptions) -> pb.ScoreItem:
    """The item of a response.

    A ground truth is a value to compare with, a list of values that are as good, or all fields of an item's verifier:
    {"math": {"reference": "4"}} or {"verifier": "code", "language": "python", "tests": [...]}, as a mapping or as its
    JSON text; such fields may also name another `answer_marker`.

    Raises InvalidArgumentError naming the field.
    """
    item = {"answer_marker": options.answer_marker, **read_ground_truth(ground_truth, options.verifier)}
    return read_item(item | {"id": item_id, "prompt": prompt, "response": response}, item_id)


def read_ground_truth(ground_truth: Any, verifier: str) -> dict[str, Any]:
    """The fields of an item's verifier."""
    if hasattr(ground_truth, "tolist"):  # columns of data frames come as arrays
        ground_truth = ground_truth.tolist()
    if (fields := _as_fields(ground_truth)) is not None:
        return fields
    values = list(ground_truth) if isinstance(ground_truth, list | tuple) else [ground_truth]
    if not values or any(value is None or isinstance(value, Mapping | list) for value in values):
        raise InvalidArgumentError.of("ground_truth", f"is neither a value nor a verifier's fields: {ground_truth!r}")
    return {"verifier": verifier, **_references([str(value) for value in values], verifier)}


def _references(values: list[str], verifier: str) -> dict[str, Any]:
    if verifier not in VERIFIERS:
        raise InvalidArgumentError.of("verifier", f"must be one of {', '.join(VERIFIERS)}, got {verifier!r}")
    message_type = pb.ScoreItem.DESCRIPTOR.fields_by_name[verifier].message_type
    assert message_type is not None
    fields = message_type.fields_by_name
    if "references" in fields:
        return {"references": values}
    if "reference" in fields and len(values) == 1:
        return {"reference": values[0]}
    if "alternatives" in fields:
        return {"reference": values[0], "alternatives": values[1:]}
    known = ", ".join(fields)
    raise InvalidArgumentError.of(
        "ground_truth", f"must be an object with the fields of the {verifier} verifier ({known}), got {values!r}"
    )


def _as_fields(ground_truth: Any) -> dict[str, Any] | None:
    if isinstance(ground_truth, str) and ground_truth.lstrip().startswith("{"):
        try:
            ground_truth = json.loads(ground_truth)
        except ValueError:
            return None
    if not isinstance(ground_truth, Mapping):
        return None
    if "verifier" in ground_truth:
        return dict(ground_truth)
    if len(ground_truth) == 1 and next(iter(ground_truth)) in VERIFIERS:
        return {"verifier": dict(ground_truth)}
    return None
