"""Judges and value heads behind the running service: the same over gRPC and HTTP, and no reward when they fail."""

from __future__ import annotations

import base64
import io
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from perigee.buffer.v1.buffer_pb2 import VERDICT_CORRECT, VERDICT_FAILED
from perigee.json_codec import read_message
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.config import JudgeConfig, JudgeEndpointConfig, ValueHeadConfig
from tests.fixtures.judge import FakeJudge, Reply, text_of, verdict
from tests.fixtures.reward import running_gateway, score

PHOTO = "https://example.org/photo.jpg"
EASY = {"id": "easy", "response": "#4", "answer_marker": "#", "math": {"reference": "4"}}
JUDGED = {"id": "judged", "prompt": "What is it?", "response": "A cat.", "judge": {"reference": "a cat"}}


def judge_config(url: str, **fields: Any) -> JudgeConfig:
    endpoint = JudgeEndpointConfig(base_url=url, model="tiny", **fields)
    return JudgeConfig(judges={"main": endpoint})


def make_png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 3), "red").save(stream, "PNG")
    return stream.getvalue()


async def test_images_travel_to_the_judge_as_bytes_and_addresses(fake_judge: FakeJudge) -> None:
    fake_judge.otherwise = verdict("correct", "It is one.")
    data = base64.b64encode(make_png()).decode()
    item = JUDGED | {"images": [{"data_base64": data}, {"url": PHOTO}], "judge": {"reference": "a cat", "votes": 3}}
    async with running_gateway(judge=judge_config(fake_judge.url), cache_entries=0) as (client, http):
        [outcome] = await score(client, read_message(pb.ScoreRequest, {"items": [item]}).items)
        answer = await http.post("/v1/score/collected", json={"items": [item]})
    assert (outcome.id, outcome.verdict, outcome.reward, outcome.reason) == (
        "judged",
        VERDICT_CORRECT,
        1.0,
        "It is one.",
    )
    assert (outcome.verifier, outcome.verifier_version) == ("judge", "1")
    assert outcome.latency_ms > 0
    assert [(part.name, part.verdict, part.reward) for part in outcome.parts] == [
        (f"vote {n}", VERDICT_CORRECT, 1.0) for n in (1, 2, 3)
    ]
    [reported] = answer.json()["outcomes"]
    assert (reported["verdict"], reported["reward"], len(reported["parts"])) == ("correct", 1.0, 3)
    assert len(fake_judge.requests) == 6
    for request in fake_judge.requests:
        _, *images = request["messages"][-1]["content"]
        assert [image["image_url"]["url"] for image in images] == [f"data:image/png;base64,{data}", PHOTO]
        assert "What is it?" in text_of(request)


async def check_failure(client: RewardClient, http: httpx.AsyncClient, reason: str) -> None:
    """Both protocols tell the failure, with a reason and a hint, and judge the item beside it."""
    items = read_message(pb.ScoreRequest, {"items": [JUDGED, EASY]}).items
    outcomes = {outcome.id: outcome for outcome in await score(client, items)}
    answer = (await http.post("/v1/score/collected", json={"items": [JUDGED, EASY]})).json()
    streamed = await http.post("/v1/score", json={"items": [JUDGED]})
    line = json.loads(streamed.text)
    failed = outcomes["judged"]
    assert (failed.verdict, failed.HasField("reward"), failed.retryable) == (VERDICT_FAILED, False, True)
    assert failed.retry_after_ms > 0
    assert reason in failed.reason
    assert outcomes["easy"].reward == 1.0
    reported, easy = answer["outcomes"]
    for each in (reported, line):
        assert (each["verdict"], "reward" in each, each["retryable"]) == ("failed", False, True)
        assert each["retry_after_ms"] > 0
        assert reason in each["reason"]
    assert easy["reward"] == 1.0


async def test_a_judge_that_is_down_gives_no_reward() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
        async with running_gateway(judge=judge_config(url, timeout_s=0.3)) as (client, http):
            await check_failure(client, http, "cannot be reached")


async def test_a_judge_that_is_slow_gives_no_reward(fake_judge: FakeJudge) -> None:
    fake_judge.otherwise = Reply(delay_s=60)
    async with running_gateway(judge=judge_config(fake_judge.url, timeout_s=0.3)) as (client, http):
        await check_failure(client, http, "did not answer within")


MALFORMED = {
    "a word": Reply("correct"),
    "more than asked": Reply('{"reasoning": "", "verdict": "correct", "reward": 1}'),
    "no verdict": Reply('{"verdict": "perfect"}'),
    "HTML": Reply(body="<html>"),
}


async def test_a_judge_that_answers_malformed_text_gives_no_reward(fake_judge: FakeJudge) -> None:
    async with running_gateway(judge=judge_config(fake_judge.url)) as (client, http):
        for name, fake_judge.otherwise in MALFORMED.items():
            print(name)
            fake_judge.requests.clear()
            await check_failure(client, http, "judge main: ")
            assert len(fake_judge.requests) >= 3


@pytest.mark.timeout(300)  # waits for a model to be trained
async def test_a_value_head_is_served_over_both_protocols(value_head_folder: Path) -> None:
    sums = [(a, b) for a in range(20, 40, 4) for b in range(21, 41, 4)]
    items = [
        {"id": f"{a}+{b}={c}", "prompt": f"{a}+{b}", "response": f"It is {c}", "value_head": {"reference": str(a + b)}}
        for a, b in sums
        for c in (a + b, a + b + 11)
    ]
    config = ValueHeadConfig(path=str(value_head_folder), device="cpu", reward="probability", max_batch_items=16)
    async with running_gateway(value_head=config, cache_entries=0) as (client, http):
        request = read_message(pb.ScoreRequest, {"items": items})
        outcomes = {outcome.id: outcome for outcome in await score(client, request.items)}
        reported = (await http.post("/v1/score/collected", json={"items": items})).json()["outcomes"]
        listed = (await client.list_verifiers(pb.ListVerifiersRequest())).verifiers
    [version] = [verifier.version for verifier in listed if verifier.name == "value_head"]
    assert version.startswith("1-")
    assert {outcome.verifier_version for outcome in outcomes.values()} == {version}
    right = [outcomes[f"{a}+{b}={a + b}"].reward for a, b in sums]
    wrong = [outcomes[f"{a}+{b}={a + b + 11}"].reward for a, b in sums]
    assert sum(right) / len(sums) > 0.25 + sum(wrong) / len(sums)
    # Batches differ, scores do not.
    assert [each["id"] for each in reported] == [item["id"] for item in items]
    assert [each["reward"] for each in reported] == pytest.approx(
        [outcomes[item["id"]].reward for item in items], abs=1e-5
    )
