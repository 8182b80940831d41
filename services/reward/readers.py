"""Verifiers' parameters from protobuf, by the name of the oneof's member; a new verifier adds its line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from perigee.reward.v1 import reward_pb2 as pb
from services.reward.verifiers.base import Parameters
from services.reward.verifiers.code import CodeParameters
from services.reward.verifiers.math import MathParameters


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


READERS: dict[str, Callable[[Any], Parameters]] = {
    "math": lambda m: MathParameters(m.reference, tuple(m.alternatives)),
    "code": read_code,
}


def read_parameters(message: pb.ScoreItem | pb.VerifierSpec) -> Parameters | None:
    """The parameters of the verifier that the message names; None when it names none that is offered."""
    group = "verifier" if isinstance(message, pb.ScoreItem) else "kind"
    name = message.WhichOneof(group)  # type: ignore[arg-type]
    if name is None or name not in READERS:
        return None
    return READERS[name](getattr(message, name))
