"""`perigee train` on the real engines: a dead coordinator, Ctrl-C, the rest of the run later, and no process left."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from perigee.cli.run_folder import find_run
from perigee.report.records import read_records

ROOT = Path(__file__).parents[2]
# The prepare script of the example, cut to as many held-out problems as a test needs.
PREPARE = f"""
import pathlib, subprocess, sys
subprocess.run([sys.executable, {str(ROOT / "examples" / "arithmetic" / "prepare.py")!r}, *sys.argv[1:]], check=True)
heldout = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) / "heldout.jsonl"
lines = heldout.read_text().splitlines(keepends=True)
heldout.write_text("".join(lines[:: max(1, len(lines) // 24)]))
"""
RECIPE = """
name: small
prepare: prepare.py
run:
  model: "{data}/model"
  prompts: "{data}/prompts.jsonl"
  heldout: "{data}/heldout.jsonl"
  iterations: 4
  sft: [{dataset: "{data}/sft_easy.jsonl", steps: 3, batch_size: 8}]
  max_live_groups: 12
  group_size: 4
  drop_uniform_groups: false
  rollout: {token_budget: 16, max_response_tokens: 48}
  evaluation: {samples: 1}
rollout: {model: "{data}/model", max_num_seqs: 64, kv_cache_bytes: 67108864}
trainer: {model: "{data}/model", threads: 1}
"""
STEP_S = 240.0


class Training:
    """A running `perigee train`."""

    def __init__(self, runs: Path, *arguments: str) -> None:
        self._log = runs / f"train-{time.monotonic_ns()}.log"
        with self._log.open("w") as log:
            command = [sys.executable, "-m", "perigee.cli.main", "train", "--runs-dir", str(runs), *arguments]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + STEP_S
        while text not in self.output():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)

    def kill_service(self, name: str) -> None:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if process.cmdline()[1:3] == ["-m", f"services.{name}"]:
                    process.kill()
                    return
            except psutil.NoSuchProcess:  # a box of the sandbox that has ended
                continue
        raise AssertionError(f"no process of {name}")


def processes_naming(folder: Path) -> list[list[str]]:
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if any(str(folder) in argument for argument in command):
            found.append(command)
    return found


@pytest.mark.timeout(900)
def test_a_run_outlives_its_coordinator_and_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "prepare.py").write_text(PREPARE)

    first = Training(tmp_path, str(tmp_path))
    try:
        first.wait_for("iteration 1 of 4  reward")
        first.kill_service("coordinator")
        first.wait_for("coordinator was ended by SIGKILL")
        first.wait_for("iteration 2 of 4  reward")
        first.process.send_signal(signal.SIGINT)
        assert first.process.wait(timeout=STEP_S) == 128 + signal.SIGINT, first.output()
    finally:
        first.process.kill()
        first.process.wait()
    run = find_run(tmp_path, "latest")
    assert f"go on with: perigee train --resume {run.run_id}" in first.output()
    assert processes_naming(run.path) == []
    assert run.read_stack() is None
    committed = [row.number for row in read_records(run.path).iterations]
    assert committed[:2] == [1, 2]

    second = Training(tmp_path, "--resume", run.run_id)
    try:
        assert second.process.wait(timeout=2 * STEP_S) == 0, second.output()
    finally:
        second.process.kill()
        second.process.wait()
    assert f"going on with {run.run_id}" in second.output()
    assert f"report: {run.path / 'report.html'}" in second.output()
    assert processes_naming(run.path) == []
    records = read_records(run.path)
    assert [row.number for row in records.iterations] == [1, 2, 3, 4]
    assert records.before is not None
    assert records.after is not None
    assert json.loads((run.path / "model" / "config.json").read_text())["model_type"] == "qwen2"
    page = (run.path / "report.html").read_text()
    assert run.run_id in page
    assert "<figure id='timeline'>" in page
