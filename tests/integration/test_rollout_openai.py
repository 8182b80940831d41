"""OpenAI's client against a rollout worker on the real engine."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from perigee.buffer.client import BufferClient
from perigee.buffer.v1.buffer_pb2 import VersionSpan
from perigee.errors import PermissionDeniedError
from perigee.files import read_lines
from perigee.reward.client import RewardClient
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2 as pb
from perigee.rollout.v1.rollout_pb2_grpc import add_RolloutServiceServicer_to_server
from services.kit.server import App, serving
from services.reward.verifiers.base import Verdict
from services.rollout.config import RolloutConfig
from services.rollout.engine import Engine, EngineOutput, EngineRequest
from services.rollout.model import open_policy
from services.rollout.service import ROLLOUT, RolloutService, serve_http
from services.rollout.worker import READY, Worker
from services.weights.manifest import WeightImage, export_image
from tests.fixtures.chat import write_chat_model
from tests.fixtures.cli import run_perigee
from tests.fixtures.curl import call, control_calls
from tests.fixtures.judge import judge_item, running_judge
from tests.fixtures.rollout import (
    CHARACTERS,
    CONTEXT,
    EOS,
    NewTrajectories,
    Pusher,
    make_policy,
    policy_logprobs,
    policy_tensors,
    rollout_config,
    wait_for_state,
)
from tests.fixtures.rollout_engine import FragileEngine, PausedEngine

POLICIES = [make_policy(seed) for seed in (11, 12)]
# Log-probabilities of the engine against an fp32 forward pass of transformers on the same tokens.
TOLERANCE = 1e-3
PROMPT = "12+34="
PROMPT_IDS = [2 + CHARACTERS.index(character) for character in PROMPT]
IDS = {"return_token_ids": True}
RUN = "run-openai"
LM_EVAL = shutil.which(os.environ.get("PERIGEE_LM_EVAL", "lm_eval"))


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
    ids = await trajectories.create([PROMPT_IDS], k=4)
    await trajectories.extend(ids, policy_version=3)
    held = [await trajectories.read(trajectory_id) for trajectory_id in ids]
    # As lm-evaluation-harness asks for the likelihood of texts: several prompts, one token more.
    prompts = [[*PROMPT_IDS, *each.token_ids] for each in held]
    answer = await client.completions.create(
        model="policy", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    for prompt, each, choice in zip(prompts, held, answer.choices, strict=True):
        echo = choice.logprobs
        assert len(echo.tokens) == len(echo.token_logprobs) == len(prompt) + 1
        assert echo.token_logprobs[0] is None
        assert echo.token_logprobs[len(PROMPT) : -1] == pytest.approx(each.logprobs, abs=TOLERANCE)
        assert "".join(echo.tokens) == choice.text
        assert choice.text.startswith(PROMPT)
        assert echo.text_offset[: len(PROMPT)] == list(range(len(PROMPT)))
        for logprob, top in zip(echo.token_logprobs[1:-1], echo.top_logprobs[1:-1], strict=True):
            assert logprob in top.values()
            assert max(top.values()) > -3.9  # what the likeliest of 47 tokens has at least


async def test_a_stream_is_the_whole_answer_in_parts(client: openai.AsyncOpenAI) -> None:
    asked = {
        "model": "policy",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 200,
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
    # Tokens that a busy service has not sent yet go together.
    assert len(parts) > 1
    assert events[0].prompt_token_ids == whole.prompt_token_ids
    assert [token for part in parts for token in part.token_ids] == whole.choices[0].token_ids
    assert [span["tokens"] for part in parts for span in part.policy_versions] == [
        len(part.token_ids) for part in parts
    ]
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
        model="policy", prompt=PROMPT, max_tokens=CONTEXT - 8, n=64, seed=3, stream=True
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
    client: openai.AsyncOpenAI, rollout_app: App[RolloutConfig], rollout_client: RolloutClient, pusher: Pusher
) -> None:
    asked = {"model": "policy", "messages": [{"role": "user", "content": "1+1"}], "logprobs": True, "extra_body": IDS}
    prompt = [2 + CHARACTERS.index(character) for character in "user=1+1;assistant="]
    mixed: list[Any] = []
    # On a loaded machine all responses may end before the commit comes.
    while not mixed:
        assert await pusher.push(policy_tensors(POLICIES[0]), 3, rollout_app.address, RUN) == ""
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(client.chat.completions.create(**asked, n=4)) for _ in range(4)]
            await wait_for_state(
                rollout_client, lambda state, calls=calls: state.running > 0 or all(call.done() for call in calls)
            )
            assert await pusher.push(policy_tensors(POLICIES[1]), 4, rollout_app.address, RUN) == ""
        mixed = [choice for call in calls for choice in call.result().choices if len(choice.policy_versions) == 2]
    for choice in mixed[:4]:
        versions = [span["policy_version"] for span in choice.policy_versions for _ in range(span["tokens"])]
        assert versions == sorted(versions)
        by_version = {3 + each: policy_logprobs(POLICIES[each], prompt, choice.token_ids) for each in (0, 1)}
        expected = [by_version[version][place] for place, version in enumerate(versions)]
        assert [token.logprob for token in choice.logprobs.content] == pytest.approx(expected, abs=TOLERANCE)

    raw = await client.chat.completions.with_raw_response.create(**asked, max_tokens=8)
    answer = raw.parse()
    assert answer.prompt_token_ids == prompt
    assert (raw.headers["x-perigee-policy-version"], answer.policy_version) == ("4", 4)
    assert answer.choices[0].policy_versions == [{"policy_version": 4, "tokens": len(answer.choices[0].token_ids)}]
    assert "".join(token.token for token in answer.choices[0].logprobs.content) == answer.choices[0].message.content
    assert await pusher.push(policy_tensors(POLICIES[0]), 3, rollout_app.address, RUN) == ""


class JudgingEngine(FragileEngine):
    """Ends its answer with the judgement that a judge is asked for: right when the response is 4."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        asked = self.tokenizer.decode(list(request.token_ids))
        response, nonce = re.findall(r"BEGIN RESPONSE.*?\n(.*)\n.*END RESPONSE (\w+)", asked)[-1]
        verdict = "correct" if "It is 4." in response else "wrong"
        answer = f'So: {{"id": "{nonce}", "reasoning": "a sum", "verdict": "{verdict}"}}'
        ids = [*self.tokenizer.encode(answer, add_special_tokens=False).ids, EOS]
        spans = [VersionSpan(policy_version=0, tokens=len(ids))]
        yield EngineOutput(ids, [-1.0] * len(ids), spans, cached_tokens=0, finish="stop")


async def test_a_judge_is_the_policy(tmp_path: Path) -> None:
    model = open_policy(str(write_chat_model(tmp_path / "model", context=8192)), None)
    async with (
        scripted_worker(model.path, JudgingEngine(model.tokenizer)) as app,
        running_judge(f"http://{app.http_address}/v1", model="policy") as verifier,
    ):
        outcomes = [await verifier.judge(judge_item(f"It is {number}.")) for number in (4, 5)]
        assert not verifier.endpoints["main"].by_schema  # which the endpoint refuses
    assert [(each.verdict, each.reward) for each in outcomes] == [(Verdict.CORRECT, 1.0), (Verdict.WRONG, 0.0)]


@asynccontextmanager
async def scripted_worker(
    folder: Path, engine: Engine, image: WeightImage | None = None, **fields: Any
) -> AsyncIterator[App[RolloutConfig]]:
    """A worker with an engine that does as the test tells it, and that holds an image."""

    @asynccontextmanager
    async def lifespan(app: App[RolloutConfig]) -> AsyncIterator[None]:
        worker = Worker(app.config, open_policy(str(folder), None), engine, "w")
        worker.set_status(READY, RUN, 3)
        service = RolloutService(worker, None, lambda: image)  # type: ignore[arg-type]
        app.add(ROLLOUT, add_RolloutServiceServicer_to_server, service)
        async with serve_http(app, worker, service):
            yield

    async with serving(rollout_config(folder, "127.0.0.1:9", http={"port": 0}, **fields), lifespan) as app:
        yield app


def connect(app: App[RolloutConfig], token: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://{app.http_address}/v1", api_key=token, max_retries=0)


async def test_a_token_for_the_policy_opens_the_endpoint_and_nothing_else(policy_folder: Path) -> None:
    callers = {
        "agent": {"tokens": ["a"], "audiences": ["policy"], "quota": {"per_second": 0.001}},
        "team": {"tokens": ["t"], "audiences": ["control", "reward"]},
    }
    async with scripted_worker(policy_folder, PausedEngine(), server={"callers": callers}) as app:
        async with connect(app, "a") as agent, connect(app, "t") as team, connect(app, "wrong") as nobody:
            assert [model.id async for model in agent.models.list()] == ["policy"]
            for client, kind, status in (
                (agent, "rate_limit_error", 429),
                (team, "permission_error", 403),
                (nobody, "authentication_error", 401),
            ):
                with pytest.raises(openai.APIStatusError) as caught:
                    await client.completions.create(model="policy", prompt=PROMPT)
                assert (caught.value.status_code, caught.value.body["type"]) == (status, kind)
        state, *_ = control_calls("come_back")
        assert app.http_address is not None
        refused = await call(state, app.http_address, "-H 'Authorization: Bearer a'")
        assert "The token of agent is for policy; rollout asks for one for control" in refused["error"]["message"]
        allowed = await call(state, app.http_address, "-H 'Authorization: Bearer t'")
        assert (allowed["status"], allowed["policy_version"]) == ("ready", 3)
        async with RolloutClient.connect(app.address, token="t") as team_client:
            assert (await team_client.get_state(pb.GetStateRequest())).policy_version == 3
        async with RolloutClient.connect(app.address, token="a") as agent_client:
            with pytest.raises(PermissionDeniedError, match="The token of agent is for policy"):
                await agent_client.get_state(pb.GetStateRequest())


async def test_an_operator_has_a_worker_leave_and_come_back(policy_folder: Path, tmp_path: Path) -> None:
    state, leave, come_back = control_calls("come_back")
    image = export_image(RUN, 3, policy_tensors(POLICIES[0]).items(), 1 << 20, str(tmp_path))
    async with scripted_worker(policy_folder, FragileEngine(), image) as app:
        assert app.http_address is not None
        for _ in range(2):
            assert "freed_bytes" in await call(leave, app.http_address)
            assert (await call(state, app.http_address))["status"] == "away"
        for _ in range(2):
            assert (await call(come_back, app.http_address))["policy_version"] == 3
            assert (await call(state, app.http_address))["status"] == "ready"
        stale = await call(leave.replace('"iteration": 7', '"iteration": 6'), app.http_address)
        unknown = await call(leave.replace("sleep", "nap"), app.http_address)
    assert (stale["error"]["code"], unknown["error"]["code"]) == ("FAILED_PRECONDITION", "INVALID_ARGUMENT")
    assert unknown["error"]["field_violations"][0]["field"] == "residence"
    image.close()


async def test_a_stream_ends_with_the_reason_when_the_worker_stops(policy_folder: Path) -> None:
    async with (
        scripted_worker(policy_folder, PausedEngine(), server={"drain_seconds": 0}) as app,
        connect(app, "none") as client,
    ):
        stream = aiter(await client.completions.create(model="policy", prompt=PROMPT, max_tokens=20, stream=True))
        assert (await anext(stream)).choices[0].text
        draining = asyncio.create_task(app.drain())
        with pytest.raises(openai.APIError, match="The service is stopping"):
            [event async for event in stream]
        await draining


async def test_responses_are_bounded_over_all_calls(policy_folder: Path) -> None:
    async with scripted_worker(policy_folder, PausedEngine()) as app, connect(app, "none") as client:
        asked = {"model": "policy", "prompt": [PROMPT] * 2, "max_tokens": 20, "n": 20, "stream": True}
        async with await client.completions.create(**asked) as stream:
            await anext(aiter(stream))
            with pytest.raises(openai.RateLimitError, match="40 of at most 64 responses are under way, and 40 more"):
                await client.completions.create(**asked)


HARNESS = {
    # What it asks of a chat, and of texts whose likelihood it compares.
    "local-chat-completions": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": [";"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
    "local-completions": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
}
PROBLEMS = [{"question": f"{a}+{a}=", "choices": [f"{2 * a}", f"{a}5;"], "answer": a % 2} for a in range(6)]


async def ask_with_harness(app: App[RolloutConfig], model: str, folder: Path, policy_folder: Path) -> list[Any]:
    """The samples of lm-evaluation-harness on PROBLEMS, in order."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(policy_folder / "tokenizer.json", tokenizer)
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    data = folder / "problems.jsonl"
    data.write_text("".join(f"{json.dumps(problem)}\n" for problem in PROBLEMS))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    # YAML takes JSON.
    (folder / "sums.yaml").write_text(json.dumps({"task": "sums", **source, **HARNESS[model]}))
    path = "chat/completions" if "chat" in model else "completions"
    arguments = f"model=policy,base_url=http://{app.http_address}/v1/{path},max_retries=1,max_length={CONTEXT}"
    arguments += ",num_concurrent=4" if "chat" in model else f",tokenizer_backend=huggingface,tokenizer={tokenizer}"
    options = ["--tasks", "sums", "--include_path", str(folder), "--output_path", str(folder), "--log_samples"]
    options += ["--apply_chat_template"] if "chat" in model else ["--batch_size", "4"]
    environment = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    assert LM_EVAL is not None
    process = await asyncio.create_subprocess_exec(
        LM_EVAL, "--model", model, "--model_args", arguments, *options, env=os.environ | environment, stderr=sys.stderr
    )
    assert await process.wait() == 0
    return sorted(read_samples(folder), key=lambda sample: sample["doc_id"])


def read_samples(folder: Path) -> list[Any]:
    [samples] = folder.rglob("samples_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


async def test_an_evaluation_is_of_one_version(
    rollout_app: App[RolloutConfig], pusher: Pusher, reward: RewardClient, tmp_path: Path
) -> None:
    suite = tmp_path / "sums.jsonl"
    suite.write_text(json.dumps({"id": "a", "prompt": "1+1=", "verifier": "math", "answer": "2"}))
    asked = ("eval", "--endpoint", f"http://{rollout_app.http_address}/v1", "--model", "policy", str(suite), "--plain")
    options = ("--reward", reward.target, "--samples", "1", "--max-tokens", "4", "--out", str(tmp_path / "out"))
    for version in (7, 7, 3):
        assert await pusher.push(policy_tensors(POLICIES[0]), version, rollout_app.address, RUN) == ""
        ended = await run_perigee(*asked, *options)
        assert ended.code == 0, ended.stderr
    assert len(read_lines(tmp_path / "out" / "answers.jsonl")) == 4


@pytest.mark.skipif(LM_EVAL is None, reason="needs lm_eval[api] on the PATH, or where PERIGEE_LM_EVAL says")
async def test_lm_evaluation_harness_generates_and_compares_likelihoods(
    client: openai.AsyncOpenAI, rollout_app: App[RolloutConfig], policy_folder: Path, tmp_path: Path
) -> None:
    for model in HARNESS:
        (folder := tmp_path / model).mkdir()
        samples = await ask_with_harness(rollout_app, model, folder, policy_folder)
        assert len(samples) == len(PROBLEMS)
        for sample, problem in zip(samples, PROBLEMS, strict=True):
            if model == "local-chat-completions":
                messages = [{"role": "user", "content": problem["question"]}]
                answer = await client.chat.completions.create(
                    model="policy", messages=messages, max_tokens=12, temperature=0, stop=";"
                )
                assert sample["resps"] == [[answer.choices[0].message.content]]
                continue
            prompt = [2 + CHARACTERS.index(character) for character in problem["question"]]
            for [[logprob, _]], choice in zip(sample["resps"], problem["choices"], strict=True):
                tokens = [2 + CHARACTERS.index(character) for character in choice]
                assert float(logprob) == pytest.approx(sum(policy_logprobs(POLICIES[0], prompt, tokens)), abs=1e-2)
