"""Registry of the algorithms. A new one is a file beside `mirror_descent.py` and a line in `ALGORITHMS`."""

from __future__ import annotations

from google.protobuf import json_format

from perigee.config import validate
from perigee.errors import InvalidArgumentError
from perigee.trainer.v1 import trainer_pb2 as pb
from services.trainer.algorithms.base import Algorithm
from services.trainer.algorithms.grpo import GRPO
from services.trainer.algorithms.mirror_descent import PolicyMirrorDescent
from services.trainer.algorithms.rest import ReST

ALGORITHMS: dict[str, type[Algorithm]] = {
    "policy_mirror_descent": PolicyMirrorDescent,
    "rest": ReST,
    "grpo": GRPO,
}


def make_algorithm(message: pb.Algorithm) -> Algorithm:
    """Builds the algorithm that the message names, with its settings.

    Raises InvalidArgumentError that names each setting that is unknown or out of range.
    """
    if message.name not in ALGORITHMS:
        raise InvalidArgumentError.for_field("algorithm.name", f"{message.name!r} is not one of {sorted(ALGORITHMS)}")
    algorithm = ALGORITHMS[message.name]
    settings = json_format.MessageToDict(message.settings)
    return algorithm(validate(algorithm.Settings, settings, message.name, "algorithm.settings"))
