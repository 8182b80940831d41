"""The figures that the loop's benchmark derives from what it measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from iteration_share import longest_others, measure_iteration_share
from token_budget import BudgetRatio
from workload import Round


def make_line(seconds: float, **phases: float) -> dict[str, Any]:
    """A line of metrics.jsonl with the fields that the benchmark reads."""
    line = {"time/iteration_seconds": seconds}
    for name, value in phases.items():
        line |= {f"time/{name}/start": 0.0, f"time/{name}/seconds": value}
    return line


def write_metrics(run: Path, *lines: dict[str, Any]) -> Path:
    """Writes a run folder's metrics.jsonl and returns the folder."""
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return run


def test_share_of_an_iteration_leaves_out_the_first_and_counts_gaps(tmp_path: Path) -> None:
    run = write_metrics(
        tmp_path,
        make_line(100.0, rollout=1.0, training=1.0),
        make_line(10.0, rollout=6.0, training=3.0, scoring=0.5),
        make_line(10.0, rollout=5.0, training=3.0, scoring=1.5),
        make_line(20.0, rollout=12.0, training=5.0, scoring=1.0, commit=0.5),
    )
    share = measure_iteration_share(run)
    assert share.seconds == [10.0, 10.0, 20.0]
    assert share.other == pytest.approx([0.1, 0.2, 0.15])
    assert share.median == pytest.approx(0.15)
    assert longest_others(run) == [("scoring", 1.0), ("commit", 0.0)]


def test_share_needs_two_iterations(tmp_path: Path) -> None:
    run = write_metrics(tmp_path, make_line(10.0, rollout=6.0, training=3.0))
    with pytest.raises(ValueError, match=r"metrics\.jsonl has fewer than two iterations"):
        measure_iteration_share(run)


def test_budget_ratios_tell_shorter_iterations_from_more_responses() -> None:
    within = [Round(seconds=2.0, finished=["a"] * 6), Round(seconds=2.0, finished=["b"] * 4)]
    without = [Round(seconds=8.0, finished=["c"] * 16), Round(seconds=6.0, finished=["d"] * 12)]
    ratio = BudgetRatio(within, without)
    assert ratio.iteration_ratio == pytest.approx(3.5)
    assert ratio.finished_ratio == pytest.approx((10 / 4) / (28 / 14))
