"""A rollout worker on the real engine with prompts that have images."""

from __future__ import annotations

import base64
import itertools
import os
from collections.abc import Sequence
from typing import Any

import openai
import pytest
import pytest_asyncio
import torch

from perigee.buffer.client import BufferClient
from perigee.buffer.images import digest_of
from perigee.buffer.packing import pack_logprobs, pack_token_ids, unpack_logprobs, unpack_token_ids
from perigee.buffer.v1 import buffer_pb2
from perigee.errors import FailedPreconditionError, InternalError, InvalidArgumentError
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2 as pb
from services.kit.hf import open_model_folder
from services.kit.server import App, serving
from services.kit.vision import Idefics3, VisionModel, open_vision
from services.rollout.config import RolloutConfig
from services.rollout.service import lifespan
from tests.fixtures.rollout import NewTrajectories, Pusher, Response, rollout_config, wait_for_status
from tests.fixtures.vision_rollout import VisionPolicy, named_pictures

IMAGE = 5
PROMPT = [IMAGE, *range(7, 20)]
# Longer than a block of the prefix cache, whose first one has all of the image.
LONG_PROMPT = [IMAGE, *(7 + 5 * n % 40 for n in range(60))]
RUN = "run-v"
# A trajectory is never sampled greedily: the nearest is this, of a policy whose logits are far apart.
COLD = pb.Sampling(temperature=0.01)
GREEDY = pb.Sampling(temperature=0)
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
    assert await pusher.push(policy.tensors, next(_versions), vision_app.address, RUN) == ""
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


@pytest_asyncio.fixture(loop_scope="session")
async def trajectories(client: RolloutClient, buffer_client: BufferClient) -> NewTrajectories:
    """Trajectories of a run of their own, whose weights the worker holds: the policy's."""
    return NewTrajectories(buffer_client, client, RUN)


async def extend(trajectories: NewTrajectories, ids: Sequence[str], **fields: Any) -> list[pb.SegmentEnd]:
    """The segments that trajectories gain, with the version that the worker holds, all but greedy."""
    state = await trajectories.rollout.get_state(pb.GetStateRequest())
    defaults: dict[str, Any] = {"policy_version": state.policy_version, "sampling": COLD, "max_response_tokens": 48}
    ended, failed = await trajectories.extend(ids, **(defaults | fields))
    assert failed == {}
    return [ended[trajectory_id] for trajectory_id in ids]


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


async def test_a_commit_of_the_tower_alone_reaches_every_answer(
    client: RolloutClient, pusher: Pusher, vision_app: App[RolloutConfig], policy: VisionPolicy, vision: VisionModel
) -> None:
    """Neither features nor prefixes of the old tower are left: answers are those of a model that never had it."""
    pictures = named_pictures(1)
    await client.put_images(pictures)
    [digest], [picture] = pictures, pictures.values()
    expanded = vision.expand(LONG_PROMPT, [(28, 28)])
    [before] = await generate(client, [(LONG_PROMPT, [digest])], sampling=GREEDY)
    other = VisionPolicy(policy.folder, seed=7)
    other.change("vision_model", lambda tensor: -tensor if tensor.ndim > 1 else tensor)
    assert await pusher.push(other.tensors, next(_versions), vision_app.address, RUN) == ""
    [after] = await generate(client, [(LONG_PROMPT, [digest])], sampling=GREEDY)
    expected = other.logprobs(expanded, after.token_ids, [picture])
    assert after.logprobs == pytest.approx(expected, abs=TOLERANCE)
    old = policy.logprobs(expanded, after.token_ids, [picture])
    assert max(abs(a - b) for a, b in zip(old, after.logprobs, strict=True)) > 20 * TOLERANCE
    assert await pusher.push(policy.tensors, next(_versions), vision_app.address, RUN) == ""
    [again] = await generate(client, [(LONG_PROMPT, [digest])], sampling=GREEDY)
    assert again.token_ids == before.token_ids


def sharpen(policy: VisionPolicy) -> dict[str, torch.Tensor]:
    """The policy's tensors with logits 64 times as large, of which COLD takes the best."""
    norm = "model.text_model.norm.weight"
    return policy.tensors | {norm: 64 * policy.tensors[norm]}


@pytest_asyncio.fixture(loop_scope="session")
async def sharp(
    trajectories: NewTrajectories, pusher: Pusher, vision_app: App[RolloutConfig], policy: VisionPolicy
) -> Any:
    """A function that pushes the sharpened policy."""

    async def push() -> None:
        assert await pusher.push(sharpen(policy), next(_versions), vision_app.address, RUN) == ""

    await push()
    return push


async def test_a_trajectory_goes_on_as_if_nothing_had_come_between(trajectories: NewTrajectories, sharp: Any) -> None:
    """Another lease, and an engine whose caches are as empty as another worker's; the image comes from the buffer."""
    pictures = named_pictures(4)
    whole, parted = await trajectories.create([LONG_PROMPT], k=2, images=pictures)
    await extend(trajectories, [whole], token_budget=32)
    await extend(trajectories, [parted], token_budget=11)
    await sharp()
    [end] = await extend(trajectories, [parted], token_budget=21)
    assert end.cached_tokens == 0
    held, resumed = await trajectories.read(whole), await trajectories.read(parted)
    assert resumed.token_ids == held.token_ids
    assert resumed.logprobs == pytest.approx(held.logprobs, abs=TOLERANCE)


@pytest.mark.skipif("PERIGEE_TEST_LONG" not in os.environ, reason="takes minutes: make test-long")
async def test_another_worker_goes_on_token_for_token(
    trajectories: NewTrajectories,
    buffer_client: BufferClient,
    buffer_address: str,
    pusher: Pusher,
    policy: VisionPolicy,
    sharp: Any,
) -> None:
    """A second engine takes over a trajectory, and reads its image from the buffer."""
    whole, parted = await trajectories.create([LONG_PROMPT], k=2, images=named_pictures(8))
    await extend(trajectories, [whole], token_budget=32)
    await extend(trajectories, [parted], token_budget=11)
    async with (
        serving(rollout_config(policy.folder, buffer_address), lifespan) as app,
        RolloutClient.connect(app.address) as other,
    ):
        await wait_for_status(other, pb.WORKER_STATUS_EMPTY, pb.WORKER_STATUS_READY)
        assert await pusher.push(sharpen(policy), next(_versions), app.address, RUN) == ""
        [end] = await extend(NewTrajectories(buffer_client, other, RUN), [parted], token_budget=21)
    assert end.cached_tokens == 0
    held, resumed = await trajectories.read(whole), await trajectories.read(parted)
    assert resumed.token_ids == held.token_ids
    assert resumed.logprobs == pytest.approx(held.logprobs, abs=TOLERANCE)


async def test_the_prefix_of_an_image_is_kept_for_that_image_alone(trajectories: NewTrajectories, sharp: Any) -> None:
    same, other = named_pictures(5), named_pictures(6)
    first, second = await trajectories.create([LONG_PROMPT], k=2, images=same)
    [third] = await trajectories.create([LONG_PROMPT], images=other)
    ends = [(await extend(trajectories, [each]))[0] for each in (first, second, third)]
    assert [end.cached_tokens >= 32 for end in ends] == [False, True, False]
    held = [(await trajectories.read(each)).token_ids for each in (first, second, third)]
    assert held[0] == held[1]
    assert held[2] != held[0]


async def test_an_image_token_in_a_response_is_text(
    trajectories: NewTrajectories, policy: VisionPolicy, vision: VisionModel
) -> None:
    pictures = named_pictures(1)
    [trajectory_id] = await trajectories.create([PROMPT], images=pictures)
    [lease] = await trajectories.lease([trajectory_id])
    sampled = [9, IMAGE, 8, IMAGE]
    chunk = buffer_pb2.Chunk(
        trajectory_id=trajectory_id,
        epoch=lease.epoch,
        token_ids=pack_token_ids(sampled),
        logprobs=pack_logprobs([-1.0] * len(sampled)),
        versions=[buffer_pb2.VersionSpan(policy_version=0, tokens=len(sampled))],
        end_reason=buffer_pb2.END_REASON_BUDGET,
    )
    await trajectories.buffer.append_chunks(buffer_pb2.AppendChunksRequest(run_id=RUN, chunks=[chunk]))
    await extend(trajectories, [trajectory_id], sampling=pb.Sampling(temperature=1))
    held = await trajectories.read(trajectory_id)
    assert held.token_ids[:4] == sampled
    expected = policy.logprobs(vision.expand(PROMPT, [(28, 28)]), held.token_ids, list(pictures.values()))
    assert held.logprobs[4:] == pytest.approx(expected[4:], abs=TOLERANCE)


async def test_an_image_that_is_none_fails_its_trajectories_alone(trajectories: NewTrajectories) -> None:
    """The buffer takes any file; what can be seen is not its business."""
    [blind] = await trajectories.create([PROMPT], images={digest_of(b"no image"): b"no image"})
    [crowded] = await trajectories.create([[7] * 250 + [IMAGE]], images=named_pictures(2))
    [fine] = await trajectories.create([PROMPT], images=named_pictures(2))
    version = (await trajectories.rollout.get_state(pb.GetStateRequest())).policy_version
    ended, failed = await trajectories.extend([blind, crowded, fine], policy_version=version)
    assert list(ended) == [fine]
    assert failed[blind].endswith("is no image: it must be PNG, JPEG, WEBP")
    assert failed[crowded] == "the prompt of 257 tokens leaves no room in the context"


@pytest.mark.parametrize(
    ("prompt", "digests", "message"),
    [
        (PROMPT, 0, r"items\[0\]\.image_digests: the prompt has 1 image tokens \(5\) for 0 images"),
        (PROMPT[1:], 1, r"items\[0\]\.image_digests: the prompt has 0 image tokens \(5\) for 1 images"),
        ([IMAGE] * 9 + [7], 9, r"items\[0\]\.image_digests: 9 images are more than rollout\.images\.max_per_prompt"),
        ([7] * 250 + [IMAGE], 1, r"items\[0\]\.image_digests: 257 tokens, those of the images included, leave no room"),
    ],
)
async def test_a_prompt_with_other_images_is_refused(
    client: RolloutClient, prompt: Sequence[int], digests: int, message: str
) -> None:
    pictures = named_pictures(1)
    await client.put_images(pictures)
    with pytest.raises(InvalidArgumentError, match=message):
        await generate(client, [(prompt, [*pictures] * digests)])
    with pytest.raises(FailedPreconditionError, match=r"Images are not here: put absent by PutImages first"):
        await generate(client, [(PROMPT, ["absent"])])


async def test_a_model_of_text_refuses_images(rollout_client: RolloutClient) -> None:
    with pytest.raises(InvalidArgumentError, match=r"image_digests: the model of .* takes no images"):
        await rollout_client.put_images(named_pictures(1))


async def test_tokens_that_vllm_makes_otherwise_are_an_error(
    client: RolloutClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = named_pictures(1)
    await client.put_images(pictures)
    monkeypatch.setattr(Idefics3, "image_tokens", lambda *_: [IMAGE] * 6)
    with pytest.raises(InternalError, match=r"vLLM makes 20 tokens of a prompt with images .* says 19"):
        await generate(client, [(PROMPT, [*pictures])])


async def test_openais_client_shows_images(
    client: RolloutClient, vision_app: App[RolloutConfig], vision: VisionModel
) -> None:
    pictures = named_pictures(1, 2)
    await client.put_images(pictures)

    def ask(*urls: str) -> list[Any]:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": "how many"}]}]

    data = [f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in pictures.values()]
    settings: dict[str, Any] = {"model": "policy", "temperature": 0, "max_tokens": 16}
    settings["extra_body"] = {"return_token_ids": True}
    async with openai.AsyncOpenAI(base_url=f"http://{vision_app.http_address}/v1", api_key="none") as endpoint:
        answer = await endpoint.chat.completions.create(messages=ask(*data), **settings)
        prompt = answer.prompt_token_ids
        [expected] = await generate(client, [(prompt, [*pictures])], sampling=GREEDY)
        assert answer.choices[0].token_ids == expected.token_ids[:16]
        assert prompt.count(IMAGE) == 2
        assert answer.usage.prompt_tokens == len(vision.expand(prompt, [(28, 28)] * 2))
        for urls, message in {
            ("http://127.0.0.1:1/a.png",): r"content\[0\].*is an address of the web: give a data URL, or have rollout",
            ("/etc/hostname",): "must be a data URL",
            ("data:image/png;base64,AAAA",): "is no image: it must be PNG, JPEG, WEBP",
            (data[0],) * 9: "9 images are more than rollout.images.max_per_prompt allows",
        }.items():
            with pytest.raises(openai.BadRequestError, match=message):
                await endpoint.chat.completions.create(messages=ask(*urls), **settings)
