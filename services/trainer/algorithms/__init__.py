"""Registries of the algorithms. A new one is a file beside `mirror_descent.py` and a line in `ALGORITHMS`; one of
supervised stages has its line in `SUPERVISED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from google.protobuf import json_format

from perigee.config import validate
from perigee.errors import InvalidArgumentError
from perigee.trainer.v1 import trainer_pb2 as pb
from services.trainer.algorithms.base import Algorithm, SupervisedAlgorithm
from services.trainer.algorithms.dpo import DPO
from services.trainer.algorithms.grpo import GRPO
from services.trainer.algorithms.mirror_descent import PolicyMirrorDescent
from services.trainer.algorithms.rest import ReST
from services.trainer.algorithms.sft import SFT

AlgorithmT = TypeVar("AlgorithmT", Algorithm, SupervisedAlgorithm)

ALGORITHMS: dict[str, type[Algorithm]] = {
    "policy_mirror_descent": PolicyMirrorDescent,
    "rest": ReST,
    "grpo": GRPO,
}
SUPERVISED: dict[str, type[SupervisedAlgorithm]] = {
    "sft": SFT,
    "dpo": DPO,
}


def make_algorithm(message: pb.Algorithm) -> Algorithm:
    """Builds the algorithm that the message names, with its settings.

    Raises InvalidArgumentError that names each setting that is unknown or out of range.
    """
    return _make(ALGORITHMS, message.name, message)


def make_supervised(message: pb.Algorithm) -> SupervisedAlgorithm:
    """Builds the algorithm of a supervised stage, sft where none is named; raises as `make_algorithm` does."""
    return _make(SUPERVISED, message.name or "sft", message)


def _make(registry: Mapping[str, type[AlgorithmT]], name: str, message: pb.Algorithm) -> AlgorithmT:
    if name not in registry:
        raise InvalidArgumentError.for_field("algorithm.name", f"{name!r} is not one of {sorted(registry)}")
    algorithm = registry[name]
    settings = json_format.MessageToDict(message.settings)
    return algorithm(validate(algorithm.Settings, settings, name, "algorithm.settings"))
