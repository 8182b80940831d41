"""The whole system on a small run: supervised stages, iterations, evaluations, report, resume after a kill."""

from __future__ import annotations

import signal
import subprocess
import time
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
    for moment in ("accuracy_before", "accuracy_after"):
        accuracy = trained_run.summary[moment]
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


def test_a_killed_coordinator_and_worker_do_not_end_the_run(trained_run: TrainedRun) -> None:
    """Goes on with the finished run for three iterations more, with two workers, and kills in the midst of it."""
    runs = trained_run.path.parent
    tokens_before = trained_run.summary["tokens_generated"]
    overrides = {"run.iterations": "6", "run.evaluation.every": "0", "run.evaluation.samples": "1"}
    command = train_command(runs, "--resume", trained_run.path.name, "--workers", "2", **overrides)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as going_on:
        try:
            wait_for_iteration(trained_run.path, 4, going_on)
            kill_service(trained_run.path, "coordinator")
            wait_for_iteration(trained_run.path, 5, going_on)
            kill_service(trained_run.path, "rollout")
            output, _ = going_on.communicate(timeout=400)
        finally:
            going_on.send_signal(signal.SIGTERM)
    assert going_on.returncode == 0, output
    lines = trained_run.iterations
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert sum(line["rollout/tokens"] for line in lines) == trained_run.summary["tokens_generated"] > tokens_before
    assert processes_below(runs) == []


def wait_for_iteration(run: Path, number: int, command: subprocess.Popen[str]) -> None:
    """Until metrics.jsonl has the iteration's line; fails when the command ends before."""
    deadline = time.monotonic() + 300
    while f'"iteration": {number},' not in (run / "metrics.jsonl").read_text():
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
