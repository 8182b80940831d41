"""`perigee prompts curate` as a process: the pure stages alone, and all of them on a real engine and verifier."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from perigee.buffer.packing import pack_token_ids
from perigee.reward.client import RewardClient
from perigee.reward.sources import Columns, read_source
from perigee.rollout.client import RolloutClient
from perigee.rollout.v1 import rollout_pb2
from tests.fixtures.cli import Ended, run_perigee, start_perigee
from tests.fixtures.reward import running_reward
from tests.fixtures.rollout import CHARACTERS, best_digit, make_policy

pytestmark = pytest.mark.timeout(300)  # the first test waits for a model to be trained and an engine to start

SAMPLES, RESPONSE_TOKENS, GUESSES, SEED = 10, 1, 8, 3
TEMPLATE = "{prompt}{answer_marker}"


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_results(out: Path) -> dict[str, str]:
    """The files that a curation leaves."""
    files = [*out.glob("*.jsonl"), out / "report.json", out / "report.md"]
    return {file.name: file.read_text() for file in files}


def decisions(out: Path, stage: str) -> dict[str, dict[str, Any]]:
    [path] = (out / "stages").glob(f"*-{stage}.jsonl")
    return {line["id"]: line for line in read(path)}


def math_line(name: str, prompt: str, answer: str = "7", **fields: Any) -> dict[str, Any]:
    return {"id": name, "prompt": prompt, "verifier": "math", "answer": answer, **fields}


async def test_without_a_model_the_pure_stages_run(tmp_path: Path) -> None:
    lines = [
        math_line("a", "What is 3+4?", difficulty=1.0),
        math_line("b", "what is  3+4"),
        math_line("c", "Prove that 3+4=7."),
        {"id": "d", "prompt": "Is it 7?", "verifier": "true_false"},
        math_line("e", "A triangle has sides 3, 4 and 5. Find its perimeter.", "12", difficulty=2.0),
        math_line("f", "A circle has radius 1. Find its area.", r"\pi", domain="olympiad"),
        *[math_line(f"g{i}", f"What is {i}*{i}?", str(i * i), domain="squares") for i in range(20)],
    ]
    source = write(tmp_path / "in.jsonl", lines)
    out = tmp_path / "out"
    ended = await run_perigee("prompts", "curate", str(source), str(out), "--cap", "5")
    assert (ended.code, ended.stderr) == (0, "")
    # What stays is a prompt file of a recipe.
    kept = {line.id: line for line in read_source(out / "prompts.jsonl", Columns(), "run.prompts")}
    assert {name for name in kept if not name.startswith("g")} == {"a", "e", "f"}
    assert sum(name.startswith("g") for name in kept) == 5
    assert {name: kept[name].domain for name in "aef"} == {"a": "arithmetic", "e": "geometry", "f": "olympiad"}
    assert kept["e"].difficulty == 2.0
    dropped = {line["id"]: (line["stage"], line["reason"]) for line in read(out / "dropped.jsonl")}
    assert {name: dropped[name] for name in "bcd"} == {
        "b": ("duplicates", "exact duplicate"),
        "c": ("question-kinds", "proof"),
        "d": ("question-kinds", "true or false"),
    }
    report = json.loads((out / "report.json").read_text())
    assert (report["prompts"], report["kept"], report["dropped"], report["undecided"]) == (26, 8, 18, 0)
    assert [stage["name"] for stage in report["stages"] if "skipped" in stage] == ["difficulty", "guessing"]
    assert report["cells"]["squares"] == {"before_balance": [20, 0, 0, 0, 0], "kept": [5, 0, 0, 0, 0]}
    text = (out / "report.md").read_text()
    assert "8 of 26 prompts are kept" in text
    assert "| squares | 62.5% | 5 (20) |" in text

    other = await run_perigee("prompts", "curate", str(source), str(out), "--cap", "6")
    assert other.code == 2
    assert "holds a curation with another cap: 5, now 6" in other.stderr
    again = await run_perigee("prompts", "curate", str(source), str(out), "--cap", "6", "--restart")
    assert again.code == 0
    assert len(read(out / "prompts.jsonl")) == 9


def make_prompts(count: int) -> list[dict[str, Any]]:
    """Prompts whose answer is the digit that the random policy likes best after them, but for every third prompt."""
    policy, rng = make_policy(0), random.Random(1)
    lines = []
    for number in range(count):
        text = "".join(rng.choice(CHARACTERS[:36]) for _ in range(9))
        # With a marker, the answer to a guess follows it at once; without, the whole response is the answer.
        marker = "#" if number % 2 else ""
        answer = best_digit(policy, text + marker)[0] if number % 3 else "77777"
        fields = {"verifier": "exact", "answer_marker": marker, "domain": "noise"}
        lines.append(math_line(f"p{number}", text, answer, **fields))
    return lines


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    return make_prompts(30)


async def curate(source: Path, out: Path, rollout: str, reward: str, model: Path, *more: str) -> Ended:
    return await run_perigee(*arguments(source, out, rollout, reward, model), *more)


def arguments(source: Path, out: Path, rollout: str, reward: str, model: Path) -> list[str]:
    (template := source.parent / "template.txt").write_text(TEMPLATE + "\n")
    options = {
        "--rollout": rollout, "--reward": reward, "--model": model, "--seed": SEED, "--samples": SAMPLES,
        "--response-tokens": RESPONSE_TOKENS, "--guesses": GUESSES, "--guess-tokens": 1, "--guess-template": template,
        "--outage": 5,
    }  # fmt: skip
    return ["prompts", "curate", str(source), str(out), "--push", "--keep-trivial", "--near-duplicates", "0",
            "--keep-question-kinds", *(str(part) for pair in options.items() for part in pair)]  # fmt: skip


async def ask_directly(
    client: RolloutClient, tokenizer: Tokenizer, lines: Sequence[Mapping[str, Any]], stage: str
) -> dict[str, list[str]]:
    """The answers that the stage's ids and seed draw, asked for one prompt at a time."""
    count, tokens = (SAMPLES, RESPONSE_TOKENS) if stage == "difficulty" else (GUESSES, 1)
    found: dict[str, list[str]] = {}
    for line in lines:
        end = line["answer_marker"] if stage == "guessing" else ""
        ids = tokenizer.encode(line["prompt"] + end).ids
        items = [
            rollout_pb2.GenerateItem(
                id=f"{stage}/{line['id']}/{n}", prompt_token_ids=pack_token_ids(ids), max_tokens=tokens
            )
            for n in range(count)
        ]
        request = rollout_pb2.GenerateRequest(
            items=items, sampling=rollout_pb2.Sampling(temperature=1, seed=SEED), text_only=True
        )
        found[line["id"]] = [response.text async for response in client.generate(request, timeout_s=60)]
    return found


def is_right(text: str, marker: str, answer: str) -> bool:
    """Whether a response of one character is right: it has no room for a marker and an answer."""
    return not marker and text == answer


async def test_difficulty_and_guessing_are_those_of_the_model(
    prompts: list[dict[str, Any]],
    rollout_address: str,
    rollout_client: RolloutClient,
    reward: RewardClient,
    policy_folder: Path,
    tmp_path: Path,
) -> None:
    source, out = write(tmp_path / "in.jsonl", prompts), tmp_path / "out"
    ended = await curate(source, out, rollout_address, reward.target, policy_folder)
    assert ended.code == 0, ended.stderr
    tokenizer = Tokenizer.from_file(str(policy_folder / "tokenizer.json"))
    answers = await ask_directly(rollout_client, tokenizer, prompts, "difficulty")
    found = decisions(out, "difficulty")
    for line in prompts:
        details = found[line["id"]]["details"]
        right = sum(is_right(text, line["answer_marker"], line["answer"]) for text in answers[line["id"]])
        assert (details["correct"], details["failed"]) == (right, 0)
        assert details["difficulty"] == pytest.approx(1 - right / SAMPLES)
    assert len({finding["details"]["difficulty"] for finding in found.values()}) > 2

    guesses = await ask_directly(rollout_client, tokenizer, prompts, "guessing")
    expected = {line["id"]: sum(text == line["answer"] for text in guesses[line["id"]]) for line in prompts}
    found = decisions(out, "guessing")
    assert {name: finding["details"]["correct"] for name, finding in found.items()} == expected
    hacked = {name for name, right in expected.items() if right}
    assert 0 < len(hacked) < len(prompts)
    assert {line["id"] for line in read(out / "dropped.jsonl")} == hacked
    kept = read_source(out / "prompts.jsonl", Columns(), "run.prompts")
    assert {line.id for line in kept} == {line["id"] for line in prompts} - hacked
    assert all(0 <= line.difficulty <= 1 for line in kept)


async def test_a_killed_curation_goes_on_with_the_same_results(
    rollout_address: str, reward: RewardClient, policy_folder: Path, tmp_path: Path
) -> None:
    # Ten calls of long responses, two at a time: the first findings are there long before the last.
    prompts = make_prompts(60)
    source = write(tmp_path / "in.jsonl", prompts)
    longer = ("--response-tokens", "60")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ended = await curate(source, whole, rollout_address, reward.target, policy_folder, *longer)
    assert ended.code == 0, ended.stderr

    command = [*arguments(source, cut, rollout_address, reward.target, policy_folder), *longer]
    process = await start_perigee(*command)
    journal = cut / "stages" / "4-difficulty.jsonl"
    while not (journal.exists() and journal.stat().st_size):  # noqa: ASYNC110, another process writes it
        await asyncio.sleep(0.002)
    process.kill()
    await process.communicate()
    kept = journal.read_text()
    assert 0 < len(kept.splitlines()) < len(prompts)
    with journal.open("a") as file:
        file.write('{"id": "p29", "decis')
    assert not (cut / "prompts.jsonl").exists()

    again = await run_perigee(*command)
    assert again.code == 0, again.stderr
    assert "resuming the curation" in again.stdout
    assert "difficulty: 60 of 60\n" in again.stdout
    assert journal.read_text().startswith(kept)
    assert read_results(cut) == read_results(whole)


async def test_what_cannot_be_judged_is_undecided(rollout_address: str, policy_folder: Path, tmp_path: Path) -> None:
    tests = [{"arguments": [1], "expected": 1}]
    lines = [
        math_line("math", "1+6=", answer_marker="#"),
        {"id": "code", "prompt": "f:inc", "verifier": "code", "function": "f", "tests": tests},
        math_line("long", "1+" * 128, answer_marker="#"),
    ]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out"
    async with running_reward(sandbox_address="127.0.0.1:9", code={"timeout_s": 0.2}) as client:
        ended = await curate(source, out, rollout_address, client.target, policy_folder, "--guesses", "0")
    assert ended.code == 0, ended.stderr
    undecided = {line["id"]: (line["stage"], line["reason"]) for line in read(out / "undecided.jsonl")}
    assert undecided == {"code": ("difficulty", "undetermined"), "long": ("difficulty", "too long for the model")}
    details = decisions(out, "difficulty")["code"]["details"]
    assert (details["failed"] + details["ungradable"], details["wrong"], details["correct"]) == (SAMPLES, 0, 0)
    assert details["failed"] > SAMPLES * 0.2
    assert [line["id"] for line in read(out / "prompts.jsonl")] == ["math"]
    assert "2 undecided" in (out / "report.md").read_text()


async def test_a_model_that_is_not_there_is_named(tmp_path: Path, policy_folder: Path) -> None:
    source = write(tmp_path / "in.jsonl", [math_line("a", "1+6=")])
    command = ["prompts", "curate", str(source), str(tmp_path / "out"), "--rollout", "127.0.0.1:9"]
    ended = await run_perigee(*command)
    assert ended.code == 2
    assert "--model: is required with --rollout" in ended.stderr
    ended = await run_perigee(*command, "--model", str(policy_folder))
    assert ended.code == 1
    assert "cannot be reached" in ended.stderr
    assert "the same command resumes" in ended.stderr
