"""`perigee up` and `perigee status` as a person runs them: real services as processes, ended by signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.fixtures.cli import Ended, invoke

PERIGEE = [sys.executable, "-m", "perigee.cli.main"]
START_S = 60.0


def run_perigee(*arguments: str) -> Ended:
    """Runs the command to its end in a thread of this process, where no event loop is in its way."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(invoke, arguments, None, None, {}).result(60)


class Stack:
    """A running `perigee up`."""

    def __init__(self, runs: Path, *arguments: str) -> None:
        self.runs = runs
        self._log = runs / "up.log"
        with self._log.open("w") as log:
            command = [*PERIGEE, "up", "--runs-dir", str(runs), *arguments]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.tree: list[psutil.Process] = []

    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + START_S
        while text not in self.output():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)
        self.tree += [p for p in psutil.Process(self.process.pid).children(recursive=True) if p not in self.tree]

    def service(self, name: str) -> psutil.Process:
        """The newest process of a service, not its guard."""
        own = psutil.Process(self.process.pid).children(recursive=True)
        return next(p for p in own if p.cmdline()[1:3] == ["-m", f"services.{name}"])

    def assert_nothing_left(self) -> None:
        """All processes that were ever seen are gone, and nothing else names the runs folder."""
        _, alive = psutil.wait_procs(self.tree, timeout=60)
        assert alive == []
        strays = [p.pid for p in psutil.process_iter() if _names(p, self.runs)]
        assert strays == []


def _names(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(str(folder) in argument for argument in process.cmdline())
    except psutil.Error:
        return False


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    started = Stack(tmp_path, "--only", "buffer")
    yield started
    if started.process.poll() is None:
        started.process.kill()
        started.process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(stack: Stack, number: signal.Signals) -> None:
    stack.wait_for("all services are ready")
    assert any("valkey-server" in p.name() for p in stack.tree)
    stack.process.send_signal(number)
    assert stack.process.wait(timeout=60) == 0
    stack.assert_nothing_left()
    assert "all services have ended" in stack.output()
    assert list(stack.runs.glob("*/stack.json")) == []


def test_status_shows_the_services_of_the_running_stack(stack: Stack) -> None:
    stack.wait_for("all services are ready")
    status = run_perigee("status", "--runs-dir", str(stack.runs))
    assert status.code == 0, status.stderr
    name, address, health = status.stdout.split()
    assert (name, health) == ("buffer", "SERVING")
    (stack_file,) = stack.runs.glob("*/stack.json")
    assert json.loads(stack_file.read_text())["addresses"] == {"buffer": address}


def test_a_stack_that_is_killed_leaves_no_process(stack: Stack) -> None:
    stack.wait_for("all services are ready")
    stack.process.kill()
    stack.process.wait()
    stack.assert_nothing_left()
    status = run_perigee("status", "--runs-dir", str(stack.runs))
    assert status.code == 1
    assert "no stack runs" in status.stderr


def test_a_second_signal_ends_a_stack_whose_service_hangs(stack: Stack) -> None:
    stack.wait_for("all services are ready")
    os.kill(stack.service("buffer").pid, signal.SIGSTOP)
    stack.process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert stack.process.poll() is None
    # Another one: of two that are pending the process would see one.
    stack.process.send_signal(signal.SIGTERM)
    stack.process.wait(timeout=60)
    stack.assert_nothing_left()


def test_a_dead_service_is_restarted_on_its_address(stack: Stack) -> None:
    stack.wait_for("all services are ready")
    first = stack.service("buffer")
    first.kill()
    stack.wait_for("buffer was ended by SIGKILL")
    stack.wait_for("restart 1 of 3")
    deadline = time.monotonic() + START_S
    while stack.output().count("buffer ready at") < 2:
        assert time.monotonic() < deadline, stack.output()
        time.sleep(0.1)
    status = run_perigee("status", "--runs-dir", str(stack.runs))
    assert status.stdout.split()[2] == "SERVING"
    assert stack.service("buffer").pid != first.pid
    stack.process.terminate()
    stack.process.wait(timeout=60)
    stack.assert_nothing_left()


def test_a_service_that_cannot_start_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = run_perigee(
        "up", "--only", "buffer", "--runs-dir", str(tmp_path), "--set", f"buffer.data_path={tmp_path / 'file' / 'x'}"
    )
    assert ended.code == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("perigee: buffer ended with exit code 1: ")
    assert "logs/buffer.log" in line
    assert "Traceback" not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("train", "nowhere"), 2, "nowhere: no such file; name a recipe file or a folder that holds recipe.yaml"),
        (("train",), 2, "RECIPE: is required, unless --resume names a run"),
        (("train", "--resume", "nothing"), 2, "nothing: no such run; runs holds no run"),
        (("report", "nothing"), 2, "nothing: no such run; runs holds no run"),
        (("up", "--only", "bufer"), 2, "--only: bufer is no service"),
        (("status", "--coordinator", "127.0.0.1:1"), 1, "127.0.0.1:1 cannot be reached"),
    ],
)
def test_a_mistake_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run_perigee(*arguments)
    assert ended.code == code
    (line,) = ended.stderr.splitlines()
    assert expected in line
    assert ended.stdout == ""
    assert list(tmp_path.iterdir()) == []
