"""The report: what it shows of the records, what it says when they lack something, and that it needs no network."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.errors import DataLossError, InvalidArgumentError
from perigee.files import read_lines
from perigee.report import plots
from perigee.report.page import SECTIONS, write_report
from perigee.report.ranges import find_warnings
from perigee.report.records import Iteration, changes, headline_lines, read_evaluations, read_records
from perigee.report.samples import Sample, to_line


def interval(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def accuracy(gain: float) -> dict[str, Any]:
    return {
        domain: {"greedy": interval(base + gain, 0.04), "sampled": interval(base + gain - 0.1, 0.03)}
        for domain, base in (("overall", 0.4), ("math", 0.5), ("code", 0.3))
    }


def metrics_line(iteration: int) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "reward/mean": 0.3 + 0.01 * iteration,
        "rollout/response_tokens/mean": 30.0,
        "rollout/response_tokens/p95": 70.0,
        "rollout/response_tokens/max": 110,
        "rollout/partial_rate": 0.1,
        "rollout/repetition_rate": 0.01,
        f"train/tokens_by_version/{iteration + 2}": 900,
        f"train/tokens_by_version/{iteration + 1}": 80,
        f"train/tokens_by_version/{iteration - 5}": 20,
        "train/trajectories": 200,
        "train/trajectories_multi_version": 30,
        "train/train_infer_logprob_diff_max": 1e-4,
        "train/loss": 0.1,
        "train/grad_norm": 0.4,
        "train/kl_k1": 0.001,
        "train/kl_k3": 0.001 if iteration < 8 else 0.3,
        "train/entropy": 0.5,
        "train/learning_rate": 1e-6,
        "train/uniform_rate": 0.2,
        "train/tokens_per_second": 900.0,
        "train/peak_memory_bytes": 5.4e9,
        "rollout/tokens_per_second": 400.0,
        "rollout/prefill_share": 0.3,
        "warnings": find_warnings({"train/kl_k3": 0.001 if iteration < 8 else 0.3}),
        "time/iteration_seconds": 4.0,
        "time/rollout/start": 0.1,
        "time/rollout/seconds": 2.0,
        "time/scoring/start": 0.5,
        "time/scoring/seconds": 1.8,
        "time/training/start": 2.4,
        "time/training/seconds": 1.5,
    }


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    path = tmp_path / "small-1"
    path.mkdir()
    lines = [metrics_line(iteration) for iteration in range(1, 9)]
    lines[2]["events"] = [{"seconds": 61.2, "event": "rollout-1 left: <silent>"}]
    write_lines(path / "metrics.jsonl", lines)
    evaluations = [{"kind": "periodic", "iteration": i, "accuracy": accuracy(0.04 * i)} for i in (0, 4, 8)]
    write_lines(path / "evaluations.jsonl", evaluations)
    summary = {"accuracy_baseline": accuracy(0.0), "accuracy_final": accuracy(0.32), "tokens_generated": 12345}
    (path / "summary.json").write_text(json.dumps(summary))
    server = "{token: hush, callers: {team: {tokens: [hush]}}}"
    (path / "recipe.yaml").write_text(f"name: small\nrun: {{iterations: 8}}\nbuffer: {{server: {server}}}\n")
    return path


def drawn(page: str) -> set[str]:
    return set(re.findall(r"<figure id='(\w+)'>", page))


def test_a_label_stands_at_the_end_of_its_line_on_a_logarithmic_axis(run_path: Path) -> None:
    figure = plots.plot_logprob_diff(read_records(run_path))
    assert figure is not None
    assert [label.y for label in figure.layout.annotations] == [pytest.approx(-4)]


def test_a_full_run_fills_every_section(run_path: Path) -> None:
    report = write_report(run_path)
    page = report.path.read_text()
    assert drawn(page) == {section.id for section in SECTIONS}
    assert "<td>3</td><td class='number'>61 s</td><td>rollout-1 left: &lt;silent&gt;</td>" in page
    assert "30.0%<span class='arrow'>→</span>62.0%" in page
    assert "+32.0 points, intervals apart" in page
    assert report.headline[0] == (
        "overall    sampled  0.300 [0.270, 0.330] -> 0.620 [0.590, 0.650]  +0.320  intervals apart"
    )
    assert [path.name for path in run_path.iterdir() if "report" in path.name] == ["report.html"]


def test_one_domain_says_no_more_than_all(run_path: Path) -> None:
    lines = read_lines(run_path / "evaluations.jsonl")
    for line in lines:
        line["accuracy"] = {name: line["accuracy"][name] for name in ("overall", "math")}
    write_lines(run_path / "evaluations.jsonl", lines)
    assert {change.domain for change in changes(read_records(run_path))} == {"overall"}


def test_ticks_are_iterations_of_the_run(run_path: Path) -> None:
    for plot in (plots.plot_accuracy, plots.plot_reward, plots.plot_rates):
        figure = plot(read_records(run_path))
        assert figure is not None
        assert list(figure.layout.xaxis.tickvals) == list(range(9))


def test_a_warning_names_the_key_to_change(run_path: Path) -> None:
    page = write_report(run_path).path.read_text()
    assert "iteration 8: policy KL per token is 0.3, above 0.05: lower run.optimizer.learning_rate" in page
    assert "1 of 8 iterations" in page


def test_the_newest_sample_of_each_kind_is_shown_and_cannot_break_the_page(run_path: Path) -> None:
    lines = [
        to_line(Sample(1, "", str(n), "p", "math", "<b>why</b>", f"</script>{n}", 3, [0], end, verdict))
        for n, (end, verdict) in enumerate(
            [
                ("stop", "correct"),
                ("stop", "correct"),
                ("stop", "wrong"),
                ("stop", "ungradable"),
                ("max_response_tokens", "wrong"),
                ("repetition", "ungradable"),
            ]
        )
    ]
    write_lines(run_path / "samples.jsonl", lines)
    page = write_report(run_path).path.read_text()
    assert re.findall(r"<summary><b>(\w+)</b>", page) == ["right", "wrong", "ungradable", "capped", "repeated"]
    assert "&lt;/script&gt;1" in page
    assert "&lt;/script&gt;0" not in page
    assert page.count("</script>") == 2


def test_the_page_fetches_nothing(run_path: Path) -> None:
    page = write_report(run_path).path.read_text()
    own = page.replace(page[page.index("<script>") : page.rindex("<script>")], "")
    assert re.findall(r"""(?:src|href)\s*=\s*["']""", own) == []
    assert page.count("</script>") == 2


def test_secrets_stay_out_of_the_page(run_path: Path) -> None:
    page = write_report(run_path).path.read_text()
    assert "server.token" in page
    assert "hush" not in page


def test_names_from_the_recipe_cannot_break_the_page(run_path: Path) -> None:
    (run_path / "recipe.yaml").write_text('description: "</script><b>x</b>"\nrun: {"</script>": "<i>"}\n')
    page = write_report(run_path).path.read_text()
    assert page.count("</script>") == 2
    assert "<b>x</b>" not in page


def test_sections_without_records_say_so(run_path: Path) -> None:
    lines = [{"iteration": 1, "reward/mean": 0.5, "rollout/partial_rate": None}]
    write_lines(run_path / "metrics.jsonl", lines)
    (run_path / "summary.json").unlink()
    (run_path / "evaluations.jsonl").unlink()
    report = write_report(run_path)
    page = report.path.read_text()
    assert drawn(page) == {"reward"}
    assert page.count("The records of this run have no such metrics.") == len(SECTIONS) - 1
    assert "not finished: figures so far" in page
    assert report.headline == ["no accuracy to compare: the run has fewer than two evaluations"]


def test_a_run_that_has_not_finished_compares_its_evaluations(run_path: Path) -> None:
    (run_path / "summary.json").unlink()
    change = changes(read_records(run_path))[0]
    assert (change.before.mean, change.after.mean) == (pytest.approx(0.3), pytest.approx(0.62))


def test_intervals_that_overlap_are_not_called_apart(run_path: Path) -> None:
    lines = [{"iteration": i, "accuracy": accuracy(gain)} for i, gain in ((0, 0.0), (8, 0.05))]
    write_lines(run_path / "evaluations.jsonl", lines)
    assert not any("apart" in line for line in headline_lines(read_records(run_path)))


def test_a_line_cut_by_a_crash_is_left_out(run_path: Path) -> None:
    with (run_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 9, "rew')
    assert [row.number for row in read_records(run_path).iterations] == list(range(1, 9))


def test_a_broken_line_is_named(run_path: Path) -> None:
    (run_path / "metrics.jsonl").write_text('{"iteration": 1}\nnonsense\n{"iteration": 2}\n')
    with pytest.raises(DataLossError, match=r"metrics\.jsonl:2 is not JSON"):
        write_report(run_path)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"has no metrics\.jsonl, evaluations\.jsonl or summary\.json"):
        write_report(tmp_path)


def test_the_final_evaluation_stands_for_its_iteration(run_path: Path) -> None:
    lines = [{"iteration": 8, "accuracy": accuracy(gain)} for gain in (0.1, 0.2)]
    write_lines(run_path / "evaluations.jsonl", lines)
    (evaluation,) = read_evaluations(run_path)
    assert evaluation.greedy["overall"].mean == pytest.approx(0.6)
    assert evaluation.domains == ["overall", "code", "math"]


def test_the_age_of_tokens_counts_from_the_newest_version() -> None:
    row = Iteration(
        3, {f"train/tokens_by_version/{version}": tokens for version, tokens in ((9, 100), (10, 700), (4, 3))}
    )
    assert plots.tokens_by_age(row) == {0: 700, 1: 100, 6: 3}


def test_old_tokens_share_the_last_color(run_path: Path) -> None:
    figure = plots.plot_staleness(read_records(run_path))
    assert [bar.name for bar in figure.data] == ["0 versions old", "1 version old", "4 or more versions old"]
    assert list(figure.data[2].y) == [20] * 8


def test_phases_keep_their_offsets(run_path: Path) -> None:
    spans = plots.phase_spans(read_records(run_path).iterations[0])
    assert spans == {"rollout": (0.1, 2.0), "scoring": (0.5, 1.8), "training": (2.4, 1.5)}


def test_the_rate_of_several_versions_is_drawn(run_path: Path) -> None:
    figure = plots.plot_rates(read_records(run_path))
    shares = {line.name: list(line.y) for line in figure.data}
    assert shares["several versions"] == pytest.approx([0.15] * 8)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_labels_of_lines_that_end_close_together_stand_apart(ends: list[float]) -> None:
    shifts = plots.label_shifts(ends, 1.0)
    places = sorted(plots.PLOT_PIXELS * end + shift for end, shift in zip(ends, shifts, strict=True))
    assert all(above - below >= plots.LABEL_PIXELS - 1e-6 for below, above in itertools.pairwise(places))
    assert min(shifts) >= 0


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.integers(1, 8))
def test_a_moving_mean_stays_within_its_window(values: list[float], window: int) -> None:
    means = plots.moving_mean(values, window)
    assert means[0] == values[0]
    for index, mean in enumerate(means):
        seen = values[max(0, index + 1 - window) : index + 1]
        assert min(seen) - 1e-6 <= mean <= max(seen) + 1e-6
