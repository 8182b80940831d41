"""Accuracy against response length: figures of each model, what a method misses, and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perigee.cli.long2short.comparison import make_rows, show_table, write_comparison
from perigee.cli.long2short.config import ComparisonConfig
from perigee.errors import FailedPreconditionError
from perigee.statistics import ratio_interval

BOUNDS = ComparisonConfig(min_shortening=0.25, max_accuracy_loss=0.05)


def answers(tokens: int, rights: Sequence[bool], problems: int = 20) -> list[dict[str, Any]]:
    """Responses to some problems, one greedy and as many sampled as `rights` has; their length differs by problem."""
    return [
        {
            "suite": "sums", "id": f"p{problem}", "domain": "math", "attempt": name, "tokens": tokens + problem % 2,
            "truncated": False, "verdict": "correct" if right else "wrong", "answer": "1", "digest": "d",
        }
        for problem in range(problems)
        for name, right in [("greedy", rights[0]), *((f"sample-{n}", right) for n, right in enumerate(rights))]
    ]  # fmt: skip


def test_figures_are_those_of_the_responses() -> None:
    long, short = make_rows({"long": answers(20, [True, True]), "merge": answers(10, [True, False])}, BOUNDS)
    assert (long.accuracy.mean, long.tokens.mean, long.shortening) == (1.0, 20.5, None)
    assert (short.accuracy.mean, short.tokens.mean, short.problems, short.samples) == (0.5, 10.5, 20, 2)
    assert short.tokens_per_right is not None
    assert short.tokens_per_right.mean == pytest.approx(21.0)
    assert short.shortening is not None
    assert short.shortening.mean == pytest.approx(1 - 10.5 / 20.5)
    assert short.shortening.low < short.shortening.mean < short.shortening.high
    assert short.accuracy_loss is not None
    assert short.accuracy_loss.mean == pytest.approx(0.5)


def test_a_method_misses_a_bound_by_name() -> None:
    long = answers(20, [True] * 4)
    found = make_rows(
        {
            "long": long,
            "short": answers(1, [False] * 4),
            "merge": answers(10, [True] * 4),
            "rejection": answers(19, [True] * 4),
            "dpo": answers(19, [True, True, True, False]),
        },
        BOUNDS,
    )
    assert {row.name: row.result for row in found} == {
        "long": "",
        "short": "",
        "merge": "within the bounds",
        "rejection": "shorter by 4.9%, less than 25%",
        "dpo": "shorter by 4.9%, less than 25%; loses 0.250 of accuracy, more than 0.05",
    }


def test_responses_without_a_verdict_are_left_out() -> None:
    failed = [line | {"verdict": "failed", "tokens": None} for line in answers(50, [True])]
    [row] = make_rows({"long": [*answers(10, [True]), *(each | {"attempt": "sample-9"} for each in failed)]}, BOUNDS)
    assert (row.tokens.mean, row.failures) == (10.5, len(failed))
    with pytest.raises(FailedPreconditionError, match="no sampled response of long to sums has a verdict"):
        make_rows({"long": failed}, BOUNDS)


def test_one_problem_has_no_interval() -> None:
    with pytest.raises(FailedPreconditionError, match="one problem of sums alone has verdicts for long"):
        make_rows({"long": answers(20, [True], problems=1)}, BOUNDS)


def test_a_model_without_a_right_response_has_no_tokens_per_right_one() -> None:
    [row] = make_rows({"long": answers(10, [False])}, BOUNDS)
    assert row.tokens_per_right is None


def test_page_table_and_json_have_each_model(tmp_path: Path) -> None:
    rows = make_rows({"long": answers(20, [True]), "rl": answers(10, [True])}, BOUNDS)
    write_comparison(tmp_path, rows, ["rl: <12> iterations"], "sums")
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert [(row["name"], row["result"]) for row in values["rows"]] == [("long", ""), ("rl", "within the bounds")]
    page = (tmp_path / "report.html").read_text()
    assert "rl: &lt;12&gt; iterations" in page
    assert page.count("<tr>") == 3


@pytest.mark.parametrize("tokens", [10, 500, 20_000])
def test_tables_fit_a_terminal_of_80_columns(tokens: int) -> None:
    methods = {name: answers(tokens, [True, False]) for name in ("merge", "rejection", "dpo", "rl")}
    rows = make_rows({"long": answers(2 * tokens, [True, False]), **methods}, BOUNDS)
    console = Console(record=True, width=80)
    show_table(rows, [], console)
    lines = console.export_text().splitlines()
    assert lines[-4:] == [f"{name}: within the bounds" for name in methods]
    # A heading and a line for each model, twice.
    assert [line.split()[0] for line in lines[:14] if line] == ["model", "long", *methods] * 2


def test_a_ratio_has_the_interval_of_its_estimator() -> None:
    interval = ratio_interval([(2.0, 1.0), (4.0, 1.0), (6.0, 1.0)])
    assert interval.mean == 4.0
    # The standard error of the mean of 2, 4 and 6 is 2 / sqrt(3).
    assert interval.high - interval.mean == pytest.approx(1.959964 * 2 / 3**0.5)
    assert ratio_interval([(6.0, 2.0), (3.0, 1.0)]).high == 3.0
    with pytest.raises(ValueError, match="positive sum"):
        ratio_interval([(1.0, 0.0)])
