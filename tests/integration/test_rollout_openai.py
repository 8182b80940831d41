"""OpenAI's client against a rollout worker on the real engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
import pytest_asyncio

from perigee.buffer.client import BufferClient
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2 as pb
from services.kit.server import App
from services.rollout.config import RolloutConfig
from tests.fixtures.rollout import (
    CHARACTERS,
    CONTEXT,
    EOS,
    NewTrajectories,
    Pusher,
    make_policy,
    policy_logprobs,
    policy_tensors,
    wait_for_state,
)

POLICIES = [make_policy(seed) for seed in (11, 12)]
# Log-probabilities of the engine against an fp32 forward pass of transformers on the same tokens.
TOLERANCE = 1e-3
PROMPT = "12+34="
PROMPT_IDS = [2 + CHARACTERS.index(character) for character in PROMPT]
IDS = {"return_token_ids": True}
RUN = "run-openai"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(rollout_app: App[RolloutConfig], pusher: Pusher) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a worker that holds policy 0 as version 3."""
    assert await pusher.push(policy_tensors(POLICIES[0]), 3, rollout_app.address, RUN) == ""
    url = f"http://{rollout_app.http_address}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


async def test_token_ids_go_in_and_out_with_the_policys_logprobs(client: openai.AsyncOpenAI) -> None:
    sampled = {"model": "policy", "max_tokens": 20, "n": 2, "logprobs": 0, "seed": 5}
    answer = await client.completions.create(**sampled, prompt=PROMPT_IDS, extra_body=IDS)
    assert answer.policy_version == 3
    assert answer.usage.prompt_tokens == len(PROMPT_IDS)
    assert answer.usage.completion_tokens == sum(len(choice.token_ids) for choice in answer.choices)
    for choice in answer.choices:
        assert choice.prompt_token_ids == PROMPT_IDS
        expected = policy_logprobs(POLICIES[0], PROMPT_IDS, choice.token_ids)
        assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=TOLERANCE)
        assert "".join(choice.logprobs.tokens) == choice.text
        assert choice.policy_versions == [{"policy_version": 3, "tokens": len(choice.token_ids)}]
    first, second = (choice.token_ids for choice in answer.choices)
    assert first != second
    for same in ({"prompt": PROMPT}, {"prompt": "", "extra_body": IDS | {"prompt_token_ids": PROMPT_IDS}}):
        again = await client.completions.create(**sampled, **({"extra_body": IDS} | same))
        assert [choice.token_ids for choice in again.choices] == [first, second]


async def test_the_logprobs_of_a_trajectory_are_those_of_its_echo(
    client: openai.AsyncOpenAI, buffer_client: BufferClient, rollout_client: RolloutClient
) -> None:
    trajectories = NewTrajectories(buffer_client, rollout_client, RUN)
    [trajectory] = await trajectories.create([PROMPT_IDS])
    await trajectories.extend([trajectory], policy_version=3, sampling=pb.Sampling(temperature=1, seed=1))
    held = await trajectories.read(trajectory)
    assert len(held.token_ids) > 8
    whole = [*PROMPT_IDS, *held.token_ids]
    # As lm-evaluation-harness asks for the likelihood of texts: several prompts, one token more.
    answer = await client.completions.create(
        model="policy", prompt=[whole, PROMPT_IDS], echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    echo = answer.choices[0].logprobs
    assert echo.token_logprobs[0] is None
    assert echo.token_logprobs[len(PROMPT_IDS) : len(whole)] == pytest.approx(held.logprobs, abs=TOLERANCE)
    assert len(echo.tokens) == len(whole) + 1
    assert "".join(echo.tokens) == answer.choices[0].text
    assert answer.choices[1].text.startswith(PROMPT)
    assert echo.text_offset[: len(PROMPT)] == list(range(len(PROMPT)))
    # The last place of the second prompt is where greedy decoding went on in the first.
    for logprob, top in zip(echo.token_logprobs[1:-1], echo.top_logprobs[1:-1], strict=True):
        assert logprob in top.values()
        assert logprob <= max(top.values())


async def test_a_stream_is_the_whole_answer_in_parts(client: openai.AsyncOpenAI) -> None:
    asked = {
        "model": "policy",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 40,
        "temperature": 0,
        "logprobs": True,
        "extra_body": IDS,
    }
    whole = await client.chat.completions.create(**asked)
    # The client joins the parts, as agents have it do.
    async with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        events = [event.chunk async for event in stream if event.type == "chunk"]
        joined = stream.current_completion_snapshot.choices[0].message
    assert (joined.role, joined.content) == ("assistant", whole.choices[0].message.content)
    parts = [event.choices[0] for event in events if event.choices]
    assert len(parts) > 2
    assert events[0].prompt_token_ids == whole.prompt_token_ids
    assert [token for part in parts for token in part.token_ids] == whole.choices[0].token_ids
    logprobs = [token.logprob for part in parts for token in part.logprobs.content]
    assert logprobs == pytest.approx([token.logprob for token in whole.choices[0].logprobs.content], abs=TOLERANCE)
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_stop_string_is_left_out(client: openai.AsyncOpenAI, streaming: bool) -> None:
    arguments = {"model": "policy", "prompt": PROMPT, "max_tokens": 60, "seed": 7}
    whole = (await client.completions.create(**arguments)).choices[0].text
    stop = whole[3:5]
    answer = await client.completions.create(**arguments, stop=[stop], stream=streaming)
    choices = [event.choices[0] async for event in answer] if streaming else answer.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"


async def test_a_caller_that_leaves_a_stream_frees_the_engine(
    client: openai.AsyncOpenAI, rollout_client: RolloutClient
) -> None:
    stream = await client.completions.create(
        model="policy", prompt=PROMPT, max_tokens=CONTEXT - 8, n=16, seed=3, stream=True
    )
    await anext(aiter(stream))
    assert (await rollout_client.get_state(pb.GetStateRequest())).running > 0
    await stream.close()
    async with asyncio.timeout(30):
        await wait_for_state(rollout_client, lambda state: state.running == 0)


WRONG = [
    ({"top_p": 0.5}, openai.BadRequestError, "top_p"),
    ({"prompt": []}, openai.BadRequestError, "prompt"),
    ({"prompt": [1 << 40]}, openai.BadRequestError, "prompt_token_ids"),
    ({"prompt": [-1]}, openai.BadRequestError, "prompt_token_ids"),
    ({"prompt": [EOS] * CONTEXT}, openai.BadRequestError, "prompt_token_ids"),
    ({"prompt": [["a"]]}, openai.BadRequestError, "prompt"),
    ({"extra_body": {"prompt_token_ids": [5]}}, openai.BadRequestError, "prompt_token_ids"),
    ({"logprobs": 5}, openai.BadRequestError, "logprobs"),
    ({"stop": [""]}, openai.BadRequestError, "stop"),
    ({"extra_body": {"tools": []}}, openai.BadRequestError, "tools"),
    ({"model": "gpt"}, openai.NotFoundError, None),
    ({"n": 65}, openai.RateLimitError, None),
    ({"extra_body": {"policy_version": 9}}, openai.APIStatusError, None),
]


@pytest.mark.parametrize("streaming", [False, True])
async def test_what_is_wrong_is_said_in_openais_form(client: openai.AsyncOpenAI, streaming: bool) -> None:
    for fields, kind, param in WRONG:
        asked = {"model": "policy", "prompt": PROMPT, "max_tokens": 4, "stream": streaming} | fields
        with pytest.raises(kind) as caught:
            await client.completions.create(**asked)
        assert caught.value.body.keys() == {"message", "type", "param", "code"}
        assert caught.value.body["param"] == param, fields


async def test_wrong_messages_are_named(client: openai.AsyncOpenAI) -> None:
    for messages, sentence in (
        ([{"content": "a"}], r"messages\[0\]\.role: is required"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\]\.content\[0\]: is an image"),
        ([], "messages: is empty"),
    ):
        with pytest.raises(openai.BadRequestError, match=sentence):
            await client.chat.completions.create(model="policy", messages=messages)


async def test_the_model_is_listed_with_its_version(client: openai.AsyncOpenAI) -> None:
    [model] = (await client.models.list()).data
    assert (model.id, model.policy_version, model.max_model_len) == ("policy", 3, CONTEXT)


async def test_new_weights_reach_a_chat_and_the_responses_under_way(
    client: openai.AsyncOpenAI, rollout_app: App[RolloutConfig], pusher: Pusher
) -> None:
    asked = {"model": "policy", "messages": [{"role": "user", "content": "1+1"}], "logprobs": True, "extra_body": IDS}
    text = "user=1+1;assistant="
    prompt = [2 + CHARACTERS.index(character) for character in text]
    stream = await client.chat.completions.create(**asked, n=32, seed=1, stream=True)
    events = aiter(stream)
    parts = [await anext(events)]
    assert await pusher.push(policy_tensors(POLICIES[1]), 4, rollout_app.address, RUN) == ""
    parts += [event async for event in events]
    both = 0
    for index in range(32):
        mine = [event.choices[0] for event in parts if event.choices[0].index == index]
        tokens = [token for part in mine for token in part.token_ids]
        versions = [
            span["policy_version"] for part in mine for span in part.policy_versions for _ in range(span["tokens"])
        ]
        by_version = {3 + policy: policy_logprobs(POLICIES[policy], prompt, tokens) for policy in (0, 1)}
        expected = [by_version[version][place] for place, version in enumerate(versions)]
        found = [token.logprob for part in mine for token in part.logprobs.content]
        assert found == pytest.approx(expected, abs=TOLERANCE)
        both += set(versions) == {3, 4}
    assert both

    raw = await client.chat.completions.with_raw_response.create(**asked, max_tokens=8)
    answer = raw.parse()
    assert answer.prompt_token_ids == prompt
    assert (raw.headers["x-perigee-policy-version"], answer.policy_version) == ("4", 4)
    assert answer.choices[0].policy_versions == [{"policy_version": 4, "tokens": len(answer.choices[0].token_ids)}]
    assert "".join(token.token for token in answer.choices[0].logprobs.content) == answer.choices[0].message.content
