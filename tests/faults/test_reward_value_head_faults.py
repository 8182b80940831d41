"""What becomes of an item when the value head's process dies, hangs, is missing or knows no number."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from perigee.errors import DataLossError, InvalidArgumentError, UnavailableError
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.config import ValueHeadConfig
from services.reward.value_head.network import BatchScorer
from services.reward.value_head.training import train
from services.reward.verifiers.base import Item, Outcome, Verdict
from services.reward.verifiers.value_head import ValueHeadVerifier
from tests.fixtures.cli import invoke, start_perigee
from tests.fixtures.value_head import labelled_lines, make_sums, training_config, write_lines

pytestmark = pytest.mark.timeout(300)  # the first test waits for a model to be trained

ITEM = Item("a", "It is 47", "", pb.ValueHeadVerifier(reference="47"), prompt="12+35")


@asynccontextmanager
async def running(folder: Path, **fields: Any) -> AsyncIterator[ValueHeadVerifier]:
    verifier = ValueHeadVerifier(ValueHeadConfig(path=str(folder), device="cpu", **fields))
    await verifier.start()
    try:
        yield verifier
    finally:
        await verifier.close()


def assert_failed(outcome: Outcome, reason: str, *, retryable: bool) -> None:
    assert (outcome.verdict, outcome.reward) == (Verdict.FAILED, None)
    assert reason in outcome.reason
    assert outcome.retryable is retryable
    assert (outcome.retry_after_s is not None) is retryable


def worker_pids(folder: Path) -> list[int]:
    """The processes of this one that serve the model of a folder."""
    return [child.pid for child in psutil.Process().children() if serves(child, folder)]


def serves(process: psutil.Process, folder: Path) -> bool:
    """Whether the process serves the folder's model; one that is gone does not."""
    try:
        return process.cmdline()[1:4] == ["-m", "services.reward.value_head.worker", str(folder)]
    except psutil.NoSuchProcess:
        return False


async def test_a_batch_whose_process_is_killed_is_tried_once_more(value_head_folder: Path) -> None:
    # A batch begins when it has its three items.
    async with running(value_head_folder, max_batch_items=3, batch_wait_ms=60_000) as verifier:

        async def judge_three() -> list[Outcome]:
            return await asyncio.gather(*(verifier.judge(ITEM) for _ in range(3)))

        before = await judge_three()
        [pid] = worker_pids(value_head_folder)
        os.kill(pid, signal.SIGSTOP)
        judging = asyncio.create_task(judge_three())
        os.kill(pid, signal.SIGKILL)
        assert await judging == before
        # Every successor is killed as it starts, until the batch has failed.
        judging = asyncio.create_task(judge_three())
        while not judging.done():
            for pid in worker_pids(value_head_folder):
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.005)
        for outcome in await judging:
            assert_failed(outcome, "worker process", retryable=True)
        assert await judge_three() == before


async def test_a_process_that_hangs_is_ended_at_the_deadline(value_head_folder: Path) -> None:
    async with running(value_head_folder, timeout_s=0.5) as verifier:
        [pid] = worker_pids(value_head_folder)
        os.kill(pid, signal.SIGSTOP)
        assert_failed(await verifier.judge(ITEM), "did not answer within 0.5 s", retryable=True)
    assert not psutil.pid_exists(pid)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def odd_verifier(
    value_head_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[ValueHeadVerifier, Path]]:
    """A verifier of a model that has no embedding of the token "snowman" and no number for "~", with its folder."""
    folder = tmp_path_factory.mktemp("odd") / "model"
    shutil.copytree(value_head_folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": 10_000, "content": "snowman", **flags})
    tokenizer["model"]["vocab"]["snowman"] = 10_000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = load_file(folder / "model.safetensors")
    weights["embed_tokens.weight"][tokenizer["model"]["vocab"]["~"]] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    async with running(folder, max_batch_items=8, batch_wait_ms=1000) as verifier:
        yield verifier, folder


async def test_a_score_that_is_no_number_is_no_reward(odd_verifier: tuple[ValueHeadVerifier, Path]) -> None:
    verifier, _ = odd_verifier
    none, some = await asyncio.gather(*(verifier.judge(replace(ITEM, response=text)) for text in ("~", "It is 47")))
    assert_failed(none, "is not a number", retryable=False)
    assert some.verdict is not Verdict.FAILED


async def test_what_the_model_refuses_fails_alone_in_its_batch_and_costs_no_process(
    odd_verifier: tuple[ValueHeadVerifier, Path],
) -> None:
    verifier, folder = odd_verifier
    others = [Item("a", f"It is {n}", "", pb.ValueHeadVerifier(reference="47"), prompt="12+35") for n in range(40, 47)]
    [pid] = worker_pids(folder)
    bad = Item("b", "snowman", "", pb.ValueHeadVerifier(reference="47"), prompt="12+35")
    outcomes = await asyncio.gather(*(verifier.judge(item) for item in (*others[:3], bad, *others[3:])))
    alone = await asyncio.gather(*(verifier.judge(item) for item in others))
    assert worker_pids(folder) == [pid]
    assert_failed(outcomes.pop(3), "the model failed", retryable=False)
    assert [outcome.verdict for outcome in outcomes] == [outcome.verdict for outcome in alone]
    assert all(outcome.verdict is not Verdict.FAILED for outcome in outcomes)


async def test_without_a_model_the_verifier_says_what_it_lacks() -> None:
    verifier = ValueHeadVerifier(ValueHeadConfig())
    await verifier.start()
    assert "reward.value_head.path" in verifier.unavailable
    assert_failed(await verifier.judge(ITEM), "reward.value_head.path", retryable=False)
    await verifier.close()


async def test_a_folder_without_a_value_head_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"perigee_value_head\.json cannot be read"):
        async with running(tmp_path):
            pass


def damage(folder: Path, copy: Path, file: str) -> Path:
    """A copy of the folder in which half of a file is missing."""
    shutil.copytree(folder, copy)
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[: len(data) // 2])
    return copy


@pytest.mark.parametrize("file", ["head.safetensors", "model.safetensors"])
def test_damaged_weights_are_refused(value_head_folder: Path, tmp_path: Path, file: str) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be loaded"):
        BatchScorer(damage(value_head_folder, tmp_path / "model", file), torch.device("cpu"))


async def test_damaged_weights_end_the_start(
    value_head_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = damage(value_head_folder, tmp_path / "model", "model.safetensors")
    with pytest.raises(UnavailableError, match=r"reward\.value_head\.path"):
        async with running(folder):
            pass
    assert "cannot be loaded" in capfd.readouterr().err


async def test_the_process_ends_with_the_service(value_head_folder: Path) -> None:
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.reward.value_head.worker", str(value_head_folder), "cpu", "1"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        assert json.loads(await worker.stdout.readline()) == {"status": "ready"}
        worker.stdin.close()
        assert await worker.wait() == 0
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()


def test_a_damaged_checkpoint_is_named(tmp_path: Path, value_head_backbone: Path) -> None:
    write_lines(tmp_path / "data.jsonl", labelled_lines(make_sums(20, 2)))
    config = training_config(tmp_path, value_head_backbone)
    train(config)
    [state] = (tmp_path / "out" / "checkpoints").glob("step-*/state.pt")
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(DataLossError, match=r"state\.pt is damaged"):
        train(config.model_copy(update={"resume": True}))


async def test_the_command_goes_on_after_it_was_ended(tmp_path: Path, value_head_backbone: Path) -> None:
    """By SIGTERM, and then by SIGKILL."""
    write_lines(tmp_path / "data.jsonl", labelled_lines(make_sums(200, 2)))
    settings = {"batch_size": 8, "eval_every_steps": 20, "checkpoint_every_steps": 5, "patience": 99, "epochs": 6}
    config = training_config(tmp_path, value_head_backbone, **settings)
    options = ("data", "backbone", "out", "epochs")
    arguments = [
        f"--{name}={value}" if name in options else f"--set={name}={value}"
        for name, value in config.model_dump(exclude_unset=True).items()
    ]
    ended = await stop_command(arguments, b"step 20 of ", signal.SIGTERM)
    assert b"--resume" in ended
    await stop_command([*arguments, "--resume"], b"step 40 of ", signal.SIGKILL)
    # No folder is half-written, whatever the moment.
    for folder in (tmp_path / "out").glob("checkpoints/step-*"):
        assert (folder / "state.pt").exists()
    resumed = train(config.model_copy(update={"resume": True}))
    whole = train(config.model_copy(update={"out": str(tmp_path / "whole")}))
    assert (resumed.reason, resumed.step, resumed.best) == (whole.reason, whole.step, whole.best)
    [first, second] = [(tmp_path / name / "model" / FILE).read_text() for name in ("whole", "out")]
    assert first == second
    assert not list((tmp_path / "out").glob(".*"))


async def stop_command(arguments: list[str], line: bytes, number: signal.Signals) -> bytes:
    """Ends the command by a signal once it has printed a line; returns what it printed after it."""
    process = await start_perigee("reward", "train", *arguments)
    assert process.stdout is not None
    async for said in process.stdout:
        if said.startswith(line):
            break
    process.send_signal(number)
    rest = await process.stdout.read()
    assert await process.wait() == (128 + number if number is signal.SIGTERM else -number)
    return rest


FILE = "perigee_value_head.json"


@pytest.mark.parametrize(
    ("setting", "said"),
    [("loss=ranking", "loss: input should be"), ("epoch=3", "epoch: unknown key; did you mean epochs?")],
)
def test_the_command_names_what_is_wrong(tmp_path: Path, setting: str, said: str) -> None:
    folders = ("--data", str(tmp_path / "data.jsonl"), "--backbone", str(tmp_path), "--out", str(tmp_path / "o"))
    ended = invoke(("reward", "train", "--set", setting, *folders), None, None, {})
    assert ended.code == 2
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_more_tokens_than_the_backbone_reads_are_refused(tmp_path: Path, value_head_backbone: Path) -> None:
    write_lines(tmp_path / "data.jsonl", labelled_lines(make_sums(20, 2)))
    config = training_config(tmp_path, value_head_backbone).model_copy(update={"max_tokens": 4000})
    with pytest.raises(InvalidArgumentError, match="max_tokens: the backbone reads at most 128 tokens"):
        train(config)
