"""Other pipelines on a real reward service: TRL itself, verl's functions as verl calls them, OpenRLHF's endpoint."""

from __future__ import annotations

import ast
import asyncio
import functools
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import pickle
import random
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from transformers import PreTrainedTokenizerFast

from perigee.errors import DeadlineExceededError, UnavailableError
from perigee.reward.adapters.blocking import BlockingScorer, GroundTruthOptions
from perigee.reward.adapters.trl import PerigeeReward
from perigee.reward.client import RewardClient
from perigee.reward.scoring import ScoringOptions
from perigee.reward.v1.reward_pb2_grpc import add_RewardServiceServicer_to_server
from tests.fixtures.coordinator_fakes import FakeReward, fake_server
from tests.fixtures.reward import math_item, running_gateway, running_reward
from tests.fixtures.rollout import CHARACTERS, best_digit, make_policy, save_policy

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "clients"
# Judged in the sandbox, of which there is none here: nobody knows.
CODE = {"verifier": "code", "language": "python", "function": "f", "tests": [{"arguments": [1], "expected": 1}]}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def lame_reward() -> AsyncIterator[RewardClient]:
    """A reward service whose sandbox is not there."""
    async with running_reward(sandbox_address="127.0.0.1:9", code={"timeout_s": 0.1}) as client:
        yield client


def quick(address: str, **changes: Any) -> BlockingScorer:
    options = ScoringOptions(
        **({"attempts": 2, "first_pause_s": 0.01, "unavailable_s": 0.2} | changes.pop("options", {}))
    )
    return BlockingScorer(address, options=options, **changes)


def reward_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "perigee-reward"}


async def test_blocking_calls_from_many_threads_keep_their_order(reward: RewardClient) -> None:
    scorer = quick(reward.target, options={"batch": 7})
    threads = reward_threads()

    def call(thread: int) -> list[float]:
        items = [math_item(str(i), str(thread), f"#{i % 5}") for i in range(50)]
        return [outcome.reward for outcome in scorer.score(items)]

    found = await asyncio.gather(*(asyncio.to_thread(call, thread) for thread in range(5)))
    assert found == [[float(i % 5 == thread) for i in range(50)] for thread in range(5)]
    # From a caller with a loop of its own.
    outcomes = await scorer.score_async([math_item("a", "4", "#4")])
    assert [outcome.reward for outcome in outcomes] == [1.0]
    await asyncio.to_thread(scorer.close)
    assert reward_threads() <= threads
    # A closed scorer connects anew, and so does a copy in another process.
    again = await asyncio.to_thread(scorer.score, [math_item("a", "4", "#4")])
    assert again[0].reward == 1.0
    copy = pickle.loads(pickle.dumps(scorer))
    assert (await asyncio.to_thread(copy.score, [math_item("a", "4", "#5")]))[0].reward == 0.0
    await asyncio.to_thread(scorer.close)
    await asyncio.to_thread(copy.close)


def score_elsewhere(scorer: BlockingScorer) -> float:
    return scorer.score([math_item("a", "4", "#4")])[0].reward


async def test_a_spawned_worker_connects_for_itself(reward: RewardClient) -> None:
    scorer = quick(reward.target)
    assert (await asyncio.to_thread(score_elsewhere, scorer)) == 1.0
    context = multiprocessing.get_context("spawn")

    def in_a_process() -> float:
        with context.Pool(1) as pool:
            return pool.apply(score_elsewhere, (scorer,))

    assert await asyncio.to_thread(in_a_process) == 1.0
    await asyncio.to_thread(scorer.close)


async def test_a_deadline_ends_the_call() -> None:
    scripted = FakeReward(failing={"a": 10_000})
    async with fake_server(add_RewardServiceServicer_to_server, scripted) as address:
        scorer = quick(address, deadline_s=2.0, options={"attempts": 10_000, "last_pause_s": 0.05})
        with pytest.raises(DeadlineExceededError, match="not scored within 2 s"):
            await asyncio.to_thread(scorer.score, [math_item("a", "4", "#4")])
        await asyncio.to_thread(scorer.close)
        asked = len(scripted.calls)
        assert asked > 1
        await asyncio.sleep(0.1)
        assert len(scripted.calls) == asked


async def test_a_service_that_is_not_there_is_an_error_and_no_reward() -> None:
    reward = PerigeeReward(column="answer", scorer=quick("127.0.0.1:9"))
    with pytest.raises(UnavailableError, match="cannot be reached"):
        await asyncio.to_thread(reward, prompts=["1+1="], completions=["2"], answer=["2"])


async def test_trl_gets_none_for_what_could_not_be_judged(lame_reward: RewardClient) -> None:
    logged: dict[str, float] = {}
    function = PerigeeReward(column="truth", options=GroundTruthOptions("math", "#"), scorer=quick(lame_reward.target))
    rewards = await asyncio.to_thread(
        function,
        prompts=["a", "b", "c", [{"role": "user", "content": "d"}]],
        completions=["#4", "#5", "def f(x): return x#def f(x): return x", [{"role": "assistant", "content": "#7"}]],
        truth=["4", 4, json.dumps(CODE), "7"],
        log_metric=logged.__setitem__,
        trainer_state=None,
    )
    assert rewards == [1.0, 0.0, None, 1.0]
    assert logged == {"perigee/failed": 0.25}


async def run_trl(address: str, out: Path, *arguments: str) -> list[dict[str, Any]]:
    """Runs the example with TRL itself; its log, step by step."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / "trl" / "train.py"), "--cpu", "--out", str(out), "--reward", address, *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()[-3000:]
    lines = [line for line in stdout.decode().splitlines() if line.startswith("{") and "'reward'" in line]
    # What is not a number is logged as None.
    return [
        {key: math.nan if value is None else float(value) for key, value in ast.literal_eval(line).items()}
        for line in lines
    ]


def write_model(folder: Path) -> Path:
    """The random policy as TRL loads it."""
    save_policy(make_policy(0), folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.timeout(300)  # imports TRL in a process of its own
async def test_trl_trains_on_rewards_of_the_service(lame_reward: RewardClient, tmp_path: Path) -> None:
    policy, rng = make_policy(0), random.Random(2)
    rows = []
    while len(rows) < 4:
        text = "".join(rng.choice(CHARACTERS[:36]) for _ in range(9))
        digit, probability = best_digit(policy, text)
        if 0.3 < probability < 0.9:
            # The completions are one character without a marker.
            truth = {"math": {"reference": digit, "extraction": "prose"}}
            rows.append({"prompt": text, "answer": json.dumps(truth)})
    # Programs cannot be judged here.
    rows += [{"prompt": f"{n}+{n}", "answer": json.dumps(CODE)} for n in range(4)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Two prompts with four completions a step: four steps see every prompt once.
    log = await run_trl(
        lame_reward.target, tmp_path / "run", "--model", str(write_model(tmp_path / "model")), "--data", str(data),
        "--tokens", "1", "--steps", "4",
    )  # fmt: skip
    assert len(log) == 4
    # An empty program is ungradable, and known to be; all others are not known.
    failed = [step["perigee/failed"] for step in log]
    assert 0.3 < sum(failed) / 4 <= 0.5
    judged = [step["reward"] for step in log if step["perigee/failed"] <= 0.5]
    assert judged
    assert all(0.0 <= reward <= 1.0 for reward in judged)
    assert 0.0 < sum(judged) / len(judged) < 1.0
    for step in log:
        if step["perigee/failed"] == 1.0:  # nothing to average, and nothing to learn
            assert math.isnan(step["reward"])
            assert step["grad_norm"] == pytest.approx(0.0, abs=1e-6)
    assert max(step["grad_norm"] for step in log) > 0


def load_as_verl_does(path: str, name: str, reward_kwargs: dict[str, Any]) -> Callable[..., Any]:
    """verl 0.9.1, verl/trainer/ppo/reward.py: the function of a module, with the configuration's arguments on top."""
    module = importlib.import_module(path.removeprefix("pkg://").replace("/", "."))
    function = getattr(module, name)
    if inspect.iscoroutinefunction(function):

        async def call_async(*args: Any, **kwargs: Any) -> Any:
            return await function(*args, **{**kwargs, **reward_kwargs})

        return call_async
    return functools.partial(lambda *args, **kwargs: function(*args, **{**kwargs, **reward_kwargs}))


VERL_ROWS = [
    ("openai/gsm8k", "The sum is #### 18", "18", 1.0),
    ("openai/gsm8k", "The sum is #### 17", "18", 0.0),
    ("openai/gsm8k", "no answer", "18", 0.0),
    ("other", "#### 1/2", np.array(["1/2", "0.5"]), 1.0),
]


@pytest.mark.parametrize("name", ["compute_score", "compute_score_async"])
async def test_verl_calls_once_a_response(reward: RewardClient, name: str) -> None:
    kwargs = {"address": reward.target, "verifier": {"openai/gsm8k": "math", "other": "math"}, "answer_marker": "####"}
    compute = load_as_verl_does("pkg://perigee.reward.adapters.verl", name, kwargs)

    async def run_single(source: str, solution: str, truth: Any) -> dict[str, Any]:
        arguments = {
            "data_source": source, "solution_str": solution, "ground_truth": truth,
            "extra_info": {"num_turns": 1, "rollout_reward_scores": {}},
        }  # fmt: skip
        if name.endswith("async"):
            return await compute(**arguments)
        return await asyncio.get_running_loop().run_in_executor(None, lambda: compute(**arguments))

    results = await asyncio.gather(*(run_single(*row[:3]) for row in VERL_ROWS))
    assert [result["score"] for result in results] == [row[3] for row in VERL_ROWS]
    assert {tuple(result) for result in results} == {("score", "acc", "pred")}
    assert results[0]["pred"] == "18"


async def test_verl_calls_with_a_batch(reward: RewardClient, lame_reward: RewardClient) -> None:
    compute = load_as_verl_does("pkg://perigee.reward.adapters.verl", "compute_scores", {"answer_marker": "####"})
    sources, solutions, truths, scores = map(list, zip(*VERL_ROWS, strict=True))
    batch = {
        "data_sources": np.array(sources), "solution_strs": solutions, "ground_truths": truths,
        "extra_infos": [{"rollout_reward_scores": {}} for _ in sources],
    }  # fmt: skip
    results = await asyncio.to_thread(compute, **batch, address=reward.target)
    assert [result["score"] for result in results] == scores
    with pytest.raises(UnavailableError, match="could not be judged and has no score"):
        await asyncio.to_thread(compute, **(batch | {"ground_truths": [*truths[:3], CODE]}), address=lame_reward.target)


@pytest_asyncio.fixture(loop_scope="session")
async def lame_http() -> AsyncIterator[httpx.AsyncClient]:
    """A reward service whose sandbox is not there, over HTTP."""
    async with running_gateway(sandbox_address="127.0.0.1:9", code={"timeout_s": 0.1}) as (_, http):
        yield http


async def test_openrlhf_posts_queries_prompts_and_labels(lame_http: httpx.AsyncClient) -> None:
    url = "/v1/compat/openrlhf?verifier=math&answer_marker=%23&end=%3Ceos%3E"
    payload = {
        "query": ["<s>2+2=so it is #4<eos>", "<s>2+3=#4<eos>", "<s>1/2+1/2=?<eos>"],
        "prompts": ["2+2=", "2+3=", "1/2+1/2="],
        "labels": ["4", "5", "1"],
    }
    response = await lame_http.post(url, json=payload)
    assert response.status_code == 200
    assert response.json() == {
        "rewards": [1.0, 0.0, 0.0],
        "scores": [1.0, 0.0, 0.0],
        "extra_logs": {"correct": [1.0, 0.0, 0.0], "ungradable": [0.0, 0.0, 1.0]},
    }
    # With several servers OpenRLHF sends some of them nothing.
    empty = await lame_http.post(url, json={"query": [], "prompts": [], "labels": []})
    assert (empty.status_code, empty.json()["rewards"]) == (200, [])

    failing = {"query": ["f:#x"], "prompts": ["f:"], "labels": [json.dumps(CODE)]}
    response = await lame_http.post(url, json=failing)
    assert response.status_code == 503
    assert "rewards" not in response.json()
    assert response.headers["Retry-After"] == "1"

    wrong = await lame_http.post(url, json={"query": ["x"], "prompts": ["y"], "labels": ["1"]})
    assert (wrong.status_code, "does not begin with its prompt" in wrong.json()["error"]) == (400, True)
    headers = {"content-type": "application/json"}
    for content, field in ((b"{", "body"), (b"\xff", "body"), (b"[]", "body"), (b'{"query": ["a"]}', "prompts")):
        broken = await lame_http.post(url, content=content, headers=headers)
        assert (broken.status_code, broken.json()["error"].partition(":")[0]) == (400, field)
