"""The steps of a recipe: what each trains on, what it depends on, and what is wrong before anything starts."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
import yaml
from rich.console import Console
from safetensors.numpy import load_file

from perigee.cli.ending import Interrupt
from perigee.cli.long2short.pipeline import Pipeline, PipelineOptions, find_models
from perigee.cli.long2short.steps import Step
from perigee.cli.recipe import find_recipe, load_recipe
from perigee.errors import InvalidArgumentError
from perigee.files import append_lines
from tests.fixtures.cli import Ended, run_perigee

RECIPE = Path(__file__).parents[2] / "examples/arithmetic/long2short.yaml"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two untrained models, `long` and `short`."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("long", "short")):
        tiny_model.write_model(folder / name, seed)
    return folder


async def plan(models: Path, *changes: str, source: Path = RECIPE) -> dict[str, Step]:
    """The steps of a recipe with these models and changes, by name."""
    sets = [f"long2short.{name}={models / name}" for name in ("long", "short")]
    recipe = load_recipe(find_recipe(source), [*sets, *changes])
    options = PipelineOptions(recipe, models / "out", [], models, plain=True)
    task = asyncio.current_task()
    assert task is not None
    pipeline = Pipeline(options, Console(), Interrupt(task), *find_models(options))
    return {step.name: step for step in pipeline.steps()}


def run_of(step: Step) -> dict[str, Any]:
    """The section `run` of what a step trains by."""
    section: dict[str, Any] = step.settings["run"]
    return section


async def test_methods_train_on_what_was_made_of_the_samples(models: Path) -> None:
    stages = [f"long2short.{name}.steps=7" for name in ("rejection", "dpo")]
    steps = await plan(models, *stages, "long2short.dpo.algorithm.beta=0.3")
    assert list(steps)[:5] == ["merge", "samples", "pairs", "rejection", "dpo"]
    for name, source, file in (("rejection", "samples", "sft.jsonl"), ("dpo", "pairs", "pairs.jsonl")):
        [stage] = run_of(steps[name])["sft"]
        assert (stage["dataset"], stage["steps"], run_of(steps[name])["iterations"]) == (f"{{{source}}}/{file}", 7, 0)
        assert steps[name].needs == [source]
    assert steps["pairs"].needs == ["samples"]
    algorithm = run_of(steps["dpo"])["sft"][0]["algorithm"]
    assert (algorithm["name"], algorithm["beta"]) == ("dpo", 0.3)


async def test_the_second_phase_is_the_recipe_with_its_changes(models: Path) -> None:
    changes = ("long2short.rl.run.iterations=3", "long2short.rl.run.length_reward.weight=0.7")
    phase = run_of((await plan(models, *changes, "run.rollout.token_budget=24"))["rl"])
    assert phase["iterations"] == 3
    assert phase["length_reward"] == {"weight": 0.7}
    assert phase["rollout"]["max_response_tokens"] == 72
    assert phase["rollout"]["token_budget"] == 24


async def test_a_second_phase_without_settings_is_rewarded_for_length_and_cut(models: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(RECIPE.read_text())
    del values["long2short"]["rl"], values["prepare"]
    values["run"]["sft"] = [{"dataset": "sft.jsonl", "steps": 1}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    phase = run_of((await plan(models, source=tmp_path / "recipe.yaml"))["rl"])
    assert phase["length_reward"] == {"weight": 0.5}
    assert phase["rollout"]["max_response_tokens"] == 72
    assert phase["evaluation"]["max_response_tokens"] == 144
    assert "sft" not in phase


async def test_the_second_phase_starts_from_the_best_balanced_checkpoint_of_a_run(models: Path, tmp_path: Path) -> None:
    run = tmp_path / "sums-1"
    shutil.copytree(models / "long", run / "model")
    section = {"prompts": "prompts.jsonl", "heldout": "heldout.jsonl", "iterations": 3}
    trainer = {"model": str(models / "short"), "run_path": str(run)}
    (run / "recipe.yaml").write_text(json.dumps({"run": section, "trainer": trainer}))
    for version, accuracy, tokens in ((1, 0.5, 10.0), (2, 0.79, 20.0), (3, 0.8, 30.0)):
        sampled = {"mean": accuracy, "low": accuracy, "high": accuracy}
        line = {"iteration": version, "policy_version": version, "problems": 9, "response_tokens": {"sampled": tokens}}
        append_lines(run / "evaluations.jsonl", [line | {"accuracy": {"overall": {"sampled": sampled}}}])
        checkpoint = shutil.copytree(models / "short", run / f"checkpoints/sums-1/v{version:06d}")
        (checkpoint / "perigee.json").write_text(json.dumps({"run_id": "sums-1", "policy_version": version}))
    steps = await plan(models, f"long2short.long={run}")
    assert steps["rl"].files[0] == run / "checkpoints/sums-1/v000002"
    assert steps["rejection"].files == [run / "model"]


async def test_every_model_is_asked_alike(models: Path) -> None:
    steps = await plan(models, "run.chat=always", "run.instruction=Be brief.")
    evaluations = [step for name, step in steps.items() if name.startswith("evaluate-")]
    assert len(evaluations) == 6
    assert {str(step.settings) for step in evaluations} == {str(evaluations[0].settings)}
    assert evaluations[0].settings["asked"] == {"chat": "always", "instruction": "Be brief."}
    assert evaluations[0].settings["sampling"]["max_tokens"] == 144


async def test_methods_that_are_left_out_make_nothing(models: Path) -> None:
    steps = await plan(models, "long2short.methods=[rl]", "long2short.short=null")
    assert list(steps) == ["rl", "evaluate-long", "evaluate-rl"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("long2short.long=null", "long2short.long: is required"),
        ("long2short.long=nowhere", "nowhere: no such run"),
        ("long2short.short=null", "long2short.short: is required to merge"),
        ("long2short.merge.method=ties", "long2short.merge.base: is required by ties"),
        ("long2short.rejection.stepz=3", "long2short.rejection.stepz: unknown key; did you mean steps?"),
        ("long2short.dpo.steps=0", "long2short.dpo.steps: input should be greater"),
        ("long2short.rl.run.rollout.max_response_token=3", "long2short.rl.rollout.max_response_token: unknown key"),
        (
            "run.heldout={fraction: 0.1}",
            "comparison.problems: is required where run.heldout is not one path",
        ),
        ("run.prompts=[{path: a.jsonl}]", "samples.prompts: is required where run.prompts is not one path"),
        ("long2short.methods=[magic]", "long2short.methods.0: input should be"),
    ],
)
async def test_what_is_wrong_is_said_before_anything_starts(models: Path, change: str, words: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await plan(models, change)
    assert words in caught.value.message


async def merge_alone(models: Path, out: Path, *changes: str) -> Ended:
    """`perigee long2short --only merge` on the two models, with prompts that no script makes."""
    prompts = models / "prompts.jsonl"
    prompts.write_text('{"id": "p", "domain": "math", "prompt": "1+1=", "verifier": "math", "answer": "2"}\n')
    sets = [f"long2short.{name}={models / name}" for name in ("long", "short")]
    sets += ["prepare=null", f"run.prompts={prompts}", f"run.heldout={prompts}", *changes]
    words = [word for each in sets for word in ("--set", each)]
    return await run_perigee("long2short", str(RECIPE), "--only", "merge", "--out", str(out), *words)


async def test_without_a_long_model_no_folder_is_made(tmp_path: Path) -> None:
    ended = await run_perigee("long2short", str(RECIPE), "--out", str(tmp_path / "out"))
    assert (ended.code, ended.stderr.count("\n")) == (2, 1)
    assert "long2short.long: is required" in ended.stderr
    assert not (tmp_path / "out").exists()


async def test_a_step_alone_is_done_once_and_anew_for_another_setting(models: Path, tmp_path: Path) -> None:
    first = await merge_alone(models, tmp_path)
    assert first.code == 0, first.stderr
    assert "merge: begins (perigee merge " in first.stdout
    again = await merge_alone(models, tmp_path)
    assert "merge: done before" in again.stdout
    other = await merge_alone(models, tmp_path, "long2short.merge.short_weight=1")
    assert "merge: begins" in other.stdout
    found, short = (load_file(path / "model.safetensors") for path in (tmp_path / "merge/model", models / "short"))
    assert all(np.array_equal(found[name], short[name]) for name in short)
