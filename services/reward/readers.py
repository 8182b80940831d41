"""Verifiers' parameters from protobuf, by the name of the oneof's member; a new verifier adds its line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from perigee.reward.v1 import reward_pb2 as pb
from services.reward.verifiers.base import Parameters
from services.reward.verifiers.choice import ChoiceParameters
from services.reward.verifiers.code import CodeParameters
from services.reward.verifiers.composite import CompositeParameters, CompositePart
from services.reward.verifiers.exact import ExactParameters
from services.reward.verifiers.json import JsonParameters
from services.reward.verifiers.judge import JudgeParameters
from services.reward.verifiers.math import MathParameters
from services.reward.verifiers.regex import RegexParameters
from services.reward.verifiers.short_answer import ShortAnswerParameters
from services.reward.verifiers.value_head import ValueHeadParameters


def read_code(message: pb.CodeVerifier) -> CodeParameters:
    """Messages of the sandbox stay serialized."""
    return CodeParameters(
        language=message.language,
        function_name=message.function_name,
        tests=tuple(serialize(test) for test in message.tests),
        partial_credit=message.partial_credit,
        limits=serialize(message.limits) if message.HasField("limits") else b"",
        checker=serialize(message.checker) if message.HasField("checker") else b"",
        interactor=serialize(message.interactor) if message.HasField("interactor") else b"",
        setup_code=message.setup_code,
        files=tuple(serialize(file) for file in message.files),
    )


def serialize(message: Message) -> bytes:
    """The same bytes for the same message."""
    return message.SerializeToString(deterministic=True)


def read_composite(message: pb.CompositeVerifier) -> CompositeParameters:
    """Parts whose verifier is not offered have no parameters."""
    return CompositeParameters(
        tuple(
            CompositePart(part.name, read_parameters(part.verifier), part.weight, part.gate) for part in message.parts
        )
    )


READERS: dict[str, Callable[[Any], Parameters]] = {
    "math": lambda m: MathParameters(m.reference, tuple(m.alternatives)),
    "code": read_code,
    "choice": lambda m: ChoiceParameters(m.reference, tuple(m.options)),
    "short_answer": lambda m: ShortAnswerParameters(tuple(m.references)),
    "exact": lambda m: ExactParameters(m.reference),
    "regex": lambda m: RegexParameters(m.pattern, m.ignore_case, m.search_response),
    "json": lambda m: JsonParameters(m.schema_json, m.expected_json if m.HasField("expected_json") else None),
    "judge": lambda m: JudgeParameters(m.reference, m.judge, m.votes if m.HasField("votes") else None, m.rubric),
    "value_head": lambda m: ValueHeadParameters(m.reference, m.threshold if m.HasField("threshold") else None),
    "composite": read_composite,
}


def read_parameters(message: pb.ScoreItem | pb.VerifierSpec) -> Parameters | None:
    """The parameters of the verifier that the message names; None when it names none that is offered."""
    group = "verifier" if isinstance(message, pb.ScoreItem) else "kind"
    name = message.WhichOneof(group)  # type: ignore[arg-type]
    if name is None or name not in READERS:
        return None
    return READERS[name](getattr(message, name))
