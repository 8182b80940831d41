"""What docs/reproduction.md derives from the runs of its arms."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.reproduce import costs, curves, measured, page, runs
from bench.reproduce.arms import ARMS, BY_RATE
from bench.reproduce.curves import (
    Curve,
    Point,
    correlation_interval,
    geometric_interval,
    interval_over,
    rising_fit,
    sample_ratios,
)
from bench.reproduce.drawing import Line
from bench.reproduce.figures import FIGURES, chosen_rate, find_better_judge, find_comparison, find_sizes, judge
from bench.reproduce.tradeoff import find_shortest
from perigee.statistics import Interval

ROOT = Path(__file__).parents[2]


def make_curve(*accuracies: float, step: int = 1000, kinds: tuple[str, ...] = ("overall",)) -> Curve:
    """Returns a curve with an evaluation every `step` responses, whose length follows its accuracy."""
    points = [
        Point(number, number * step, 0, dict.fromkeys(kinds, accuracy), 10 + 20 * accuracy)
        for number, accuracy in enumerate(accuracies)
    ]
    return Curve(points, [], [])


def test_intervals_are_students() -> None:
    # Of 1, 2, 3: a standard error of 1 / sqrt(3), and 4.303 of them to either side.
    interval = interval_over([1.0, 2.0, 3.0])
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2.0, 2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert math.isinf(interval_over([1.0]).high)
    # The quantile of 9 degrees of freedom serves for more, too.
    assert interval_over([-1.0, 1.0] * 6).high == pytest.approx(2.262 * math.sqrt(12 / 11) / math.sqrt(12))
    assert geometric_interval([0.5, 2.0, 1.0]).mean == pytest.approx(1.0)
    assert geometric_interval([2.0]) == Interval(pytest.approx(2.0), 0.0, math.inf)


def test_intervals_of_correlations_stay_within_one() -> None:
    interval = correlation_interval([0.99, 0.95, 0.999])
    assert 0 < interval.low < interval.mean < interval.high < 1


def test_a_rising_fit_pools_what_falls() -> None:
    assert rising_fit([0.1, 0.4, 0.2, 0.5, 0.5]) == pytest.approx([0.1, 0.3, 0.3, 0.5, 0.5])
    assert rising_fit([0.3, 0.2, 0.1]) == pytest.approx([0.2] * 3)


def test_samples_to_an_accuracy_lie_between_evaluations() -> None:
    curve = make_curve(0.2, 0.4, 0.6)
    assert [curve.samples_to(accuracy) for accuracy in (0.1, 0.3, 0.6)] == pytest.approx([0, 500, 2000])
    assert math.isinf(curve.samples_to(0.7))


def test_ratios_are_taken_at_the_accuracy_that_both_reach() -> None:
    fast, slow = make_curve(0.2, 0.6, 0.8), make_curve(0.2, 0.4, 0.6)
    assert sample_ratios({0: fast, 1: fast}, {0: slow, 2: slow}) == pytest.approx([2.0])
    assert sample_ratios({0: fast}, {0: make_curve(0.2, 0.1, 0.0)}) == []


@pytest.mark.parametrize(
    ("interval", "says"), [((0.1, 0.2), "Holds"), ((-0.2, -0.1), "Does not hold"), ((-0.1, 0.2), "Not decided")]
)
def test_a_claim_holds_by_its_interval(interval: tuple[float, float], says: str) -> None:
    assert judge("it does", Interval(sum(interval) / 2, *interval)).startswith(f"**{says}")


@pytest.mark.parametrize(
    ("second", "says"), [((0.1, 9.0), "Holds"), ((-0.2, -0.1), "Does not hold"), ((-0.1, 0.2), "Not decided")]
)
def test_a_claim_of_two_figures_holds_by_both(second: tuple[float, float], says: str) -> None:
    first = Interval(0.5, 0.2, 0.8)
    assert judge("both do", first, Interval(sum(second) / 2, *second)).startswith(f"**{says}")
    # Of a wide interval and one that is surely below, the second decides, in whatever units they are.
    assert judge("both do", Interval(0.0, -50.0, 50.0), Interval(-0.2, -0.3, -0.1)).startswith("**Does not hold")


def make_results(base: Curve, *others: Curve) -> dict[str, dict[int, Curve]]:
    """Returns the base on every seed, and the other arm's curve of each."""
    return {"a": dict.fromkeys(range(len(others)), base), "b": dict(enumerate(others))}


def test_a_ratio_says_on_how_many_seeds_it_stands() -> None:
    rising, falling = (make_curve(*values, kinds=("overall", "hard")) for values in ((0.2, 0.4), (0.4, 0.2)))
    lines = [Line("a", "base", "black"), Line("b", "other", "black")]
    found = find_comparison(make_results(rising, rising, falling), lines)
    assert "1.00 (one seed) times the responses of other, on the 1 of 2 seeds on which both rise." in found.sentence
    assert "On no seed do both rise" in find_comparison(make_results(rising, falling), lines).sentence
    assert "seeds on which" not in find_comparison(make_results(rising, rising, rising), lines).sentence


def test_a_small_model_that_thinks_no_longer_does_not_reach_a_large_one_by_thinking() -> None:
    lines = [Line("a", "small", "black"), Line("b", "large", "black")]
    # A curve's length follows its accuracy: the large model begins with 18 tokens, or with 26.
    large = [make_curve(0.4, 0.5), make_curve(0.4, 0.5)]
    assert find_sizes(make_results(make_curve(0.2, 0.6), *large), lines).sentence.startswith("**Holds here**")
    longer = [Curve([replace(point, response_tokens=90.0) for point in curve.points], [], []) for curve in large]
    assert find_sizes(make_results(make_curve(0.2, 0.6), *longer), lines).sentence.startswith("**Does not hold here**")


def test_a_judge_that_guesses_is_named() -> None:
    lines = [Line("a", "value head", "black"), Line("b", "judge", "black")]
    results = {"a": {0: make_curve(0.48), 1: make_curve(0.52)}, "b": {0: make_curve(0.85), 1: make_curve(0.87)}}
    assert find_better_judge(results, lines).sentence.endswith("The value head is not told from a coin.")
    results["a"] = {0: make_curve(0.7), 1: make_curve(0.71)}
    assert "coin" not in find_better_judge(results, lines).sentence


def test_responses_and_tokens_add_up_over_the_iterations_of_a_run(tmp_path: Path) -> None:
    with runs.metering(tmp_path):
        pass
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    rows = [{"iteration": n, "rollout/finished": 10 * n, "rollout/tokens": 100, "reward/mean": 0.5} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    interval = {"mean": 0.25, "low": 0.2, "high": 0.3}
    evaluations = [
        {"iteration": n, "accuracy": {"overall": {"sampled": interval}}, "response_tokens": {"sampled": 12.5}}
        for n in (0, 2, 3)
    ]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    curve = runs.read_curve(tmp_path)
    assert [(point.samples, point.tokens) for point in curve.points] == [(0, 0), (30, 200), (60, 300)]
    assert curve.points[1] == Point(2, 30, 200, {"overall": 0.25}, 12.5)
    assert curve.reward == [0.5] * 3


def test_cpu_time_adds_up_over_the_processes_that_ended(tmp_path: Path) -> None:
    for _ in range(2):
        with runs.metering(tmp_path):
            subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"], check=True)
    assert json.loads((tmp_path / "cpu.json").read_text()) >= 0.4


def test_the_rate_with_the_highest_last_two_evaluations_is_chosen() -> None:
    ends = {1e-4: (0.1, 0.5), 3e-4: (0.4, 0.3), 1e-3: (0.0, 0.6)}
    results = {BY_RATE["ReST"][rate].name: {9: make_curve(0.9, *last)} for rate, last in ends.items()}
    assert chosen_rate(results, "ReST") == 3e-4


def make_models(**models: tuple[float, float]) -> dict[str, dict[int, Curve]]:
    """Returns models of an accuracy and a length, with a little more of both on the second seed."""
    return {
        name: {
            seed: Curve([Point(0, 0, 0, {"overall": right + seed / 100}, tokens + seed / 10)], [], [])
            for seed in range(2)
        }
        for name, (right, tokens) in models.items()
    }


def test_methods_are_held_against_the_bounds_and_one_another() -> None:
    models = make_models(long=(0.8, 40.0), short=(0.5, 10.0), merge=(0.5, 20.0), rl=(0.78, 28.0))
    lines = [Line(name, name.upper(), "black") for name in models]
    found = find_shortest(models, lines)
    assert "**Holds here**: RL takes the fewest tokens for a right answer" in found.sentence
    assert "The fewest tokens for a right answer takes RL: 35.7." in found.sentence
    assert "RL is at least 25% shorter at a loss of at most 0.05; MERGE loses 0.300." in found.sentence
    assert found.rows[1] == ("LONG", "0.805", "40.0", "49.8", "", "")
    assert found.rows[-1][-2:] == ("30% [29%, 30%]", "+0.020 [+0.020, +0.020]")
    models |= make_models(merge=(0.9, 20.0))
    assert "**Does not hold here**" in find_shortest(models, lines).sentence
    one_seed = {name: {0: curves[0]} for name, curves in models.items()}
    found = find_shortest(one_seed, lines)
    assert "**Not decided** by these seeds" in found.sentence
    assert "by the means MERGE takes fewer" in found.sentence
    assert found.rows[-1][-2:] == ("30% (one seed)", "+0.020 (one seed)")


def test_figure_10_compares_the_algorithms_at_the_rates_that_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results = FIGURES["rates"].read()
    chosen = [BY_RATE[label][chosen_rate(results, label)].name for label in ("ReST", "mirror descent")]
    assert [line.arm for line in FIGURES["rest"].lines] == chosen


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for results of its own, beside a page with one part."""
    folder = tmp_path / "reproduction"
    for module in (curves, measured, page, runs):
        monkeypatch.setattr(module, "RESULTS", folder)
    monkeypatch.setattr(page, "PAGES", [tmp_path / "reproduction.md"])
    (tmp_path / "reproduction.md").write_text("# Page\n<!-- growth -->\nold\n<!-- end -->\nrest\n")
    return folder


def test_the_page_says_what_was_not_run_and_draws_what_was(results: Path) -> None:
    page.write_page()
    assert page.PAGES[0].read_text() == (
        "# Page\n<!-- growth -->\nNot run yet: `make reproduce FIGURE=growth`.\n<!-- end -->\nrest\n"
    )
    for seed in (2, 0):
        runs.record(ARMS["base"], seed, make_curve(0.2, 0.4, 0.6 + seed / 10))
    assert list(curves.read_results("base")) == [0, 2]
    page.write_page()
    text, image = page.PAGES[0].read_text(), (results / "growth.svg").read_bytes()
    assert "Seeds: 2." in text
    assert "| held-out accuracy | 0.200 | 0.700 | 0.500 [" in text
    assert text.endswith("<!-- end -->\nrest\n")
    page.write_page()
    assert (page.PAGES[0].read_text(), (results / "growth.svg").read_bytes()) == (text, image)


def test_what_was_not_measured_costs_as_much_as_on_other_seeds(results: Path) -> None:
    for arm, seed, seconds in (("base", 0, 1000.0), ("base", 1, 2600.0), ("base", 2, None), ("warmup", 2, 3600.0)):
        runs.record(ARMS[arm], seed, replace(make_curve(0.1), cpu_seconds=seconds))
    name, *shown = costs.cost_row("growth", costs.trained_for(FIGURES["growth"]))
    # Five of the base, at a mean of 1,800 s, and five warm-ups.
    assert (name, *shown) == ("growth", "7.50", "225", "")
    # An arm that changes the same recipe costs as much, too; what has no such arm is named.
    assert costs.cpu_seconds(("length_reward", 0)) == 1800
    assert costs.cost_row("sizes", costs.trained_for(FIGURES["sizes"]))[-1] == "large, warmup_large"


@pytest.mark.parametrize(("slowest_ms", "says"), [(30.0, "**Holds here**"), (50.0, "**Does not hold here**")])
def test_a_start_is_held_against_the_reports(results: Path, slowest_ms: float, says: str) -> None:
    arms = {arm: {"median_ms": slowest_ms - place, "p95_ms": 60.0} for place, arm in enumerate(measured.STARTS)}
    machine = {"cores": 2, "processor": "one", "load": [0.25, 1, 1]}
    results.mkdir()
    (results / "sandbox.json").write_text(json.dumps({"machine": machine, "lean": "c", "arms": arms}))
    found = page.render_part("sandbox")
    assert f"{says}: the median job takes {slowest_ms} ms at most. On 2 cores of one, at a load of 0.2." in found
    assert f"| C, crun | {slowest_ms - 2:.1f} | 60.0 |" in found


def test_the_models_of_long2short_are_points(tmp_path: Path) -> None:
    row = {"name": "rl", "accuracy": {"mean": 0.61234, "low": 0.6, "high": 0.7}, "tokens": {"mean": 12.345}}
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": [row], "facts": []}))
    [(arm, curve)] = runs.read_comparison(tmp_path / "comparison.json", 60.0).items()
    assert arm in ARMS
    assert curve.points == [Point(0, 0, 0, {"overall": 0.6123}, 12.35)]
    assert curve.cpu_seconds == 60.0


def test_long2short_costs_what_its_models_come_from_as_well() -> None:
    names = {name for name, _ in costs.trained_for(FIGURES["long2short"])}
    assert {"warmup_styles", "long", "short", "long2short_rl"} < names


def test_results_of_other_settings_are_not_kept(results: Path) -> None:
    runs.record(ARMS["masked"], 0, make_curve(0.1))
    path = results / "masked.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": "others"}))
    runs.record(ARMS["masked"], 1, make_curve(0.1))
    assert list(curves.read_results("masked")) == [1]


def test_the_page_is_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    whole, *others = (path.read_text() for path in page.PAGES)
    assert {match[1] for match in page.PART.finditer(whole)} == {*FIGURES, "costs"}
    for text in (whole, *others):
        assert page.render_page(text) == text, "run make reproduce DRAW=1"
    for path in (curves.RESULTS / f"{arm}.json" for arm in ARMS):
        assert not path.is_file() or json.loads(path.read_text())["settings"] == ARMS[path.stem].settings, path
