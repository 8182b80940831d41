"""Training data: trajectories from the buffer, and prompt-response examples from a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from perigee.buffer.client import BufferClient, StoredTrajectory
from perigee.buffer.packing import choice_bytes
from perigee.errors import DataLossError, FailedPreconditionError
from perigee.trainer.v1 import trainer_pb2 as pb
from services.kit.chat import encode_examples, open_encoder
from services.kit.hf import ModelFolder
from services.kit.storage import local_file
from services.trainer.hf import ModelShape
from services.trainer.packing import TokenSequence


@dataclass(frozen=True)
class Trajectory:
    """A prompt and T response tokens, each with the rollout's log-probability and its policy version."""

    prompt_tokens: npt.NDArray[np.int64]
    tokens_T: npt.NDArray[np.int64]
    rollout_logprobs_T: npt.NDArray[np.float32]
    versions_T: npt.NDArray[np.int64]
    experts: bytes = b""
    """Packed expert choices of the rollout, for each response token; empty where none are recorded."""


async def read_trajectories(
    buffer: BufferClient, run_id: str, trajectory_ids: Sequence[str], timeout_s: float
) -> dict[str, Trajectory]:
    """Reads whole trajectories by id; `timeout_s` bounds each call of the buffer.

    Raises FailedPreconditionError for one that has not ended, DataLossError for one whose pieces do not fit together.
    """
    stored = buffer.read_trajectories(
        run_id, trajectory_ids, with_logprobs=True, with_experts=True, timeout_s=timeout_s
    )
    return {each.trajectory_id: unpack_trajectory(each) async for each in stored}


def unpack_trajectory(stored: StoredTrajectory) -> Trajectory:
    """Returns a finished trajectory as arrays; raises FailedPreconditionError for one that has not ended."""
    if not stored.finished:
        raise FailedPreconditionError(
            f"trajectory {stored.trajectory_id} has not ended; only complete groups are trained"
        )
    return Trajectory(
        prompt_tokens=np.frombuffer(stored.prompt_token_ids, dtype="<u4").astype(np.int64),
        tokens_T=np.frombuffer(stored.token_ids, dtype="<u4").astype(np.int64),
        rollout_logprobs_T=np.frombuffer(stored.logprobs, dtype="<f4"),
        versions_T=np.repeat(
            np.array([span.policy_version for span in stored.versions], dtype=np.int64),
            np.array([span.tokens for span in stored.versions], dtype=np.int64),
        ),
        experts=stored.experts,
    )


def unpack_experts(trajectory: Trajectory, shape: ModelShape) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Returns the experts that the rollout chose for each response token, [T, layers, experts per token].

    Raises DataLossError when they are not those of a model of this shape.
    """
    wanted = (len(trajectory.tokens_T), shape.layers, shape.experts_per_token)
    width, packed = choice_bytes(shape.experts), trajectory.experts
    fits = len(packed) == width * math.prod(wanted)
    if not fits or (choices := np.frombuffer(packed, f"<u{width}")).max() >= shape.experts:
        raise DataLossError(
            f"the expert choices of a trajectory are not of {shape.layers} layers with {shape.experts} experts, of "
            f"which a token passes {shape.experts_per_token}: rollout workers and trainer have other models"
        )
    return choices.reshape(wanted)


def read_examples(
    name: str, model: ModelFolder, chat: pb.ChatSettings, max_tokens: int, algorithm: str = "sft"
) -> list[tuple[TokenSequence, ...]]:
    """Returns the examples of a JSON Lines file, by the tokenizer of `model`; `name` is a path or a URL.

    An example is a sequence, or one for each of the responses that `algorithm` learns from. A prompt has the tokens
    that it has in a rollout, and a stop token ends each response. Raises InvalidArgumentError naming file and line for
    malformed or overlong examples.
    """
    path, encoder = local_file(name, "dataset_path"), open_encoder(model, chat)
    found = encode_examples(path, "dataset_path", encoder, max_tokens, algorithm=algorithm)
    return [tuple(_join_example(each.prompt, response) for response in each.responses) for each in found]


def _join_example(prompt: list[int], response: list[int]) -> TokenSequence:
    tokens = np.array([*prompt, *response], dtype=np.int64)
    return TokenSequence(tokens, np.arange(1, len(tokens)) >= len(prompt))
