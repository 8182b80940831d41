"""The whole system on a small run: supervised stages, iterations, evaluations, report, resume after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from tests.fixtures.training import TrainedRun, processes_below, train_command

pytestmark = pytest.mark.timeout(600)


def test_every_iteration_trains_and_makes_the_next_version(trained_run: TrainedRun) -> None:
    lines = trained_run.iterations
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    trained = [line for line in lines if line["train/trajectories"]]
    assert len(trained) >= 2
    versions = [line["policy_version"] for line in lines]
    assert versions == sorted(versions)
    assert versions[-1] == 1 + len(trained)


def test_rollout_and_trainer_agree_on_every_token(trained_run: TrainedRun) -> None:
    assert 0 < trained_run.summary["train_infer_logprob_diff_max"] < 1e-3


def test_trajectories_span_policy_versions(trained_run: TrainedRun) -> None:
    summary = trained_run.summary
    assert summary["trajectories_multi_version"] > 0
    assert summary["trajectories_trained"] > summary["trajectories_multi_version"]
    assert summary["tokens_generated"] == sum(line["rollout/tokens"] for line in trained_run.iterations)


def test_the_summary_has_intervals_for_every_domain(trained_run: TrainedRun) -> None:
    for kind in ("accuracy_baseline", "accuracy_final"):
        accuracy = trained_run.summary[kind]
        assert set(accuracy) == {"overall", "math", "code"}
        for way in ("greedy", "sampled"):
            for domain in accuracy.values():
                assert 0 <= domain[way]["low"] <= domain[way]["mean"] <= domain[way]["high"] <= 1


def test_the_report_and_the_files_are_there(trained_run: TrainedRun) -> None:
    report = (trained_run.path / "report.html").read_text()
    assert trained_run.path.name in report
    assert "plotly" in report.lower()
    assert list((trained_run.path / "tensorboard").glob("events.out.tfevents*"))
    assert "report:" in trained_run.output
    assert (trained_run.path / "recipe.yaml").is_file()


def test_the_final_model_loads_in_transformers(trained_run: TrainedRun) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained_run.path / "model")
    model = AutoModelForCausalLM.from_pretrained(trained_run.path / "model", dtype=torch.float32)
    tokens = tokenizer("3+4=", return_tensors="pt", add_special_tokens=False).input_ids
    answer = model.generate(tokens, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > tokens.shape[1]


def test_nothing_is_left_running(trained_run: TrainedRun) -> None:
    assert processes_below(trained_run.path.parent) == []


def test_a_killed_coordinator_and_worker_do_not_end_the_run_and_ctrl_c_does(trained_run: TrainedRun) -> None:
    """Goes on with the finished run for four iterations more, with two workers, and kills in the midst of it."""
    runs, tokens_before = trained_run.path.parent, trained_run.summary["tokens_generated"]
    with going_on(trained_run, "--workers", "2") as command:
        wait_for_iteration(trained_run, 4, command)
        kill_service(trained_run.path, "coordinator")
        wait_for_iteration(trained_run, 5, command)
        kill_service(trained_run.path, "rollout")
        wait_for_iteration(trained_run, 6, command)
        command.send_signal(signal.SIGINT)
        output, _ = command.communicate(timeout=400)
    assert command.returncode == 128 + signal.SIGINT, output
    assert "coordinator was ended by SIGKILL" in output
    assert f"go on with: perigee train --resume {trained_run.path.name}" in output
    assert [line["iteration"] for line in trained_run.iterations][:6] == [1, 2, 3, 4, 5, 6]
    assert sum(line["rollout/tokens"] for line in trained_run.iterations) > tokens_before
    assert processes_below(runs) == []
    assert not (trained_run.path / "stack.json").exists()


def test_a_run_that_ctrl_c_ended_goes_on_to_its_end(trained_run: TrainedRun) -> None:
    with going_on(trained_run) as command:
        output, _ = command.communicate(timeout=400)
    assert command.returncode == 0, output
    assert f"going on with {trained_run.path.name}" in output
    assert f"report: {trained_run.path / 'report.html'}" in output
    assert [line["iteration"] for line in trained_run.iterations] == [1, 2, 3, 4, 5, 6, 7]
    assert sum(line["rollout/tokens"] for line in trained_run.iterations) == trained_run.summary["tokens_generated"]
    assert processes_below(trained_run.path.parent) == []
    assert json.loads((trained_run.path / "model" / "config.json").read_text())["model_type"] == "qwen2"
    page = (trained_run.path / "report.html").read_text()
    assert trained_run.path.name in page
    assert "<figure id='timeline'>" in page


@contextmanager
def going_on(run: TrainedRun, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`perigee train --resume` of the run; ended, should the test fail."""
    overrides = {"run.iterations": "7", "run.evaluation.every": "0", "run.evaluation.samples": "1"}
    line = train_command(run.path.parent, "--resume", run.path.name, *arguments, **overrides)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as command:
        try:
            yield command
        finally:
            command.send_signal(signal.SIGTERM)


def wait_for_iteration(run: TrainedRun, number: int, command: subprocess.Popen[str]) -> None:
    """Until metrics.jsonl has the iteration's line; fails when the command ends before."""
    deadline = time.monotonic() + 300
    while f'"iteration": {number},' not in (run.path / "metrics.jsonl").read_text():
        assert command.poll() is None, command.communicate()[0]
        assert time.monotonic() < deadline, f"iteration {number} did not come"
        time.sleep(0.05)


def kill_service(run: Path, service: str) -> None:
    """SIGKILL to one process of the service."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if (
            f"services.{service}" in line
            and any(str(run) in part for part in line)
            and "guard.py" not in " ".join(line)
        ):
            process.kill()
            return
    pytest.fail(f"no process of {service} runs")
