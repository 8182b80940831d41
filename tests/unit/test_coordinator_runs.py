"""A start of a run outlasts the caller that asked for it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perigee.errors import AbortedError, InvalidArgumentError, NotFoundError
from perigee.rollout.client import RolloutClient
from services.coordinator import runs
from services.coordinator.config import CoordinatorConfig
from services.coordinator.context import Peers, RunContext, RunInputs
from services.coordinator.directory import MemoryDirectory
from services.coordinator.run_config import RunConfig
from services.coordinator.runs import RUN_FILE, RunFile, Runs, read_run_file
from services.coordinator.workers import WorkerRegistry

SECTION = "{prompts: p, heldout: h, iterations: 1}"


class SlowRuns(Runs):
    """Runs whose prompts are read for as long as the test says; what is launched is only counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        registry = WorkerRegistry(RolloutClient.connect, lease_seconds=10.0)
        super().__init__(CoordinatorConfig(), Peers(None, None, None), registry, MemoryDirectory(registry))  # type: ignore[arg-type]
        self.launched: list[str] = []
        self.reads, self.error = 0, False
        self.reading, self.may_end = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def read(run_id: str, config: RunConfig, run_path: Path, *_: object) -> Any:
            self.reads += 1
            loop.call_soon_threadsafe(self.reading.set)
            assert self.may_end.wait(60)
            if self.error:
                raise InvalidArgumentError.for_field("run.prompts", "is wrong")
            return SimpleNamespace(run_id=run_id, run_path=run_path, config=config)

        monkeypatch.setattr(runs, "read_inputs", read)

    async def _find_model(self, config: RunConfig, folder: Path) -> str:
        return ""

    async def _check_algorithm(self, inputs: RunInputs) -> None:
        """Nobody to ask."""

    def _launch(self, file: RunFile, inputs: RunInputs) -> None:
        self.launched.append(file.run_id)
        super()._launch(file, inputs)

    async def _execute(self, file: RunFile, context: RunContext) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("fails", [False, True])
async def test_who_asks_again_joins_a_start_whose_caller_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    slow = SlowRuns(monkeypatch)
    slow.error = fails
    first = asyncio.create_task(slow.start("r", SECTION, str(tmp_path)))
    await slow.reading.wait()
    first.cancel()
    await asyncio.wait([first])
    again = asyncio.create_task(slow.start("r", SECTION, str(tmp_path)))
    await asyncio.sleep(0)
    slow.may_end.set()
    if fails:
        with pytest.raises(InvalidArgumentError, match="is wrong"):
            await again
    else:
        assert not await again
    assert (slow.reads, slow.launched) == (1, [] if fails else ["r"])
    await slow.close()


async def test_a_start_ends_with_the_coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowRuns(monkeypatch)
    start = asyncio.create_task(slow.start("r", SECTION, str(tmp_path)))
    await slow.reading.wait()
    slow.may_end.set()
    await slow.close()
    with pytest.raises(AbortedError):
        await start
    assert not slow.launched


async def test_a_run_is_stopped_while_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowRuns(monkeypatch)
    starts = [asyncio.create_task(slow.start("r", SECTION, str(tmp_path))) for _ in range(2)]
    await slow.reading.wait()
    await slow.stop("r")
    slow.may_end.set()
    for start in starts:
        with pytest.raises(AbortedError, match="Run r was stopped while it started"):
            await start
    with pytest.raises(NotFoundError):
        await slow.stop("r")
    assert not slow.launched


async def test_a_run_that_is_stopped_while_run_json_is_written_is_stopped_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, save = SlowRuns(monkeypatch), Runs._save
    slow.may_end.set()
    loop, writing, may_write = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def save_late(self: Runs, file: RunFile) -> None:
        if file.status == "running":
            loop.call_soon_threadsafe(writing.set)
            assert may_write.wait(60)
        save(self, file)

    monkeypatch.setattr(Runs, "_save", save_late)
    start = asyncio.create_task(slow.start("r", SECTION, str(tmp_path)))
    await writing.wait()
    stop = asyncio.create_task(slow.stop("r"))
    await asyncio.sleep(0)
    may_write.set()
    await stop
    with pytest.raises(AbortedError):
        await start
    file = read_run_file(tmp_path / RUN_FILE)
    assert file is not None
    assert file.status == "stopped"
