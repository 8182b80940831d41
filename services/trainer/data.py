"""Training data: trajectories from the buffer, and prompt-response examples from a file."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from perigee.buffer.client import BufferClient, StoredTrajectory
from perigee.buffer.packing import choice_bytes
from perigee.errors import DataLossError, FailedPreconditionError, InvalidArgumentError
from perigee.image_sources import ImageReader
from perigee.images import Image, ImageLimits, decode_image, read_image
from perigee.trainer.v1 import trainer_pb2 as pb
from services.kit.chat import encode_examples, open_encoder
from services.kit.hf import ModelFolder
from services.kit.storage import local_file, read_file
from services.kit.vision import VisionModel
from services.trainer.hf import ModelShape
from services.trainer.packing import PlacedImage, TokenSequence

# A run's own limits hold where images enter it; these keep a small file of endless pixels out of memory.
LIMITS = ImageLimits(max_bytes=sys.maxsize, max_pixels=1 << 28)


@dataclass(frozen=True)
class Trajectory:
    """A prompt and T response tokens, each with the rollout's log-probability and its policy version."""

    prompt_tokens: npt.NDArray[np.int64]
    """Those of its images included."""
    tokens_T: npt.NDArray[np.int64]
    rollout_logprobs_T: npt.NDArray[np.float32]
    versions_T: npt.NDArray[np.int64]
    experts: bytes = b""
    """Packed expert choices of the rollout, for each response token; empty where none are recorded."""
    images: tuple[PlacedImage, ...] = ()
    """Those of the prompt, in order."""


async def read_trajectories(
    buffer: BufferClient,
    run_id: str,
    trajectory_ids: Sequence[str],
    timeout_s: float,
    vision: VisionModel | None,
    tokens: int = 0,
) -> dict[str, Trajectory]:
    """Reads whole trajectories and their images by id, of so many tokens together; `timeout_s` bounds each call of the
    buffer, together with what the tokens add.

    Raises FailedPreconditionError for one that has not ended, DataLossError for one whose pieces do not fit together,
    InvalidArgumentError for images of a model that takes none.
    """
    stored = [
        each
        async for each in buffer.read_trajectories(
            run_id, trajectory_ids, with_logprobs=True, with_experts=True, timeout_s=timeout_s, tokens=tokens
        )
    ]
    digests = list(dict.fromkeys(digest for each in stored for digest in each.image_digests))
    images = {
        digest: await asyncio.to_thread(read_image, data, LIMITS, f"image {digest}")
        async for digest, data in buffer.read_images(run_id, digests, timeout_s=timeout_s)
    }
    return {each.trajectory_id: unpack_trajectory(each, images, vision) for each in stored}


def unpack_trajectory(
    stored: StoredTrajectory, images: Mapping[str, Image] = MappingProxyType({}), vision: VisionModel | None = None
) -> Trajectory:
    """Returns a finished trajectory as arrays; raises FailedPreconditionError for one that has not ended."""
    if not stored.finished:
        raise FailedPreconditionError(
            f"trajectory {stored.trajectory_id} has not ended; only complete groups are trained"
        )
    prompt_ids = np.frombuffer(stored.prompt_token_ids, dtype="<u4")
    prompt_tokens, placed = place_images(prompt_ids, [images[digest] for digest in stored.image_digests], vision)
    return Trajectory(
        prompt_tokens=prompt_tokens,
        tokens_T=np.frombuffer(stored.token_ids, dtype="<u4").astype(np.int64),
        rollout_logprobs_T=np.frombuffer(stored.logprobs, dtype="<f4"),
        versions_T=np.repeat(
            np.array([span.policy_version for span in stored.versions], dtype=np.int64),
            np.array([span.tokens for span in stored.versions], dtype=np.int64),
        ),
        experts=stored.experts,
        images=placed,
    )


def place_images(
    prompt_ids: Sequence[int] | npt.NDArray[np.uint32], images: Sequence[Image], vision: VisionModel | None
) -> tuple[npt.NDArray[np.int64], tuple[PlacedImage, ...]]:
    """Returns a prompt with the tokens of its images for their placeholders, and where each image is.

    Raises InvalidArgumentError for images of a model that takes none, or for another number of placeholders.
    """
    if vision is None:
        if images:
            raise InvalidArgumentError.for_field("image_digests", "the model of the trainer takes no images")
        return np.asarray(prompt_ids, np.int64), ()
    sizes = [(image.width, image.height) for image in images]
    tokens = np.array(vision.expand(np.asarray(prompt_ids).tolist(), sizes), np.int64)
    ends = np.cumsum([vision.count_tokens(size) for size in sizes])
    parts = np.split(np.array(vision.image_positions(tokens.tolist()), np.int64), ends[:-1]) if images else []
    placed = [
        PlacedImage(image, tokens_F, vision.grid(size))
        for image, tokens_F, size in zip(images, parts, sizes, strict=True)
    ]
    return tokens, tuple(placed)


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
    that it has in a rollout, and a stop token ends each response. Images are data URLs, or files beside this one.
    Raises InvalidArgumentError naming file and line for malformed or overlong examples.
    """
    path, encoder = local_file(name, "dataset_path"), open_encoder(model, chat)
    reader = ImageReader(base=name.rpartition("/")[0], limits=LIMITS, read_storage=read_file)
    images: dict[str, Image] = {}

    def read(value: object, field: str) -> Image:
        image = reader.load(value, field)
        if image.digest not in images:
            # Damage is found now, and not in the middle of a step.
            decode_image(image, field)
            images[image.digest] = image
        return images[image.digest]

    examples = []
    for each in encode_examples(path, "dataset_path", encoder, max_tokens, algorithm=algorithm, read_image=read):
        tokens, placed = place_images(each.prompt, [images[info.digest] for info in each.images], encoder.vision)
        examples.append(tuple(_join_example(tokens, placed, response) for response in each.responses))
    return examples


def _join_example(
    prompt: npt.NDArray[np.int64], images: tuple[PlacedImage, ...], response: Sequence[int]
) -> TokenSequence:
    tokens = np.concatenate([prompt, np.array(response, np.int64)])
    return TokenSequence(tokens, np.arange(1, len(tokens)) >= len(prompt), images=images)
