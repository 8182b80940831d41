"""The trainer's processes: a bad model, a dead rank, a dead launcher, a full disk, an interrupted write."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from perigee.errors import PerigeeError, UnavailableError
from perigee.trainer.client import TrainerClient
from perigee.trainer.v1 import trainer_pb2 as pb
from tests.fixtures.trainer import write_dataset, write_model

START_S = 90


@pytest.fixture
async def start_trainer(tmp_path: Path, trainer_model: Path) -> AsyncIterator[Callable[..., Any]]:
    """A function that starts `python -m services.trainer`; its processes are gone after the test."""
    async with AsyncExitStack() as stack:

        async def start(**fields: object) -> tuple[asyncio.subprocess.Process, TrainerClient]:
            settings = {"model": trainer_model, "run_path": tmp_path / "run", "threads": 1} | fields
            process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "services.trainer", "--set", "server.drain_seconds=0.5"],
                *[item for key, value in settings.items() for item in ("--set", f"{key}={value}")],
                stderr=asyncio.subprocess.PIPE,
                env={key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")},
            )
            stack.push_async_callback(_end, process)
            assert process.stderr is not None
            async with asyncio.timeout(START_S):
                async for line in process.stderr:
                    if match := re.search(r'"address": "([\d.:]+)".*"event": "listening"', line.decode()):
                        reading = asyncio.create_task(process.stderr.read())
                        stack.push_async_callback(_cancel, reading)
                        return process, await stack.enter_async_context(TrainerClient.connect(match[1]))
            raise AssertionError("the trainer ended before it listened")

        yield start


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


async def _cancel(task: asyncio.Task[bytes]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def run_trainer(*overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs a trainer that is expected to end by itself."""
    command = [sys.executable, "-m", "services.trainer", *(item for o in overrides for item in ("--set", o))]
    return subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)


def test_a_folder_that_is_no_model_ends_in_one_message(tmp_path: Path) -> None:
    ended = run_trainer(f"model={tmp_path}", f"run_path={tmp_path / 'run'}", "tensor_parallel=2")
    assert ended.returncode != 0
    problem = f"{tmp_path / 'config.json'} cannot be read: No such file or directory"
    assert ended.stderr.splitlines() == [f"trainer: trainer.model: {problem}"]
    assert not (tmp_path / "run").exists()


def test_damaged_weights_end_in_a_message_that_names_the_file(tmp_path: Path, trainer_model: Path) -> None:
    model = shutil.copytree(trainer_model, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    ended = run_trainer(f"model={model}", f"run_path={tmp_path / 'run'}")
    assert ended.returncode != 0
    assert f"trainer: {weights} cannot be read" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_the_death_of_a_rank_ends_the_whole_trainer(start_trainer: Callable[..., Any], tmp_path: Path) -> None:
    process, client = await start_trainer(tensor_parallel=2)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "services.trainer" in p.cmdline()]
    assert len(ranks) == 2
    state = await client.get_state(pb.GetStateRequest(run_id="r"))
    assert (state.world_size, state.tensor_parallel) == (2, 2)
    request = pb.FineTuneRequest(
        run_id="r",
        dataset_path=str(write_dataset(tmp_path / "data.jsonl", 50)),
        steps=100_000,
        batch_size=8,
        max_tokens_per_microbatch=64,
        optimizer=pb.Optimizer(learning_rate=1e-3, beta1=0.9, beta2=0.95),
        new_version=1,
    )
    job = client.fine_tune(request, timeout_s=60)
    await anext(job)
    follower = next(p for p in ranks if p.environ()["RANK"] == "1")
    follower.send_signal(signal.SIGKILL)
    with pytest.raises(UnavailableError):
        [_ async for _ in job]
    assert await asyncio.wait_for(process.wait(), 60) != 0
    assert not [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_no_rank_outlives_the_launcher(start_trainer: Callable[..., Any], number: signal.Signals) -> None:
    process, _ = await start_trainer(data_parallel=2)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    await asyncio.wait_for(process.wait(), 60)
    _, alive = await asyncio.to_thread(psutil.wait_procs, ranks, 30)
    assert not alive


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 KiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs leave to mount a tmpfs: a full disk for checkpoints")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


async def test_a_full_disk_is_named_and_leaves_nothing_half_written(
    start_trainer: Callable[..., Any], tmp_path: Path, small_disk: Path
) -> None:
    """What a trainer that was killed had half-written is removed first."""
    model = write_model(tmp_path / "model", hidden_size=128)
    staging = small_disk / "checkpoints" / "r" / ".v000003.deadbeef"
    staging.mkdir(parents=True)
    (staging / "shard-0").write_bytes(b"half")
    _, client = await start_trainer(model=model, run_path=small_disk)
    assert not staging.exists()
    await client.load_checkpoint(pb.LoadCheckpointRequest(run_id="r"))
    with pytest.raises(PerigeeError, match=rf"{small_disk}.*No space left on device"):
        await client.save_checkpoint(pb.SaveCheckpointRequest(run_id="r", policy_version=0))
    assert list((small_disk / "checkpoints" / "r").iterdir()) == []
    assert list((await client.get_state(pb.GetStateRequest(run_id="r"))).checkpoints) == []
    remount = await asyncio.create_subprocess_exec("mount", "-o", "remount,size=10m", str(small_disk))
    assert await remount.wait() == 0
    await client.save_checkpoint(pb.SaveCheckpointRequest(run_id="r", policy_version=0))
    assert list((await client.get_state(pb.GetStateRequest(run_id="r"))).checkpoints) == [0]
