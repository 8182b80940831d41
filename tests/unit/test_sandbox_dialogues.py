"""Pipes between two sandboxes, and what is left of them when the call ends early."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvloop

from services.sandbox.judge.interactive import JUDGE, PROGRAM, Descriptors, relayed_pipes
from services.sandbox.judge.pairs import PairedRun
from services.sandbox.runtime.failure import UnjudgeableError
from services.sandbox.runtime.sandboxes import Sandbox
from services.sandbox.runtime.worker_slots import WorkerSlot


def open_names() -> set[str]:
    """Names of all that this process has open; services of other tests live here, too."""
    names: set[str] = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.add(str(path.readlink()))
    return names


@contextmanager
def opened_sandbox(folder: Path) -> Iterator[Sandbox]:
    """A sandbox that gets no request."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield Sandbox(ours, WorkerSlot("slot-0", 60001, folder, None))


async def test_a_pair_that_is_cancelled_as_it_begins_leaves_nothing_running(tmp_path: Path) -> None:
    ended = []

    async def talk(name: str) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(name)

    async def judge() -> None:
        with opened_sandbox(tmp_path) as sandbox:
            paired = PairedRun(sandbox, talk("program"), sandbox, talk("judge"))
            await paired.begin()

    task = asyncio.create_task(judge())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == ["judge", "program"]


async def test_what_is_said_is_relayed_both_ways() -> None:
    async with relayed_pipes(100, 100) as (ends, dialogue):
        program_in, program_out = os.dup(ends.program_stdin), os.dup(ends.program_stdout)
        judge_in, judge_out = os.dup(ends.judge_stdin), os.dup(ends.judge_stdout)
        ends.close()
        os.write(program_out, b"ask")
        assert await asyncio.to_thread(os.read, judge_in, 10) == b"ask"
        os.write(judge_out, b"answer")
        assert await asyncio.to_thread(os.read, program_in, 10) == b"answer"
        os.close(program_out)
        assert await asyncio.to_thread(os.read, judge_in, 10) == b""
        assert dialogue.left == [PROGRAM]
        os.write(judge_out, b"x" * 101)
        assert await asyncio.to_thread(os.read, program_in, 200) == b""
        assert dialogue.too_much == [JUDGE]
        for descriptor in (program_in, judge_in, judge_out):
            os.close(descriptor)


async def test_what_fails_in_a_dialogue_is_raised_as_it_is() -> None:
    with pytest.raises(UnjudgeableError, match="does not compile"):
        async with relayed_pipes(100, 100):
            raise UnjudgeableError("the checking program does not compile")


def test_one_that_goes_on_after_the_other_has_left_breaks_nothing() -> None:
    """uvloop closes the transport of a pipe without a reader between two writes, sooner or later."""

    def flood(pipe: int) -> None:
        with contextlib.suppress(BrokenPipeError):
            for _ in range(20_000):
                os.write(pipe, b"? 5\n")
        os.close(pipe)

    async def talk() -> list[str]:
        async with relayed_pipes(1 << 30, 100) as (ends, dialogue):
            program_out, judge_in = os.dup(ends.program_stdout), os.dup(ends.judge_stdin)
            ends.close()
            flooding = asyncio.create_task(asyncio.to_thread(flood, program_out))
            await asyncio.to_thread(os.read, judge_in, 100)
            os.close(judge_in)
            await flooding
            return dialogue.left

    for _ in range(10):
        assert uvloop.run(talk())[0] == JUDGE


@pytest.mark.parametrize("steps", range(6))
async def test_a_dialogue_that_is_cancelled_leaves_no_descriptor(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    open_pipe, made = Descriptors.open_pipe, set[str]()

    def open_and_note(self: Descriptors) -> tuple[int, int]:
        ends = open_pipe(self)
        made.add(str(Path(f"/proc/self/fd/{ends[0]}").readlink()))
        return ends

    monkeypatch.setattr(Descriptors, "open_pipe", open_and_note)

    async def hold() -> None:
        async with relayed_pipes(100, 100) as (ends, _):
            await asyncio.sleep(0)
            ends.close()
            await asyncio.sleep(60)

    task = asyncio.create_task(hold())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(5):  # transports close a step later
        await asyncio.sleep(0)
    assert len(made) == (4 if steps else 0)
    assert not made & open_names()
