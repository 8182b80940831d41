"""`perigee sample` with the real engine and the real reward service, and against an endpoint that is cut short."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from perigee.chat import read_example
from perigee.cli.sample.run import COT_PATH
from perigee.files import read_lines
from perigee.reward.client import RewardClient
from services.kit.server import App
from services.rollout.config import RolloutConfig
from tests.fixtures.cli import run_perigee
from tests.fixtures.judge import FakeJudge, Reply, text_of
from tests.fixtures.rollout import Pusher, make_policy, policy_tensors

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2="}]
LINES = [
    {"id": "a", "prompt": "1+1=", "verifier": "math", "answer": "2"},
    {"id": "b", "messages": CHAT, "verifier": "math", "answer": "4"},
    {"id": "c", "prompt": "8+1=", "verifier": "math", "answer": "none"},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two sums that are often solved, and one that never is."""
    return write_lines(tmp_path / "sums.jsonl", LINES)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answer_by_seed(body: dict[str, Any]) -> Reply:
    """A response that the request's seed decides: right or wrong, short or long."""
    rng = random.Random(body["seed"])
    text = "so " * rng.randrange(9) + rf"it is \boxed{{{rng.choice([2, 4, 7])}}}"
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return Reply(body=json.dumps({"choices": [choice], "usage": {"completion_tokens": len(text.split())}}))


def read_files(folder: Path) -> dict[str, bytes]:
    """What a command wrote, but for its journal."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "answers.jsonl"}


async def test_sampling_that_is_cut_anywhere_gives_the_same_files(
    tmp_path: Path, prompts: Path, fake_judge: FakeJudge, reward: RewardClient
) -> None:
    fake_judge.choose = answer_by_seed
    out = tmp_path / "out"
    asked = ("sample", str(prompts), "--endpoint", fake_judge.url, "--model", "m", "--reward", reward.target, "--plain")
    selected = ("--select", "shortest", "--select", "pairs", "--select", "all", "--out", str(out), "-n", "12")
    ended = await run_perigee(*asked, *selected)
    assert ended.code == 0, ended.stderr
    whole, answers = read_files(out), (out / "answers.jsonl").read_bytes()
    assert len(fake_judge.requests) == 36
    samples = read_lines(out / "samples.jsonl")
    assert [(line["id"], line["attempt"]) for line in samples] == [
        (prompt, f"sample-{number}") for prompt in "abc" for number in range(12)
    ]
    report = json.loads(whole["report.json"])
    verdicts = [line["verdict"] for line in samples]
    assert report["verdicts"] == {name: verdicts.count(name) for name in ("correct", "wrong", "ungradable", "failed")}
    assert report["selected"]["shortest"]["dropped_prompts"] == {"no correct response": 1}
    correct = [line for line in samples if line["verdict"] == "correct"]
    shortest = {key: min(line["tokens"] for line in correct if line["id"] == key) for key in "ab"}
    lines = {line["id"]: line for line in read_lines(out / "sft.jsonl")}
    assert {key: len(line["response"].split()) for key, line in lines.items()} == shortest
    assert (lines["a"]["prompt"], lines["b"]["messages"]) == ("1+1=", CHAT)
    assert [bool(read_example(line)) for line in read_lines(out / "all.jsonl")]
    pairs = read_lines(out / "pairs.jsonl")
    assert len(pairs) == report["selected"]["pairs"]["pairs"] > 0
    assert all(len(pair["rejected"].split()) > shortest[pair["id"]] for pair in pairs)
    assert "shortest: 2 examples of 2 prompts" in ended.stdout
    assert "prompts dropped: 1 (1 no correct response)" in ended.stdout

    for size in (0, 1, len(answers) // 2, len(answers) - 1):
        for path in out.glob("*.json*"):
            path.unlink()
        (out / "answers.jsonl").write_bytes(answers[:size])
        (out / ".sft.jsonl.staging").write_bytes(answers[:size])
        again = await run_perigee(*asked, *selected)
        assert again.code == 0, again.stderr
        assert read_files(out) == whole
    # Nothing is asked again, and what is not selected is not left from before.
    asked_before = len(fake_judge.requests)
    again = await run_perigee(*asked, "--out", str(out), "-n", "12")
    assert len(fake_judge.requests) == asked_before
    assert {path.name for path in out.iterdir()} == {"answers.jsonl", "samples.jsonl", "sft.jsonl", "report.json"}
    assert (out / "sft.jsonl").read_bytes() == whole["sft.jsonl"]


async def test_a_sample_without_a_verdict_is_asked_for_again(
    tmp_path: Path, prompts: Path, fake_judge: FakeJudge, reward: RewardClient
) -> None:
    fake_judge.choose = answer_by_seed
    fake_judge.script = [Reply(status=400, body="too long")] * 5
    out = tmp_path / "out"
    asked = ("sample", str(prompts), "--endpoint", fake_judge.url, "--model", "m", "--reward", reward.target)
    ended = await run_perigee(*asked, "--out", str(out), "-n", "12", "--plain")
    assert ended.code == 0, ended.stderr
    assert "5 failed" in ended.stdout
    assert "answered 400: too long; the same command asks for them again" in ended.stdout
    assert json.loads((out / "report.json").read_text())["verdicts"]["failed"] == 5
    ended = await run_perigee(*asked, "--out", str(out), "-n", "12", "--plain")
    assert "31 of 36 answers are in" in ended.stdout
    assert json.loads((out / "report.json").read_text())["verdicts"]["failed"] == 0
    straight = await run_perigee(*asked, "--out", str(tmp_path / "straight"), "-n", "12")
    assert straight.code == 0, straight.stderr
    assert read_files(out) == read_files(tmp_path / "straight")


async def test_long_reasoning_is_asked_for_in_words_that_are_not_written(
    tmp_path: Path, prompts: Path, fake_judge: FakeJudge, reward: RewardClient
) -> None:
    fake_judge.choose = answer_by_seed
    out = tmp_path / "out"
    asked = ("sample", str(prompts), "--endpoint", fake_judge.url, "--model", "m", "--reward", reward.target)
    ended = await run_perigee(*asked, "--cot", "default", "--out", str(out), "-n", "12")
    assert ended.code == 0, ended.stderr
    words = COT_PATH.read_text().strip("\n")
    assert {text_of(body) for body in fake_judge.requests} == {
        words.replace("{prompt}", question) for question in ("1+1=", "2+2=", "8+1=")
    }
    lines = read_lines(out / "all.jsonl")
    assert {json.dumps(line.get("messages") or line["prompt"]) for line in lines} == {'"1+1="', json.dumps(CHAT)}
    correct = {(line["id"], line["response"]) for line in read_lines(out / "samples.jsonl") if line["reward"] == 1}
    assert sorted((line["id"], line["response"]) for line in lines) == sorted(correct)


async def test_a_policy_is_sampled_and_its_samples_are_selected_anew(
    tmp_path: Path, rollout_app: App[RolloutConfig], pusher: Pusher, reward: RewardClient
) -> None:
    assert await pusher.push(policy_tensors(make_policy(11)), 3, rollout_app.address, "run-sample") == ""
    rule = {"verifier": "regex", "search_response": True, "pattern": "^[0-9a-m]"}
    prompts = write_lines(
        tmp_path / "p.jsonl", [{"id": text, "prompt": text, **rule} for text in ("12+34=", "ab", "7*8")]
    )
    endpoint = f"http://{rollout_app.http_address}/v1"
    asked = ("--endpoint", endpoint, "--model", "policy", "--completions", "--reward", reward.target)
    options = ("-n", "12", "--max-tokens", "200", "--select", "pairs", "--out", str(tmp_path / "one"))
    ended = await run_perigee("sample", str(prompts), *asked, *options)
    assert ended.code == 0, ended.stderr
    lengths = {
        (line["id"], line["response"]): line["tokens"] for line in read_lines(tmp_path / "one" / "samples.jsonl")
    }
    pairs = read_lines(tmp_path / "one" / "pairs.jsonl")
    assert pairs
    assert all(lengths[each["id"], each["chosen"]] < lengths[each["id"], each["rejected"]] for each in pairs)

    samples = str(tmp_path / "one" / "samples.jsonl")
    again = await run_perigee(
        "sample", str(prompts), "--samples", samples, "--select", "pairs", "--out", str(tmp_path / "two")
    )
    assert again.code == 0, again.stderr
    assert (tmp_path / "two" / "pairs.jsonl").read_bytes() == (tmp_path / "one" / "pairs.jsonl").read_bytes()


async def test_nothing_is_written_where_nothing_is_right(
    tmp_path: Path, fake_judge: FakeJudge, reward: RewardClient
) -> None:
    prompts = write_lines(tmp_path / "sums.jsonl", LINES[2:])
    fake_judge.choose = answer_by_seed
    out = tmp_path / "out"
    asked = ("sample", str(prompts), "--endpoint", fake_judge.url, "--model", "m", "--reward", reward.target)
    ended = await run_perigee(*asked, "--out", str(out), "-n", "2")
    assert (ended.code, ended.stderr.count("\n")) == (1, 1)
    assert "nothing can be selected for any of the 1 prompts (1 have no correct response)" in ended.stderr
    assert [path.name for path in out.iterdir()] == ["answers.jsonl"]
    (tmp_path / "bare.jsonl").write_text('{"id": "c", "response": "2"}')
    ended = await run_perigee(
        "sample", str(prompts), "--samples", str(tmp_path / "bare.jsonl"), "--out", str(tmp_path / "none")
    )
    assert (ended.code, ended.stderr.count("\n")) == (2, 1)
    assert "bare.jsonl:1: verdict: must be one of" in ended.stderr
    assert not (tmp_path / "none").exists()
