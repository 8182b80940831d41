"""Samples of a run: all kinds represented, the same ones by seed, and none twice after a crash."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from perigee.cli.main import app
from perigee.files import append_lines
from perigee.report.ranges import RANGES, find_warnings
from perigee.report.samples import Sample, SampleFilter, choose, read_samples, shorten, to_line
from services.coordinator.run_log import RunLog


def make(number: int, verdict: str = "wrong", end: str = "stop", iteration: int = 1, evaluation: str = "") -> Sample:
    return Sample(
        iteration, evaluation, f"t{number}", "p", "math", "1+1=", "so:\t2\u2028\x1b[31m", 3, [0], end, verdict, 0.0
    )


MANY = [
    *(make(number) for number in range(50)),
    make(60, "correct"),
    make(61, "ungradable"),
    make(62, end="max_response_tokens"),
    make(63, end="repetition"),
]


def test_every_kind_is_represented_whatever_the_order() -> None:
    chosen = choose(MANY, 6, seed=3)
    assert Counter(sample.kind for sample in chosen) == {
        "right": 1,
        "wrong": 2,
        "ungradable": 1,
        "capped": 1,
        "repeated": 1,
    }
    assert choose(reversed(MANY), 6, seed=3) == chosen
    assert choose(MANY, 6, seed=4) != chosen


def test_a_long_text_keeps_beginning_and_end() -> None:
    text = shorten("a" + "ä" * 1000 + "z", 100)
    assert (text[0], text[-1]) == ("a", "z")
    assert "1,902 bytes left out" in text
    assert shorten("short", 100) == "short"


def test_what_is_made_again_after_a_crash_is_read_and_sent_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.add_samples([make(1), make(2)])
    log.add_samples([make(3, iteration=2)])
    log.add_samples([make(4, iteration=1, evaluation="periodic")])
    log.add_samples([make(3, iteration=2)])
    log.add_samples([make(3, iteration=2), make(5, iteration=2)])
    assert [sample.id for sample in read_samples(tmp_path)] == ["t1", "t2", "t3", "t4", "t5"]
    for each in (log, RunLog(tmp_path)):
        assert [len(each.samples("", iteration)) for iteration in (1, 2, 3)] == [2, 2, 0]
    log.close()


def test_filters() -> None:
    samples = [*MANY, make(70, "correct", evaluation="final"), make(71, iteration=2)]
    for chosen, count in (
        (SampleFilter(), 56),
        (SampleFilter(verdict="capped"), 1),
        (SampleFilter(verdict="correct"), 2),
        (SampleFilter(evaluation="final"), 1),
        (SampleFilter(evaluation="none"), 55),
        (SampleFilter(iteration=2), 1),
        (SampleFilter(domain="code"), 0),
    ):
        assert sum(map(chosen.matches, samples)) == count


def test_the_command_shows_samples_and_says_when_there_is_none(tmp_path: Path) -> None:
    append_lines(tmp_path / "r" / "samples.jsonl", map(to_line, MANY))
    (tmp_path / "r" / "recipe.yaml").write_text("name: r\n")
    runner = CliRunner()
    arguments = ["samples", str(tmp_path / "r"), "--runs-dir", str(tmp_path)]
    shown = runner.invoke(app, [*arguments, "--verdict", "repeated"])
    assert (shown.exit_code, shown.output.count("---")) == (0, 1)
    assert "> so:\t2" in shown.output
    assert "\x1b" not in shown.output
    assert len(runner.invoke(app, [*arguments, "-n", "3", "--json"]).output.split("\n")) == 4
    assert runner.invoke(app, [*arguments, "--verdict", "nice"]).exit_code != 0
    assert runner.invoke(app, [*arguments, "--domain", "code"]).exit_code != 0


@pytest.mark.parametrize("each", RANGES, ids=lambda each: each.key)
def test_a_metric_out_of_its_range_is_said_with_the_key_to_change(each: object) -> None:
    [metric] = [known for known in RANGES if known is each]
    bound = metric.high if metric.high is not None else metric.low
    assert bound is not None
    assert find_warnings({metric.key: bound}) == {}
    beyond = bound * 2 if metric.high is not None else bound / 2
    assert metric.advice in find_warnings({metric.key: beyond})[metric.key]
    assert find_warnings({metric.key: None}) == {}


def test_an_iteration_that_trains_nothing_is_said() -> None:
    assert "not counted" in find_warnings({"train/groups": 0, "reward/groups": 0})["train/groups"]
    assert "equal rewards" in find_warnings({"train/groups": 0, "reward/groups": 3})["train/groups"]
