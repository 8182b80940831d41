"""A run with trajectories of four iterations: resumed from files by another worker, and trained in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from perigee.files import read_lines
from tests.fixtures.long_run import write_long_recipe
from tests.fixtures.training import find_service, kill_services, train_command

pytestmark = [
    pytest.mark.timeout(4 * 3600),
    pytest.mark.skipif("PERIGEE_TEST_LONG" not in os.environ, reason="takes minutes: make test-long"),
]
MIB = 1 << 20
# Tokens of a long response, and MiB that a process may grow by while it has them.
LENGTHS = [4096, 131_072]
MOST_MIB = 64


class MemoryWatch:
    """Largest resident memory of processes, in MiB, by iteration; read twice a second in a thread of its own."""

    def __init__(self, runs: Path, command: int) -> None:
        self.peaks: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._runs = runs
        self._command = psutil.Process(command)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        found: dict[str, psutil.Process] = {"client": self._command}
        while not self._stop.wait(0.5):
            iteration = len(read_iterations(self._runs))
            for name in ("buffer", "coordinator"):
                if name not in found or not found[name].is_running():
                    try:
                        found[name] = find_service(self._runs, name)
                    except (pytest.fail.Exception, psutil.Error, ValueError):
                        continue
            for name, process in found.items():
                try:
                    resident = process.memory_info().rss / MIB
                except psutil.Error:
                    continue
                self.peaks[name][iteration] = max(self.peaks[name][iteration], resident)

    def growth(self, name: str) -> float:
        """By how much a process was larger in any iteration than in the first, which starts it."""
        peaks = self.peaks[name]
        return max(peaks.values()) - peaks[0]


def read_iterations(runs: Path) -> list[dict[str, Any]]:
    """Lines of the only run's metrics.jsonl."""
    return [line for path in runs.glob("long-*/metrics.jsonl") for line in read_lines(path)]


def cpu_seconds(process: psutil.Process) -> float:
    """CPU seconds of a process and of what it has started and waited for."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_long_trajectories_are_resumed_and_trained_with_bounded_memory(tmp_path: Path, tokens: int) -> None:
    write_long_recipe(tmp_path, tokens)
    runs = tmp_path / "runs"
    started = time.monotonic()
    with (tmp_path / "output").open("w") as output:
        command = subprocess.Popen(
            train_command(runs, str(tmp_path), "--workers", "2"), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            with MemoryWatch(runs, command.pid) as memory:
                # One of the two workers dies while it has a trajectory of the second iteration.
                while not read_iterations(runs) and command.poll() is None:
                    time.sleep(0.2)
                assert command.poll() is None, (tmp_path / "output").read_text()
                [line] = read_iterations(runs)
                time.sleep(line["time/rollout/seconds"] / 3)
                kill_services(runs, "rollout")
                command.wait()
        finally:
            command.kill()
            command.wait()
    printed = (tmp_path / "output").read_text()
    assert command.returncode == 0, printed[-4000:]
    [run] = [path for path in runs.iterdir() if not path.is_symlink()]
    lines = read_iterations(runs)
    summary = json.loads((run / "summary.json").read_text())
    print(json.dumps({"tokens": tokens, "seconds": time.monotonic() - started, "memory": memory.peaks}))
    for line in lines:
        print(json.dumps({key: value for key, value in line.items() if isinstance(value, int | float)}))
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    # Both long responses have all of their tokens, from four versions, and were trained with the last.
    assert lines[-1]["train/trajectories"] >= 2
    assert lines[-1]["train/tokens"] >= 2 * tokens
    assert summary["trajectories_multi_version"] == 2
    assert summary["tokens_generated"] >= 2 * tokens
    assert 0 < summary["train_infer_logprob_diff_max"] < 1e-3
    assert "rollout-0 was ended by SIGKILL" in printed or "rollout-1 was ended by SIGKILL" in printed
    # Three quarters of each; the last may be about to move when the run ends.
    assert len(list(tmp_path.glob("files/*/*"))) >= 6
    for name in ("buffer", "coordinator", "client"):
        assert memory.growth(name) < MOST_MIB, (name, memory.peaks[name])
