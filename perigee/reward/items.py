"""Items to score from JSON objects, as files, data sets and other pipelines hold them.

    {"response": "... #4", "answer_marker": "#", "verifier": {"math": {"reference": "4"}}}
    {"response": "... #4", "answer_marker": "#", "verifier": "math", "reference": "4"}

The first form holds a verifier's message in full, as it stands over HTTP. The second has the message's fields beside
the verifier's name; a line of a recipe's prompt file with a `response` is one, so `answer` stands for the reference,
`function` for the function's name, and tests, JSON values and the parts of a composite are as short as there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.json_codec import fill_message, unknown_key
from perigee.json_scalars import name_type
from perigee.reward.v1 import reward_pb2 as pb

VERIFIERS = tuple(field.name for field in pb.ScoreItem.DESCRIPTOR.oneofs_by_name["verifier"].fields)
PART_VERIFIERS = tuple(field.name for field in pb.VerifierSpec.DESCRIPTOR.oneofs_by_name["kind"].fields)
PLAIN_FIELDS = ("id", "prompt", "response", "answer_marker", "images")
FIELDS = (*PLAIN_FIELDS, "verifier")
# Names of a recipe's prompt file.
ALIASES = {"function": "function_name", "answers": "references"}
# What stands there as a JSON value and in the message as its text.
JSON_TEXTS = {"json_schema": "schema_json", "expected": "expected_json"}
_STDIO = frozenset({"stdin", "expected_stdout"})
_FUNCTION = frozenset({"arguments", "expected"})


def read_item(values: Mapping[str, Any], default_id: str, ignored: Collection[str] = ()) -> pb.ScoreItem:
    """The item of a JSON object; keys in `ignored` are the caller's own.

    Raises InvalidArgumentError with a violation for each field that is wrong.
    """
    item = pb.ScoreItem(id=default_id)
    plain = {name: values[name] for name in PLAIN_FIELDS if name in values}
    if isinstance(images := plain.get("images"), list):
        plain["images"] = [{"url": image} if isinstance(image, str) else image for image in images]
    violations = fill_message(item, plain)
    if values.get("response") is None:
        violations.append(FieldViolation("response", "is required"))
    rest = {key: value for key, value in values.items() if key not in FIELDS and key not in ignored}
    violations += fill_verifier(item, values.get("verifier"), rest)
    if violations:
        first = violations[0]
        raise InvalidArgumentError(f"{first.field}: {first.description}", violations=violations)
    return item


def fill_verifier(item: pb.ScoreItem, verifier: object, fields: Mapping[str, Any]) -> list[FieldViolation]:
    """Sets the item's verifier from either form; `fields` are those beside its name. What is wrong, field by field."""
    if verifier is None:
        return [FieldViolation("verifier", f"is required: one of {', '.join(VERIFIERS)}")]
    if isinstance(verifier, str):
        if verifier not in VERIFIERS:
            return [FieldViolation("verifier", f"must be one of {', '.join(VERIFIERS)}, got {verifier!r}")]
        message = getattr(item, verifier)
        message.SetInParent()
        return fill_message(message, spell_out(verifier, fields))
    if not isinstance(verifier, Mapping):
        return [FieldViolation("verifier", f"must be a name or an object with one key, got {name_type(verifier)}")]
    if len(verifier) != 1:
        return [FieldViolation("verifier", f"must be a name or an object with one key, got {len(verifier)} keys")]
    [(name, parameters)] = verifier.items()
    if name not in VERIFIERS:
        return [FieldViolation(f"verifier.{name}", f"is no verifier; they are {', '.join(VERIFIERS)}")]
    message = getattr(item, name)
    message.SetInParent()
    violations = [FieldViolation(key, unknown_key(key, FIELDS)) for key in fields]
    return violations + fill_message(message, parameters, f"verifier.{name}")


def spell_out(verifier: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields beside a verifier's name, with the names and values that its message has."""
    message_type = pb.ScoreItem.DESCRIPTOR.fields_by_name[verifier].message_type
    assert message_type is not None
    known = message_type.fields_by_name
    spelled: dict[str, Any] = {"language": "python"} if verifier == "code" else {}
    for key, value in fields.items():
        name = ALIASES.get(key, key)
        if key == "answer" and key not in known:
            name = "reference" if "reference" in known else "references"
            value = value if name == "reference" else [value]
        if verifier == "json" and key in JSON_TEXTS:
            # A schema of null is none, while null may well be what is expected.
            name, value = JSON_TEXTS[key], None if key == "json_schema" and value is None else json.dumps(value)
        if verifier == "code" and key == "tests" and isinstance(value, list):
            value = [_spell_out_test(test) for test in value]
        if verifier == "composite" and key == "parts" and isinstance(value, list):
            value = [_spell_out_part(part) for part in value]
        spelled[name] = value
    return spelled


def _spell_out_test(test: Any) -> Any:
    if not isinstance(test, Mapping):
        return test
    if test.keys() == _STDIO:
        return {"stdio": dict(test)}
    if test.keys() == _FUNCTION:
        arguments, expected = json.dumps(test["arguments"]), json.dumps(test["expected"])
        return {"function": {"arguments_json": arguments, "expected_json": expected}}
    if test.keys() == {"code"} and isinstance(test["code"], str):
        return {"code": dict(test)}
    return test


def _spell_out_part(part: Any) -> Any:
    if not isinstance(part, Mapping) or not isinstance(part.get("judged_by"), Mapping):
        return part
    fields = dict(part["judged_by"])
    name = fields.pop("verifier", None)
    if name not in PART_VERIFIERS:
        return part
    rest = {key: value for key, value in part.items() if key != "judged_by"}
    return {"weight": 1.0, **rest, "verifier": {name: spell_out(name, fields)}}
