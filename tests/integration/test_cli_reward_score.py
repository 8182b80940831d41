"""`perigee reward score` as a process, against the real service; a scripted one where a failure must pass in time."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2
from perigee.reward.v1.reward_pb2_grpc import add_RewardServiceServicer_to_server
from tests.fixtures.cli import run_perigee, start_perigee
from tests.fixtures.coordinator_fakes import FakeReward, fake_server
from tests.fixtures.reward import running_reward


def write(path: Path, items: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def math_line(item_id: str, response: str, reference: str = "4", **fields: Any) -> dict[str, Any]:
    return {"id": item_id, "response": response, "answer_marker": "#", "verifier": "math", "answer": reference} | fields


async def test_outcomes_come_in_the_order_of_the_file(reward: RewardClient, tmp_path: Path) -> None:
    lines = [math_line(f"i{i}", f"#{i % 7}", "4", label=i % 7 == 4) for i in range(200)]
    lines[3] = math_line("i3", "nothing", label="ungradable")
    lines[5] = math_line("i5", "#5", "5", label=False)
    # The hard ones take longest, so that outcomes come out of order.
    lines[0] = math_line("i0", r"#\frac{1}{2}+\sqrt{4}", r"\frac{5}{2}", form="value", label=True)
    file = write(tmp_path / "items.jsonl", lines)
    ended = await run_perigee("reward", "score", str(file), "--batch", "7", "--address", reward.target)
    assert (ended.code, ended.stderr) == (0, "")
    found = read(tmp_path / "items.scored.jsonl")
    assert [outcome["id"] for outcome in found] == [line["id"] for line in lines]
    verdicts = {outcome["id"]: (outcome["verdict"], outcome["reward"]) for outcome in found}
    assert verdicts["i0"] == ("correct", 1.0)
    assert verdicts["i1"] == ("wrong", 0.0)
    assert verdicts["i3"] == ("ungradable", 0.0)
    assert verdicts["i4"] == ("correct", 1.0)
    assert "scored: 200 of 200" in ended.stdout
    correct = sum(verdict == "correct" for verdict, _ in verdicts.values())
    [row] = [line.split() for line in ended.stdout.splitlines() if line.startswith("math ")]
    assert row == ["math", str(correct), str(199 - correct), "1", "0", f"{correct / 200:.4f}"]
    assert "agreement with labels: 199 of 200 (99.5%); 1 called correct against the label" in ended.stdout
    assert names(tmp_path) == {"items.jsonl", "items.scored.jsonl"}


async def test_bad_lines_are_reported_all_at_once_and_nothing_is_scored(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    good = json.dumps(math_line("a", "#4"))
    bad = [
        "{",
        json.dumps(math_line("b", "#4", refrence="4", label="yes")),
        json.dumps({"id": "c", "verifier": {"math": {"reference": True}}}),
        json.dumps(math_line("a", "#5")),
        json.dumps({"response": "x", "verifier": "judge", "images": ["missing.png"]}),
    ]
    file.write_text("\n".join([good, *bad, ""]))
    ended = await run_perigee("reward", "score", str(file), "--address", "127.0.0.1:9")
    assert ended.code == 2
    for part in (
        "items.jsonl:2: is not JSON",
        "items.jsonl:3: label: must be true, false or one of",
        "items.jsonl:3: refrence: unknown key; did you mean reference?",
        "items.jsonl:4: response: is required",
        "items.jsonl:4: verifier.math.reference: must be a string, got a boolean",
        f"items.jsonl:5: id: 'a' is that of {file}:1, too",
        "items.jsonl:6: images[0]: missing.png cannot be read",
    ):
        assert part in ended.stderr
    assert names(tmp_path) == {"items.jsonl"}


async def test_what_could_not_be_judged_has_no_reward_and_is_scored_again(tmp_path: Path) -> None:
    code = {"verifier": "code", "language": "python", "function": "f", "tests": [{"arguments": [1], "expected": 1}]}
    lines = [
        math_line("good", "#4"),
        {"id": "code", "response": "def f(x): return x", **code},
        {"id": "refused", "response": "#4", "verifier": "math", "reference": " "},
    ]
    file = write(tmp_path / "items.jsonl", lines)
    arguments = ("reward", "score", str(file), "--attempts", "2")
    # No sandbox listens there, so programs cannot be judged.
    async with running_reward(sandbox_address="127.0.0.1:9", code={"timeout_s": 0.2}) as client:
        ended = await run_perigee(*arguments, PERIGEE_REWARD_ADDRESS=client.target)
        assert ended.code == 3, ended.stderr
        outcomes = {outcome["id"]: outcome for outcome in read(tmp_path / "items.scored.jsonl")}
        assert {name: outcome["verdict"] for name, outcome in outcomes.items()} == {
            "good": "correct", "code": "failed", "refused": "failed"
        }  # fmt: skip
        assert outcomes["code"]["reward"] is None
        assert outcomes["code"]["retryable"]
        assert outcomes["refused"]["reason"].startswith("refused: math.reference: ")
        assert not outcomes["refused"]["retryable"]
        assert "2 could not be judged and have no reward" in ended.stdout

        again = await run_perigee(*arguments, PERIGEE_REWARD_ADDRESS=client.target)
        assert again.code == 2
        assert "--resume keeps them" in again.stderr

        # The reference is mended: another item, scored anew with the one that failed.
        write(file, [*lines[:2], lines[2] | {"reference": "4", "answer_marker": "#"}])
        again = await run_perigee(*arguments, "--resume", PERIGEE_REWARD_ADDRESS=client.target)
        assert again.code == 3
        assert "scored: 2 of 2" in again.stdout
        found = read(tmp_path / "items.scored.jsonl")
        assert [outcome["verdict"] for outcome in found] == ["correct", "failed", "correct"]
        assert found[0] == outcomes["good"]


async def test_a_passing_failure_is_tried_again(tmp_path: Path) -> None:
    scripted = FakeReward(failing={"b": 2})
    file = write(tmp_path / "items.jsonl", [math_line(name, "#4") for name in "abc"])
    async with fake_server(add_RewardServiceServicer_to_server, scripted) as address:
        ended = await run_perigee("reward", "score", str(file), "--address", address)
    assert ended.code == 0, ended.stderr
    assert [outcome["verdict"] for outcome in read(tmp_path / "items.scored.jsonl")] == ["correct"] * 3
    assert sorted(scripted.seen) == ["a", "b", "b", "b", "c"]


@dataclass
class SlowReward(FakeReward):
    """Takes its time with every call."""

    pause_s: float = 0.005

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> AsyncIterator[reward_pb2.ScoreResponse]:
        await asyncio.sleep(self.pause_s)
        async for response in FakeReward.Score(self, request, context):
            yield response


async def test_a_killed_command_goes_on_where_it_was(tmp_path: Path) -> None:
    scripted = SlowReward()
    lines = [math_line(str(i), f"#{i % 5}") for i in range(800)]
    file = write(tmp_path / "items.jsonl", lines)
    journal = tmp_path / ".items.scored.jsonl.partial"
    async with fake_server(add_RewardServiceServicer_to_server, scripted) as address:
        arguments = ("reward", "score", str(file), "--address", address)
        process = await start_perigee(*arguments, "--batch", "1", "--concurrency", "1")
        while not (journal.exists() and journal.stat().st_size):  # noqa: ASYNC110, another process writes it
            await asyncio.sleep(0.01)
        process.kill()
        await process.communicate()
        # A line that the crash cut.
        with journal.open("a") as cut:
            cut.write('{"id": "799", "verd')
        kept = {line["id"] for line in read_whole(journal)}
        assert 0 < len(kept) < 800
        assert not (tmp_path / "items.scored.jsonl").exists()

        refused = await run_perigee(*arguments)
        assert refused.code == 2
        assert "--resume" in refused.stderr

        before = len(scripted.seen)
        ended = await run_perigee(*arguments, "--resume")
        assert ended.code == 0, ended.stderr
        scored_again = kept & set(scripted.seen[before:])
        assert scored_again == set()
    found = read(tmp_path / "items.scored.jsonl")
    assert [outcome["id"] for outcome in found] == [line["id"] for line in lines]
    assert [outcome["verdict"] for outcome in found] == ["correct" if i % 5 == 4 else "wrong" for i in range(800)]
    assert not journal.exists()


def read_whole(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n")].splitlines()]


async def test_ctrl_c_keeps_what_is_scored(tmp_path: Path) -> None:
    scripted = SlowReward()
    file = write(tmp_path / "items.jsonl", [math_line(str(i), "#4") for i in range(800)])
    journal = tmp_path / ".items.scored.jsonl.partial"
    async with fake_server(add_RewardServiceServicer_to_server, scripted) as address:
        process = await start_perigee(
            "reward", "score", str(file), "--address", address, "--batch", "1", "--concurrency", "1"
        )
        while not (journal.exists() and journal.stat().st_size):  # noqa: ASYNC110, another process writes it
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = await process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert b"resume with: perigee reward score" in stderr
    assert 0 < len(read_whole(journal)) < 800


async def test_a_service_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "items.jsonl", [math_line("a", "#4")])
    ended = await run_perigee("reward", "score", str(file), "--address", "127.0.0.1:9", "--outage", "0")
    assert ended.code == 1
    assert "for 0 s: " in ended.stderr
    assert "cannot be reached" in ended.stderr
    assert "0 of 1 outcomes are kept; resume with: perigee reward score" in ended.stderr


async def test_a_token_comes_from_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path / "items.jsonl", [math_line("a", "#4")])
    async with running_reward(sandbox_address="127.0.0.1:9", server={"token": "secret"}) as client:
        arguments = ("reward", "score", str(file), "--address", client.target)
        refused = await run_perigee(*arguments, "--outage", "0", PERIGEE_TOKEN="wrong")
        assert refused.code == 1
        assert "token" in refused.stderr
        # Nothing was scored, so there is nothing to go on with.
        assert names(tmp_path) == {"items.jsonl"}
        ended = await run_perigee(*arguments, PERIGEE_TOKEN="secret")
        assert ended.code == 0, ended.stderr
