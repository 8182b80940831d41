"""Child processes: the line of a log that tells why one ended, ready lines, and their end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from perigee.errors import UnavailableError
from services.kit.process import ChildProcess, last_error, last_words

INFO = json.dumps({"event": "listening", "level": "info"})


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], ""),
        ([INFO], ""),
        ([INFO, "", "no space left, giving up"], ""),
        (
            ["Traceback (most recent call last):", '  File "x.py", line 1', "ValueError: bad", INFO],
            "ValueError: bad",
        ),
        (["trainer: model: /x is no Hugging Face folder", INFO], "trainer: model: /x is no Hugging Face folder"),
        (
            [json.dumps({"event": "engine died", "level": "error", "error": "out of memory"}), INFO],
            "engine died: out of memory",
        ),
        (
            [json.dumps({"event": "failed", "level": "error", "exception": "Traceback\n  x\nOSError: disk full"})],
            "failed: OSError: disk full",
        ),
        (
            ["ERROR asyncio: Task exception was never retrieved", "{not json"],
            "ERROR asyncio: Task exception was never retrieved",
        ),
        (["torch.cuda.OutOfMemoryError: no memory"], "torch.cuda.OutOfMemoryError: no memory"),
    ],
)
def test_the_last_error_is_found(lines: list[str], expected: str) -> None:
    assert last_error(lines) == expected


def test_the_last_words_are_no_record() -> None:
    assert last_words(["first", "no space left, giving up", "", INFO]) == "no space left, giving up"
    assert last_words([INFO]) == ""


def test_an_endless_line_is_cut() -> None:
    assert len(last_error(["ValueError: " + "x" * 10_000])) == 300


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def test_a_child_says_that_it_is_ready_and_answers() -> None:
    echo = python("print('ready', flush=True); print(input()[::-1], flush=True)")
    child = await ChildProcess.start("echo", echo, with_pipes=True)
    assert await child.read_ready_line(60) == b"ready\n"
    child.stdin.write(b"abc\n")
    assert await child.stdout.readline() == b"cba\n"
    assert await child.wait() == 0


async def test_a_child_that_ends_before_it_is_ready_is_an_error(tmp_path: Path) -> None:
    child = await ChildProcess.start(
        "x", python("raise SystemExit('no model')"), with_pipes=True, log_path=tmp_path / "x"
    )
    with pytest.raises(UnavailableError, match="x ended with exit code 1: no model"):
        await child.read_ready_line(60)


async def test_a_child_that_is_not_ready_in_time_is_ended() -> None:
    child = await ChildProcess.start("x", python("import time; time.sleep(600)"), with_pipes=True)
    with pytest.raises(UnavailableError, match=r"x was not ready within 0\.2 s"):
        await child.read_ready_line(0.2)
    assert child.exit_code == 128 + signal.SIGKILL


async def test_a_child_that_ignores_sigterm_is_killed_with_its_group(tmp_path: Path) -> None:
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); pid = os.fork()\n"
        "if pid: print(pid, flush=True)\n"
        "time.sleep(600)"
    )
    child = await ChildProcess.start("x", python(code), with_pipes=True, grace_s=0.1)
    grandchild = psutil.Process(int(await child.read_ready_line(60)))
    assert await child.stop() == 128 + signal.SIGKILL
    assert psutil.wait_procs([grandchild], timeout=60)[1] == []


async def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    child = await ChildProcess.start("x", ["/nowhere/program"], log_path=tmp_path / "x.log")
    assert "/nowhere/program cannot be started: [Errno 2]" in child.describe_end(await child.wait())


def test_a_child_dies_with_its_parent() -> None:
    owner_code = """
import asyncio, sys
from services.kit.process import ChildProcess

async def main():
    child = await ChildProcess.start("x", [sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
    with subprocess.Popen(python(owner_code), stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child = psutil.Process(int(owner.stdout.readline()))
        os.kill(owner.pid, signal.SIGKILL)
    assert psutil.wait_procs([child], timeout=60)[1] == []
