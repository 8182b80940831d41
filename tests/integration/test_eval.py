"""`perigee eval` against a fake endpoint and a real reward service: results, resumption, comparison, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from perigee.buffer.v1 import buffer_pb2
from perigee.cli.eval.suites import load_suite
from perigee.files import read_lines
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2
from tests.fixtures.cli import run_perigee
from tests.fixtures.judge import FakeJudge, Reply

LINES = [
    {"id": f"p{n}", "domain": "ab"[n % 2], "prompt": f"1+{n}=", "verifier": "math", "answer": n + 1} for n in range(4)
]


def saying(text: str, finish_reason: str = "stop") -> Reply:
    """A completion of 20 tokens."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return Reply(body=json.dumps({"choices": [choice], "usage": {"completion_tokens": 20}}))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Four sums in a prompt file."""
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(line | {"answer": str(line["answer"])}) + "\n" for line in LINES))
    return path


async def test_an_evaluation_from_answers_to_comparison(
    tmp_path: Path, suite: Path, fake_judge: FakeJudge, reward: RewardClient
) -> None:
    asked = ("eval", "--endpoint", fake_judge.url, "--model", "m", "--reward", reward.target, "--plain", str(suite))
    fake_judge.otherwise = saying(r"It is \boxed{2}.")
    fake_judge.script = [Reply(status=400, body="too long")]
    one = str(tmp_path / "one")
    short = await run_perigee(*asked, "--samples", "2", "--limit", "2", "--out", one)
    assert short.code == 0, short.stderr
    assert "1 of 6 answers failed and are left out" in short.stdout
    assert "answered 400: too long" in short.stdout
    overall = json.loads((tmp_path / "one" / "results.json").read_text())["suites"]["sums"]["overall"]
    assert (overall["problems"], overall["failures"], overall["sample_length"]["tokens"]) == (2, 1, 20)
    assert len(fake_judge.requests) == 6
    whole = await run_perigee(*asked, "--samples", "2", "--out", one)
    assert len(fake_judge.requests) == 13
    assert "5 of 12 answers are in" in whole.stdout
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    overall = results["suites"]["sums"]["overall"]
    assert (overall["problems"], overall["greedy"]["mean"], overall["maj_at_k"]["mean"]) == (4, 0.25, 0.25)
    assert results["suites"]["sums"]["a"]["greedy_length"]["tokens"] == 20
    lines = read_lines(tmp_path / "one" / "answers.jsonl")
    assert {(line["verdict"] == "failed", line["answer"]) for line in lines} == {(False, "2"), (True, "")}

    fake_judge.otherwise = saying("I do not know.", "length")
    two = str(tmp_path / "two")
    await run_perigee(*asked, "--samples", "0", "--out", two)
    shutil.copy(suite, tmp_path / "more.jsonl")
    await run_perigee(*asked[:-1], str(tmp_path / "more.jsonl"), "--samples", "0", "--limit", "1", "--out", two)
    suites = json.loads((tmp_path / "two" / "results.json").read_text())["suites"]
    assert {name: each["overall"]["greedy_length"]["truncated"] for name, each in suites.items()} == {
        "sums": 1.0,
        "more": 1.0,
    }
    compared = await run_perigee("eval", "compare", one, two, "--json", str(tmp_path / "compared.json"))
    assert compared.code == 0, compared.stderr
    [found] = json.loads((tmp_path / "compared.json").read_text())
    assert (found["only_first"], found["only_second"], found["p"]) == (1, 0, 1.0)


async def test_instructions_are_judged_together(tmp_path: Path, reward: RewardClient) -> None:
    record = {
        "key": 1,
        "prompt": "Write JSON.",
        "instruction_id_list": ["length_constraints:number_words", "detectable_format:json_format"],
        "kwargs": [{"num_words": 3, "relation": "at least"}, {}],
    }
    (tmp_path / "ifeval_input_data.jsonl").write_text(json.dumps(record))
    [problem] = load_suite("ifeval", tmp_path).problems
    answers = ('["a", "b", "c"]', "a, b and c", '["a"]')
    items = [reward_pb2.ScoreItem(id=answer, response=answer) for answer in answers]
    for item in items:
        item.MergeFrom(problem.line.item)
    found = {each.id: each.verdict async for each in reward.score(reward_pb2.ScoreRequest(items=items))}
    assert [found[answer] == buffer_pb2.VERDICT_CORRECT for answer in answers] == [True, False, False]


async def test_what_is_wrong_is_one_line(
    tmp_path: Path, suite: Path, fake_judge: FakeJudge, reward: RewardClient
) -> None:
    fake_judge.otherwise = Reply(status=404, body="no such model")
    out = ("--out", str(tmp_path / "o"))
    asked = ("eval", "--endpoint", fake_judge.url, "--model", "m", "--reward", reward.target, *out)
    refused = await run_perigee(*asked, str(suite))
    assert (refused.code, refused.stderr.count("\n")) == (1, 1)
    assert "answered 404: no such model" in refused.stderr
    fake_judge.otherwise = Reply(status=400, body="no such key")
    refused = await run_perigee(*asked, str(suite), "--samples", "0", "--plain")
    assert (refused.code, refused.stderr.count("\n")) == (1, 1)
    assert "4 of 4 answers failed" in refused.stderr
    for arguments, words in (
        (("eval", str(tmp_path)), "SUITE: is required"),
        (("eval", str(tmp_path), str(suite)), "is neither a model folder"),
        (("eval", "--endpoint", "http://x", str(suite)), "given together"),
        (("eval", "compare", str(tmp_path)), "takes two results folders"),
        (("eval", "compare", str(tmp_path), str(tmp_path)), "holds no answers.jsonl"),
    ):
        ended = await run_perigee(*arguments)
        assert ended.code == 2
        assert words in ended.stderr
