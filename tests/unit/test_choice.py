"""Choice of a policy version: the rule, its table, the checkpoint behind it, and the recipe of the phase from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from perigee.cli.choose import make_short_recipe
from perigee.cli.eval.model import find_model
from perigee.cli.recipe import load_recipe
from perigee.cli.run_folder import RunFolder
from perigee.errors import InvalidArgumentError, NotFoundError
from perigee.files import write_lines
from perigee.report.choice import Candidate, choose_version, read_candidates
from perigee.statistics import Interval, wilson_interval
from tests.fixtures.cli import invoke


def line(
    version: int, accuracy: float | None, tokens: float | None, problems: int = 100, **more: Any
) -> dict[str, Any]:
    sampled = {"mean": accuracy, "low": accuracy, "high": accuracy}
    return {
        "iteration": version,
        "policy_version": version,
        "kind": "periodic",
        "problems": problems,
        "accuracy": {"overall": {"sampled": sampled}},
        "response_tokens": {"greedy": None, "sampled": tokens},
        **more,
    }


def write(folder: Path, *lines: dict[str, Any]) -> Path:
    write_lines(folder / "evaluations.jsonl", lines)
    return folder


def test_the_shortest_of_the_nearly_best_is_chosen(tmp_path: Path) -> None:
    lines = [line(0, 0.40, 20.0), line(9, 0.69, 70.0), line(18, 0.70, 80.0), line(27, 0.71, 95.0), line(36, 0.70, 99.0)]
    candidates = read_candidates(write(tmp_path, *lines))
    choice = choose_version(candidates, max_loss=0.02)
    assert choice.chosen.policy_version == 9
    assert choose_version(candidates, max_loss=0.0).chosen.policy_version == 27
    assert choose_version(candidates, max_loss=0.5).chosen.policy_version == 0
    assert choose_version(candidates, max_loss=0.02, kept={0, 18, 36}).chosen.policy_version == 18
    assert [row.split()[-1] for row in choice.lines()[1:3]] == ["accurate", "chosen"]
    assert choice.lines()[-1] == ("version 9: the shortest responses among versions of at least 0.690 sampled accuracy")


def test_a_version_counts_once_with_the_figures_on_more_problems(tmp_path: Path) -> None:
    write(tmp_path, line(3, 0.9, 10.0, 50), line(3, 0.5, 12.0, 200), line(3, 0.8, 11.0, 60), line(4, None, None))
    interval = Interval(0.5, 0.5, 0.5)
    assert read_candidates(tmp_path) == [Candidate(3, 3, 200, interval, 12.0)]


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1, max_size=8), st.sampled_from([0, 0.02, 0.3])
)
def test_no_version_that_is_as_accurate_is_shorter(figures: list[tuple[int, int]], max_loss: float) -> None:
    rates = [(wilson_interval(hits, 50), float(tokens)) for hits, tokens in figures]
    choice = choose_version([Candidate(n, n, 50, *rate) for n, rate in enumerate(rates)], max_loss)
    best = max(each.accuracy.mean for each in choice.candidates)
    assert best - choice.chosen.accuracy.mean <= max_loss + 1e-6
    for each in choice.candidates:
        is_near = best - each.accuracy.mean <= max_loss - 1e-6
        assert not is_near or each.response_tokens >= choice.chosen.response_tokens


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], {}, "no evaluated versions are there"),
        ([line(1, None, None)], {}, "no evaluated versions are there"),
        ([line(1, 0.5, 3.0)], {"kept": {2}}, r"no evaluated versions have a checkpoint: set run\.evaluation"),
        ([line(1, 0.5, 3.0)], {"max_loss": -0.1}, "--max-loss: must be at least 0"),
    ],
)
def test_what_cannot_be_chosen_is_said(
    tmp_path: Path, lines: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        choose_version(read_candidates(write(tmp_path, *lines)), **options)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of three evaluated versions, two of which have a checkpoint."""
    run = RunFolder(tmp_path / "runs" / "sums-1")
    run.create()
    section = {
        "prompts": "prompts.jsonl",
        "heldout": "heldout.jsonl",
        "iterations": 9,
        "sft": [{"dataset": "sft.jsonl", "steps": 1}],
        "curriculum": {"kind": "ramp", "end_difficulty": 5, "iterations": 3},
        "rollout": {"max_response_tokens": 144, "token_budget": 24},
        "overlong_penalty": {"weight": 0.1, "cap": 140, "buffer": 8},
    }
    values = {
        "name": "sums",
        "prepare": "prepare.py",
        "model": "base",
        "run": section,
        "rollout": {"max_num_seqs": 4},
        "trainer": {"run_path": str(run.path), "dtype": "bfloat16"},
    }
    run.recipe_path.write_text(yaml.safe_dump(values))
    write(run.path, line(1, 0.68, 30.0), line(2, 0.70, 60.0), line(3, 0.69, 50.0))
    for version in (2, 3):
        folder = run.path / "checkpoints" / "sums-1" / f"v{version:06d}"
        folder.mkdir(parents=True)
        (folder / "perigee.json").write_text(json.dumps({"run_id": "sums-1", "policy_version": version}))
        (folder / "config.json").write_text("{}")
    return run


def test_a_version_of_a_run_is_a_model(run: RunFolder) -> None:
    folder, settings = find_model("sums-1@2", run.path.parent)
    assert folder == run.path / "checkpoints" / "sums-1" / "v000002"
    assert settings is not None
    assert settings["iterations"] == 9
    with pytest.raises(NotFoundError, match=r"no checkpoint of version 1, only \[2, 3\]"):
        find_model("sums-1@1", run.path.parent)


def test_the_command_prints_the_table_and_writes_the_recipe_of_the_next_phase(run: RunFolder, tmp_path: Path) -> None:
    target = tmp_path / "short.yaml"
    runs = ("--runs-dir", str(run.path.parent))
    more = ("--recipe", str(target), "--set", "run.iterations=4", "--set", "rollout.max_num_seqs=8")
    ended = invoke(("choose", "sums-1", *runs, *more), None, None, {})
    folder = run.path / "checkpoints" / "sums-1" / "v000003"
    assert (ended.code, ended.stderr) == (0, "")
    assert "no checkpoint" in ended.stdout
    assert f"model: {folder}\n" in ended.stdout
    written = load_recipe(target).values
    assert [written[part]["model"] for part in ("run", "rollout", "trainer")] == [str(folder)] * 3
    assert (written["name"], written["run"]["iterations"]) == ("sums-short", 4)
    assert written["run"]["rollout"] == {"max_response_tokens": 72, "token_budget": 24}
    assert written["run"]["evaluation"] == {"max_response_tokens": 144}
    assert written["run"]["length_reward"] == {"weight": 0.5}
    assert written["run"]["overlong_penalty"] == {"weight": 0.1, "buffer": 8}
    assert {"prepare", "sft", "curriculum"} & {*written, *written["run"]} == set()
    assert written["trainer"] == {"model": str(folder), "run_path": "{run}", "dtype": "bfloat16"}
    assert written["rollout"]["max_num_seqs"] == 8
    again = invoke(("choose", "sums-1", *runs, "--recipe", str(target)), None, None, {})
    assert "exists with other contents" in again.stderr
    refused = invoke(("choose", "sums-1", *runs, "--recipe", str(tmp_path / "x"), "--set", "run.lr=1"), None, None, {})
    assert "run.optimizer.learning_rate" in refused.stderr
    assert not (tmp_path / "x").exists()


def test_changes_of_the_phase_are_laid_over_what_it_sets(run: RunFolder) -> None:
    changes = {"rollout": {"max_response_tokens": 48}, "length_reward": {"weight": 1.0, "warmup_iterations": 3}}
    section = make_short_recipe(run, Path("m"), changes)["run"]
    assert section["rollout"] == {"max_response_tokens": 48, "token_budget": 24}
    assert section["length_reward"] == {"weight": 1.0, "warmup_iterations": 3}
    assert load_recipe(run.recipe_path).values["run"]["rollout"]["max_response_tokens"] == 144
