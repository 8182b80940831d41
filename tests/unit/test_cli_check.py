"""What is found wrong with a recipe before a service starts: the model's folder, prompts and languages."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from perigee.cli.check import check_inputs, check_verifiers, count_peak, count_tower, describe_memory
from perigee.cli.ending import Interrupt
from perigee.cli.init import init
from perigee.cli.recipe import SERVICES, load_recipe, open_new_run
from perigee.cli.train import up
from perigee.cli.view import PlainView
from perigee.errors import InvalidArgumentError
from perigee.reward.items import read_prompt_line
from services.coordinator.run_config import RunConfig
from services.reward.config import RewardConfig
from services.sandbox.config import SandboxConfig
from tests.fixtures.coordinator import code_line, math_line, write_lines, write_model_folder
from tests.fixtures.vision import make_picture

RECIPE = """
model: model
run: {prompts: prompts.jsonl, heldout: prompts.jsonl, iterations: 2, rollout: {max_response_tokens: 40}}
"""
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = write_model_folder(tmp_path / "model")
    change_config(model, CONFIG)
    save_file({"model.embed_tokens.weight": np.zeros((64, 8), np.float32)}, model / "model.safetensors")
    write_lines(tmp_path / "prompts.jsonl", [math_line("a", "1+1=", "2"), code_line("b")])
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def change_config(model: Path, values: Mapping[str, Any]) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def message_of(folder: Path) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        check_inputs(load_recipe(folder / "recipe.yaml"))
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_recipe_without_fault_is_described(folder: Path) -> None:
    model, prompts, trainer, rollout = check_inputs(load_recipe(folder / "recipe.yaml"))
    assert model == "model: 0.0M parameters, Qwen2ForCausalLM, context of 256 tokens"
    assert prompts == "prompts: 2 to train on, 2 held out, the longest of 5 tokens"
    assert trainer.startswith("memory of trainer, estimated: ")
    assert "KV cache 1.0" in rollout


def test_a_sequence_that_takes_more_than_it_may_is_told(folder: Path) -> None:
    recipe = RECIPE.replace("iterations: 2, rollout: {max_response_tokens: 40}", "iterations: 2").replace(
        "heldout", "rollout: {max_response_tokens: 240}, heldout"
    )
    change_config(folder / "model", {"num_hidden_layers": 20})
    (folder / "recipe.yaml").write_text(recipe + "trainer: {max_microbatch_bytes: 1048576}")
    [warning] = [line for line in check_inputs(load_recipe(folder / "recipe.yaml")) if "trainer will refuse" in line]
    assert "a sequence of 245 tokens takes about" in warning
    (folder / "recipe.yaml").write_text(recipe + "trainer: {max_microbatch_bytes: 104857600}")
    assert not any("trainer will refuse" in line for line in check_inputs(load_recipe(folder / "recipe.yaml")))


def test_a_folder_that_is_no_model_is_named(folder: Path) -> None:
    (folder / "model/config.json").unlink()
    assert "trainer.model: model/config.json cannot be read" in message_of(folder)


def test_an_architecture_that_is_not_supported_is_named(folder: Path) -> None:
    change_config(folder / "model", {"architectures": ["MambaForCausalLM"]})
    assert "model/config.json has architecture MambaForCausalLM" in message_of(folder)


def test_weights_that_are_missing_cut_or_of_another_vocabulary_are_named(folder: Path) -> None:
    weights = folder / "model/model.safetensors"
    change_config(folder / "model", {"vocab_size": 65})
    assert "has a vocabulary of 65, and the weights have an embedding of 64 rows" in message_of(folder)
    weights.write_bytes(weights.read_bytes()[:100])
    assert "model.safetensors cannot be read" in message_of(folder)
    weights.unlink()
    assert "model.safetensors is missing" in message_of(folder)


def test_a_prompt_that_leaves_no_room_for_the_response_is_named(folder: Path) -> None:
    write_lines(folder / "prompts.jsonl", [math_line("long", "1+1=" * 60, "2")])
    assert "prompt long: has 240 tokens, which with a response of 40 pass the model's context of 256" in message_of(
        folder
    )


def test_prompts_with_images_are_counted_and_compared_with_every_limit(folder: Path, vision_model: Path) -> None:
    part = {"type": "image", "image": "a.png"}
    line = math_line("seen", "", "2") | {"messages": [{"role": "user", "content": [part, part]}]}
    del line["prompt"]
    write_lines(folder / "prompts.jsonl", [line | {"messages": [{"role": "user", "content": [part]}]}])
    assert "prompts.jsonl:1: messages[0].content[0]: a.png does not exist" in message_of(folder)
    (folder / "a.png").write_bytes(make_picture(1))
    write_lines(folder / "prompts.jsonl", [line, math_line("b", "1+1", "2")])
    assert "prompts.jsonl:1: images: the model of model takes no images" in message_of(folder)
    recipe = RECIPE.replace("model: model", f"model: {vision_model}")
    (folder / "recipe.yaml").write_text(recipe)
    _, prompts, *_ = check_inputs(load_recipe(folder / "recipe.yaml"))
    assert prompts == "prompts: 2 to train on, 2 held out, the longest of 15 tokens; 1 images of 0.0 MiB"
    for section, message in {
        "rollout: {images: {max_per_prompt: 1}}": "rollout.images.max_per_prompt: 1 is less than the 2 of prompt seen",
        "rollout: {images: {max_pixels: 783}}": "rollout.images.max_pixels: 783 is less than the 784 of prompt seen",
        "buffer: {images: {max_image_bytes: 9}}": "buffer.images.max_image_bytes: 9 is less than the",
        "rollout: {max_model_len: 54}": "rollout.max_model_len: 54 is less than the 55 tokens of prompt seen",
    }.items():
        (folder / "recipe.yaml").write_text(recipe + section)
        assert message in message_of(folder)
    assert not (folder / "images").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("rollout: {max_model_len: 44}", "rollout.max_model_len: 44 is less than the 45 tokens of prompt b and a res"),
        ("trainer: {max_sequence_length: 300}", "trainer.max_sequence_length: 300 is more than the model's 256"),
        ("rollout: {router_replay: true}", "rollout.router_replay: model is no mixture of experts"),
        ("rope: {scaling: {type: llama3}}", "rope.scaling: factor is required with type llama3"),
        ("rope: {max_position_embeddings: 44}", "prompt b: has 5 tokens, which with a response of 40 pass the model's"),
    ],
)
def test_a_key_that_does_not_fit_the_model_is_named(folder: Path, section: str, message: str) -> None:
    (folder / "recipe.yaml").write_text(RECIPE + section)
    assert message in message_of(folder)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("max_sequence_length: 3", "sft.jsonl:1: 4 tokens are more than the context of 3"),
        ("max_sequence_length: 257", "run.sft.0.max_sequence_length: 257 is more than the 256 positions of the stage"),
        ("rope: {max_position_embeddings: 2}", "sft.jsonl:1: 4 tokens are more than the context of 2"),
        ("rope: {scaling: {type: linear}}", "run.sft.0.rope.scaling: factor is required with type linear"),
    ],
)
def test_a_length_that_does_not_fit_a_supervised_stage_is_named(folder: Path, stage: str, message: str) -> None:
    write_lines(folder / "sft.jsonl", [{"prompt": "1+", "response": "2"}])
    stages = f"sft: [{{dataset: sft.jsonl, steps: 1, {stage}}}, {{dataset: sft.jsonl, steps: 1}}]"
    (folder / "recipe.yaml").write_text(RECIPE.replace("iterations: 2", f"iterations: 2, {stages}"))
    assert message in message_of(folder)


def test_the_last_supervised_stage_has_the_rope_of_rollouts(folder: Path) -> None:
    stages = "sft: [{dataset: sft.jsonl, steps: 1, rope: {theta: 5}}]"
    (folder / "recipe.yaml").write_text(RECIPE.replace("iterations: 2", f"iterations: 2, {stages}"))
    assert "the last stage of sft has another rope than the run" in message_of(folder)


def test_a_chat_template_that_fails_is_named(folder: Path) -> None:
    (folder / "model/chat_template.jinja").write_text("{{ raise_exception('no system') }}")
    (folder / "recipe.yaml").write_text(RECIPE.replace("run: {", "run: {chat: always, "))
    assert "prompts.jsonl:1: prompt: the model's chat template fails: no system" in message_of(folder)


def test_a_verifier_or_language_that_is_not_set_up_is_named() -> None:
    def check(values: Mapping[str, Any]) -> None:
        check_verifiers([read_prompt_line({"id": "a", "prompt": "p", **values}, "line").item], reward, SandboxConfig())

    reward = RewardConfig()
    with pytest.raises(InvalidArgumentError, match="'cobol' is unknown; known: "):
        check(code_line("b") | {"language": "cobol"})
    with pytest.raises(InvalidArgumentError, match=r"reward\.judge\.judges: is empty"):
        check({"verifier": "judge", "reference": "2"})
    with pytest.raises(InvalidArgumentError, match=r"reward\.value_head\.path: is unset"):
        check({"verifier": "value_head"})


async def test_services_that_stay_are_checked_before_they_start(folder: Path) -> None:
    run, recipe = open_new_run(folder / "runs", load_recipe(folder / "recipe.yaml", ["rollout.max_model_len=44"]))
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(InvalidArgumentError, match=r"44 is less than the 45 tokens of prompt b"):
        await up(run, recipe, SERVICES, 1, PlainView(), Interrupt(task))


def test_processes_that_cannot_share_the_model_are_named(folder: Path) -> None:
    change_config(folder / "model", {"num_attention_heads": 4})
    check_inputs(load_recipe(folder / "recipe.yaml", ["trainer.context_parallel=4"]))
    with pytest.raises(InvalidArgumentError, match=r"2 x 4, does not divide the model's attention heads \(4\)"):
        check_inputs(load_recipe(folder / "recipe.yaml", ["trainer.tensor_parallel=2", "trainer.context_parallel=4"]))
    change_config(folder / "model", {"intermediate_size": 33})
    with pytest.raises(InvalidArgumentError, match=r"tensor_parallel 2 does not divide .* feed-forward width \(33\)"):
        check_inputs(load_recipe(folder / "recipe.yaml", ["trainer.tensor_parallel=2"]))


def test_a_long_response_is_counted_by_the_share_of_a_process(folder: Path) -> None:
    change_config(folder / "model", {"max_position_embeddings": 1 << 20})
    long = "run.rollout.max_response_tokens=1000000"

    def activations(*overrides: str) -> float:
        [line] = [each for each in check_inputs(load_recipe(folder / "recipe.yaml", overrides)) if "trainer" in each]
        return float(re.search(r"activations (\S+)[,)]", line)[1])  # type: ignore[index]

    assert activations(long, "trainer.context_parallel=2") == pytest.approx(activations(long) / 2, rel=0.1)


def test_the_workers_of_the_command_are_counted(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml", [])
    assert "warning: about" in check_inputs(recipe, 100_000)[-1]
    assert "warning" not in check_inputs(recipe)[-1]


def test_memory_beyond_the_machines_is_a_warning() -> None:
    lines = describe_memory({"trainer": {"weights": 1 << 60}, "rollout": {"KV cache": 1}}, 1, run_config())
    assert lines[-1].startswith("warning: about ")
    assert lines[-1].endswith("deployment: hybrid where one side alone would fit")


def run_config(**values: Any) -> RunConfig:
    return RunConfig(prompts="p", heldout="h", iterations=1, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hybrid", "peak"),
    [
        ({}, max(13 + 2 * 2, 5 + 2 * 9)),
        ({"engine": "keep"}, 13 + 2 * 9),
        ({"trainer": "keep"}, 13 + 2 * 9),
        (None, 13 + 2 * 9),
    ],
)
def test_memory_in_turn_is_that_of_the_larger_side_and_what_the_other_keeps(
    hybrid: dict[str, str] | None, peak: int
) -> None:
    estimate = {
        "trainer": {"libraries": 1, "image to push": 4, "weights": 8},
        "rollout": {"libraries": 1, "received image": 1, "KV cache": 7},
    }
    config = run_config() if hybrid is None else run_config(deployment="hybrid", hybrid=hybrid)
    assert count_peak(estimate, 2, config) == peak


@pytest.mark.parametrize(
    ("values", "faults"),
    [
        ({}, []),
        ({"run": {"hybrid": {"workers": ["gpu-7"]}}}, ["names none of rollout-0, rollout-1"]),
        ({"rollout": {"advertise_address": "gpu-7:50053"}}, ["workers on gpu-7 have another host"]),
        ({"rollout": {"server": {"host": "0.0.0.0", "token": "t"}}}, ["workers on 0.0.0.0 have another host"]),
        ({"run": {"hybrid": {"engine": "keep", "trainer": "keep"}}}, ["both have to fit at once"]),
        (
            {"trainer": {"nodes": 2, "data_parallel": 2, "master_address": "gpu-0"}},
            ["only workers beside machine 0", "coordinator.weights.transfer to pull"],
        ),
    ],
)
def test_what_keeps_a_hybrid_run_from_sharing_devices_is_told(
    folder: Path, values: Mapping[str, Any], faults: list[str]
) -> None:
    overrides = [f"{section}={json.dumps(keys)}" for section, keys in values.items()]
    lines = check_inputs(load_recipe(folder / "recipe.yaml", ["deployment=hybrid", *overrides]), workers=2)
    assert "memory of the trainer and its workers in turn, estimated: " in lines[4]
    found = [line for line in lines[5:] if "GiB are needed" not in line]
    assert len(found) == len(faults)
    for line, fault in zip(found, faults, strict=True):
        assert fault in line


def test_a_gpu_whose_engine_cannot_sleep_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gpus/0").mkdir(parents=True)
    monkeypatch.setattr("perigee.cli.check.NVIDIA", folder / "gpus")
    recipe = load_recipe(folder / "recipe.yaml", ["deployment=hybrid"])
    assert "set rollout.enable_sleep_mode" in check_inputs(recipe)[-1]


def test_a_vision_tower_is_counted_by_its_configuration(vision_model: Path) -> None:
    weights = load_file(vision_model / "model.safetensors")
    parts = ("model.vision_model.encoder.", "model.connector.")
    matrices = sum(weights[name].size for name in weights if name.startswith(parts) and weights[name].ndim == 2)
    # One layer of width 32 and inner width 128, and one patch to each token.
    kept = 9 * 32 + 2 * 128
    assert count_tower(json.loads((vision_model / "config.json").read_text())) == (matrices, kept)
    assert count_tower(CONFIG) == (0, 0)


def test_a_recipe_is_written_for_a_model_and_a_data_set(folder: Path) -> None:
    rows = [{"question": f"{i}+1?", "answer": f"{i}+1 is {i + 1}.\n#### {i + 1}", "kind": 1} for i in range(20)]
    data = write_lines(folder / "data.jsonl", rows)
    found = init(folder / "new", "model", {"path": str(data)})
    assert found[1] == "prompts: 20, judged by math"
    recipe = load_recipe(folder / "new/recipe.yaml")
    assert recipe.values["trainer"]["model"] == str(folder / "model")
    [source] = [recipe.values["run"]["prompts"]]
    assert source == {
        "path": str(data),
        "columns": {"prompt": "question", "answer": "answer"},
        "answer_after": "####",
    }
    assert check_inputs(recipe)[1].startswith("prompts: 18 to train on, 2 held out, ")
    with pytest.raises(InvalidArgumentError, match=r"has a recipe\.yaml already"):
        init(folder / "new", "model", {"path": str(data)})


def test_a_data_set_without_the_columns_is_named(folder: Path) -> None:
    data = write_lines(folder / "data.jsonl", [{"question": "1?", "label": 1}] * 2)
    with pytest.raises(InvalidArgumentError, match=r"data\.jsonl: answer: no column is named .* question, label"):
        init(folder / "new", "model", {"path": str(data)})
    init(folder / "new", "model", {"path": str(data), "columns": {"prompt": "question", "answer": "label"}})
    assert load_recipe(folder / "new/recipe.yaml").values["run"]["prompts"]["columns"]["answer"] == "label"
