"""A rollout worker on the real engine with prompts that have images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import pytest_asyncio

from perigee.buffer.packing import pack_token_ids, unpack_logprobs, unpack_token_ids
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2 as pb
from services.kit.hf import open_model_folder
from services.kit.server import App
from services.kit.vision import VisionModel, open_vision
from services.rollout.config import RolloutConfig
from tests.fixtures.rollout import Pusher, Response
from tests.fixtures.vision_rollout import VisionPolicy, named_pictures

IMAGE = 5
PROMPT = [IMAGE, *range(7, 20)]
# Log-probabilities of the engine against an fp32 forward pass of transformers on the same tokens.
TOLERANCE = 1e-3
_versions = itertools.count(1)


@pytest.fixture(scope="module")
def policy(vision_model: Any) -> VisionPolicy:
    """A policy of its own weights."""
    return VisionPolicy(vision_model, seed=7)


@pytest.fixture(scope="module")
def vision(vision_model: Any) -> VisionModel:
    """How the model takes images."""
    found = open_vision(open_model_folder(vision_model, "model"))
    assert found is not None
    return found


@pytest_asyncio.fixture(loop_scope="session")
async def client(
    vision_app: App[RolloutConfig], vision_client: RolloutClient, pusher: Pusher, policy: VisionPolicy
) -> RolloutClient:
    """A client of the worker, which has got the policy."""
    assert await pusher.push(policy.tensors, next(_versions), vision_app.address) == ""
    return vision_client


async def generate(
    client: RolloutClient, prompts: Sequence[tuple[Sequence[int], Sequence[str]]], **fields: Any
) -> list[Response]:
    """The whole answer to each prompt and its images, in order; 24 tokens at temperature 1 unless told otherwise."""
    items = [
        pb.GenerateItem(id=str(i), prompt_token_ids=pack_token_ids(prompt), max_tokens=24, image_digests=digests)
        for i, (prompt, digests) in enumerate(prompts)
    ]
    request = pb.GenerateRequest(items=items, **({"sampling": pb.Sampling(temperature=1)} | fields))
    whole = {item.id: Response() for item in items}
    async for response in client.generate(request, timeout_s=60):
        answer = whole[response.id]
        answer.token_ids += unpack_token_ids(response.token_ids)
        answer.logprobs += unpack_logprobs(response.logprobs)
        answer.end_reason = response.end_reason
    return list(whole.values())


async def test_logprobs_on_image_prompts_are_transformers(
    client: RolloutClient, policy: VisionPolicy, vision: VisionModel
) -> None:
    pictures = named_pictures(1, 2, 3)
    await client.put_images(pictures)
    first, second, third = pictures
    prompts = [(PROMPT, [first]), (PROMPT, [second]), ([9, IMAGE, 8, IMAGE, 7, *range(20, 30)], [third, first])]
    prompts += [(PROMPT[1:], [])]
    for (prompt, digests), answer in zip(prompts, await generate(client, prompts), strict=True):
        expanded = vision.expand(prompt, [(28, 28)] * len(digests))
        images = [pictures[digest] for digest in digests]
        expected = policy.logprobs(expanded, answer.token_ids, images)
        assert answer.logprobs == pytest.approx(expected, abs=TOLERANCE)
