"""Recipes: overrides, expansion, and one clear line for every mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.cli.recipe import SERVICES, config_class, dump_yaml, find_recipe, load_recipe, map_strings
from perigee.cli.run_folder import RunFolder
from perigee.cli.train import prepare
from perigee.errors import InvalidArgumentError
from services.kit.config import ServiceConfig, load_config
from services.rollout.config import RolloutConfig

ROOT = Path(__file__).parents[2]

RECIPE = """
name: small
prepare: prepare.py
run: {model: "{data}/model", prompts: "{data}/prompts.jsonl", heldout: "{data}/heldout.jsonl", iterations: 2, seed: 5}
rollout: {model: "{data}/model"}
trainer: {model: "{data}/model"}
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def message_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        load_recipe(write_recipe(folder, text), overrides)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_overrides_reach_the_values(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), ["run.iterations=7", "rollout.max_num_seqs=12", "name=other"])
    assert recipe.values["run"]["iterations"] == 7
    assert recipe.values["rollout"]["max_num_seqs"] == 12
    assert recipe.head.name == "other"
    assert recipe.seed == 5


def test_the_model_stands_once_and_a_section_may_name_another(tmp_path: Path) -> None:
    text = "model: a\nrun: {prompts: p, heldout: h, iterations: 1}\ntrainer: {model: b}\n"
    values = load_recipe(write_recipe(tmp_path, text)).values
    assert [values[section]["model"] for section in ("run", "rollout", "trainer")] == ["a", "a", "b"]
    config = load_config(RolloutConfig, ["--config", str(tmp_path / "recipe.yaml")])
    assert config.model == "a"


def test_the_deployment_is_kept_in_the_run_and_the_last_that_names_it_holds(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, f"deployment: hybrid\n{RECIPE}")

    def deployment(*overrides: str) -> object:
        values = load_recipe(path, overrides).values
        assert "deployment" not in values
        return values["run"]["deployment"]

    assert deployment() == "hybrid"
    assert deployment("deployment=separate") == "separate"
    assert deployment("run.deployment=separate", "deployment=hybrid") == "hybrid"
    assert deployment("deployment=hybrid", "run.deployment=separate") == "separate"
    assert "run.deployment" in message_of(tmp_path, RECIPE, "deployment=mixed")


def test_expansion_names_the_folders_of_the_run(tmp_path: Path) -> None:
    values = load_recipe(write_recipe(tmp_path)).expand(RunFolder(Path("/runs/small-1"))).values
    assert values["run"]["prompts"] == "/runs/small-1/data/prompts.jsonl"
    assert values["prepare"] == str(tmp_path / "prepare.py")
    assert "{" not in dump_yaml(values["run"])


async def test_a_prepared_recipe_needs_neither_script_nor_placeholders(tmp_path: Path) -> None:
    (tmp_path / "prepare.py").write_text("import sys; open(sys.argv[2] + '/prompts.jsonl', 'w').close()")
    out = tmp_path / "out"
    await prepare(load_recipe(write_recipe(tmp_path)), RunFolder(out))
    assert (out / "data/prompts.jsonl").is_file()
    values = yaml.safe_load((out / "recipe.yaml").read_text())
    assert "prepare" not in values
    assert values["run"]["prompts"] == str(out / "data/prompts.jsonl")
    config = load_config(RolloutConfig, ["--config", str(out / "recipe.yaml")])
    assert config.model == str(out / "data/model")


def test_a_service_refuses_a_recipe_that_is_not_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(RolloutConfig, ["--config", str(write_recipe(tmp_path))])
    message = capsys.readouterr().err
    assert "rollout.model: {data}/model names a folder that a service does not know" in message
    assert "perigee prepare RECIPE --out DIR" in message
    given = load_config(RolloutConfig, ["--config", str(tmp_path / "recipe.yaml"), "--set", "model=/models/a"])
    assert given.model == "/models/a"


def test_services_get_the_folder_of_the_run_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    text = RECIPE.replace('trainer: {model: "{data}/model"}', 'trainer: {model: "{data}/model", run_path: /elsewhere}')
    values = load_recipe(write_recipe(tmp_path, text)).expand(RunFolder(Path("/runs/small-1"))).values
    assert values["trainer"]["run_path"] == "/elsewhere"
    assert values["buffer"]["data_path"] == "/runs/small-1/buffer"
    assert values["coordinator"]["run_path"] == "/runs/small-1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RECIPE + "rolout: {}\n", "recipe.yaml: rolout: unknown key; did you mean rollout?"),
        (
            RECIPE.replace("rollout: {", "rollout: {max_num_seqz: 3, "),
            "recipe.yaml: rollout.max_num_seqz: unknown key; did you mean max_num_seqs?",
        ),
        (
            RECIPE.replace("iterations: 2", "iterations: 2, update: {minibatchs: 2}"),
            "recipe.yaml: run.update.minibatchs: unknown key; did you mean minibatches?",
        ),
        (
            RECIPE.replace("iterations: 2", "iterations: 2, algorithm: {name: policy_mirror_decent}"),
            "recipe.yaml: run.algorithm.name: 'policy_mirror_decent' is unknown; known are grpo, "
            "policy_mirror_descent, rest",
        ),
        (
            RECIPE.replace("iterations: 2", "iterations: 2, algorithm: {name: dpo}"),
            "recipe.yaml: run.algorithm.name: dpo trains on a file: write it as the algorithm of a stage of run.sft",
        ),
        (
            RECIPE.replace(
                "iterations: 2", "iterations: 2, sft: [{dataset: d, steps: 1, algorithm: {name: dpo, tau: 1}}]"
            ),
            "recipe.yaml: run.sft.0.algorithm.tau: unknown key",
        ),
        (
            RECIPE.replace("iterations: 2", "iterations: 2, algorithm: {tua: 0.1}"),
            "recipe.yaml: run.algorithm.tua: unknown key; did you mean tau?",
        ),
        (
            RECIPE.replace("iterations: 2", "iterations: 2, learning_rate: 1.0e-5"),
            "recipe.yaml: run.learning_rate: unknown key; did you mean run.optimizer.learning_rate?",
        ),
        (
            RECIPE.replace("rollout: {", "rollout: {temperature: 1.0, "),
            "recipe.yaml: rollout.temperature: unknown key; did you mean run.rollout.temperature?",
        ),
        (
            RECIPE.replace("rollout: {", "rollout: {top_p: 0.9, "),
            "recipe.yaml: rollout.top_p: unknown key; responses are sampled from the whole distribution, whose "
            "log-probabilities training needs; leave it out",
        ),
        (
            RECIPE + "group_size: 4\n",
            "recipe.yaml: group_size: unknown key; did you mean run.group_size?",
        ),
        (RECIPE.replace(", iterations: 2", ""), "recipe.yaml: run.iterations: is required"),
        (RECIPE + "local: {worker: 2}\n", "recipe.yaml: local.worker: unknown key; did you mean workers?"),
        (RECIPE + "buffer: 3\n", "recipe.yaml: buffer: must be a mapping of keys to values"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(tmp_path: Path, text: str, expected: str) -> None:
    assert message_of(tmp_path, text) == expected


def test_a_recipe_is_checked_without_torch(tmp_path: Path) -> None:
    code = f"import sys, pathlib, perigee.cli.recipe as r; r.load_recipe(pathlib.Path({str(write_recipe(tmp_path))!r}))"
    checked = subprocess.run([sys.executable, "-c", code + "; print('torch' in sys.modules)"], capture_output=True)
    assert checked.stdout == b"False\n", checked.stderr


def test_broken_yaml_names_the_file_and_line(tmp_path: Path) -> None:
    message = message_of(tmp_path, "name: x\ntrainer: {model: {data}/x}\n")
    assert str(tmp_path / "recipe.yaml") in message
    assert "line 2" in message


def test_a_wrong_override_is_refused(tmp_path: Path) -> None:
    assert "'run.iterations' is not of the form a.b=c" in message_of(tmp_path, RECIPE, "run.iterations")
    assert "run.iterations: input should be a valid integer" in message_of(tmp_path, RECIPE, "run.iterations=many")


def test_a_key_under_an_old_name_is_one_line_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = RECIPE.replace("iterations: 2", "iterations: 2, groups: {live: 8}")
    recipe = load_recipe(write_recipe(tmp_path, old), ["run.groups.live=12"])
    line = "perigee: recipe.yaml: the key groups.live is called max_live_groups now; the old name goes with the next"
    assert capsys.readouterr().err.startswith(line)
    recipe.expand(RunFolder(tmp_path))
    assert capsys.readouterr().err == ""


def test_a_recipe_is_found_by_file_or_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"no recipe\.yaml in this folder"):
        find_recipe(tmp_path)
    with pytest.raises(InvalidArgumentError, match="no such file"):
        find_recipe(tmp_path / "missing.yaml")
    path = write_recipe(tmp_path)
    assert find_recipe(tmp_path) == find_recipe(path) == path


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_has_a_configuration_class_named_for_its_section(service: str) -> None:
    found = config_class(service)
    assert issubclass(found, ServiceConfig)
    assert found.section == service


texts = st.text(max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(texts, json_values, max_size=3))
def test_yaml_of_values_reads_back_the_same(values: dict[str, object]) -> None:
    assert yaml.safe_load(dump_yaml(values)) == values


@settings(deadline=None, max_examples=50)
@given(json_values)
def test_changing_no_string_changes_nothing(value: object) -> None:
    assert map_strings(value, lambda text: text) == value


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("examples/*/recipe*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_the_examples_are_recipes(path: Path) -> None:
    assert load_recipe(path).values["run"]["iterations"] > 0
