"""Rotary embeddings: read and computed as transformers does, changed in both forms of config.json, refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from perigee.cli.recipe import load_recipe
from perigee.errors import InvalidArgumentError
from services.kit.hf import fetch_model, open_model_folder
from services.kit.rope import RopeConfig, RopeScaling, change_rope, read_rope
from services.kit.storage import CACHE_VARIABLE
from services.trainer.hf import attention_factor, inverse_frequencies

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN: dict[str, Any] = {"model_type": "llama", "vocab_size": 8, "max_position_embeddings": 32, "rope_theta": 5e5}

factors = st.floats(1, 64)
originals = st.integers(16, 1 << 17)
scalings = st.one_of(
    st.builds(RopeScaling, type=st.just("linear"), factor=factors),
    st.builds(
        RopeScaling,
        type=st.just("llama3"),
        factor=factors,
        original_max_position_embeddings=originals,
        low_freq_factor=st.floats(0.5, 2),
        high_freq_factor=st.floats(2.5, 8),
    ),
    st.builds(
        RopeScaling,
        type=st.just("yarn"),
        factor=factors,
        original_max_position_embeddings=originals,
        beta_fast=st.none() | st.floats(16, 64),
        beta_slow=st.none() | st.floats(0.5, 4),
        attention_factor=st.none() | st.floats(0.5, 2),
    ),
)


def expected_of(config: dict[str, Any], kind: str) -> tuple[torch.Tensor, float]:
    """Frequencies and factor of a LlamaConfig with heads of 16, by transformers."""
    found = LlamaConfig(**config, hidden_size=64, num_attention_heads=4, head_dim=16)
    return ROPE_INIT_FUNCTIONS[kind](found, torch.device("cpu"))  # type: ignore[no-any-return]


@given(scalings, st.floats(100, 1e7), st.booleans())
def test_frequencies_are_those_of_transformers_in_both_forms(scaling: RopeScaling, theta: float, modern: bool) -> None:
    before: dict[str, Any] = {"max_position_embeddings": 32}
    before |= {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}} if modern else {"rope_theta": 7.0}
    change = RopeConfig(theta=theta, scaling=scaling)
    config = change_rope(before, change)
    rope = read_rope(config)
    assert ("rope_parameters" in config) == modern
    assert change_rope(config, change) == config
    expected_D, factor = expected_of(config, rope.type)
    assert torch.equal(inverse_frequencies(rope, 16), expected_D)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-6)


def test_what_is_left_out_of_a_change_stays() -> None:
    config = {**PLAIN, "rope_scaling": YARN, "max_position_embeddings": 128}
    assert change_rope(config, RopeConfig(theta=1e6)) == config | {"rope_theta": 1e6}
    longer = change_rope(PLAIN, RopeConfig(scaling=RopeScaling(type="yarn", factor=4, **originals_of(32))))
    assert (longer["rope_theta"], longer["max_position_embeddings"]) == (5e5, 128)
    back = change_rope(config, RopeConfig(scaling=RopeScaling(type="default"), max_position_embeddings=32))
    assert back == PLAIN | {"rope_scaling": None}
    axes = {"text_config": {**PLAIN, "rope_parameters": {"mrope_section": [2, 3, 3], "rope_theta": 1e4}}}
    text = change_rope(axes, RopeConfig(theta=2e4))["text_config"]
    assert text["rope_parameters"] == {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 2e4}


def originals_of(tokens: int) -> dict[str, int]:
    return {"original_max_position_embeddings": tokens}


def test_deepseeks_factors_of_attention_are_read() -> None:
    config = {**PLAIN, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}, "max_position_embeddings": 128}
    assert attention_factor(read_rope(config)) == pytest.approx(expected_of(config, "yarn")[1], rel=1e-6)
    qwen = {"model_type": "qwen2_vl_text", "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    assert read_rope(qwen).theta == 1e6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "has rope type dynamic, which is not one of"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "has rope_type yarn and type linear: drop one"),
        ({"rope_scaling": {"rope_type": "linear"}}, "has rope type linear without factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, r"write it as 2\.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "without original_max_position_embeddings"),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": None}},
            "low_freq_factor None of rope type llama3, which is no",
        ),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "has low_freq_factor 4.0, not below high_freq_factor"),
        ({"rope_scaling": {**YARN, "attn_factor": 1.0}}, "has the setting attn_factor of rope type yarn"),
        ({"rope_scaling": {**YARN, "mrope_section": [2, 3, 3]}}, "has mrope_section with rope type yarn"),
        ({"rope_scaling": YARN, "rope_parameters": LLAMA3}, "has other rope_parameters than rope_scaling"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 64}, "32 of rope type yarn and 64 besides"),
        ({"rope_scaling": YARN, "max_position_embeddings": 129}, "129, more than the 128 of factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, of which only 1"),
    ],
)
def test_what_engines_would_read_otherwise_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | fields))
    folder = open_model_folder(tmp_path, "trainer.model")
    with pytest.raises(InvalidArgumentError, match=rf"trainer\.model.*config\.json .*{message}"):
        _ = folder.rope


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ("{type: yarn, factor: 4}", "original_max_position_embeddings is required with type yarn"),
        ("{type: linear, factor: 2, beta_fast: 3}", "beta_fast is no setting of type linear"),
        (
            "{type: llama3, factor: 2, original_max_position_embeddings: 8, low_freq_factor: 4, high_freq_factor: 1}",
            "low_freq_factor must be below high_freq_factor",
        ),
        ("{type: dynamic, factor: 2}", "input should be 'default', 'linear', 'llama3' or 'yarn'"),
        ("{type: linear, factor: 0.5}", "greater than or equal to 1"),
    ],
)
def test_a_wrong_scaling_of_a_recipe_is_refused(tmp_path: Path, scaling: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"rope: {{scaling: {scaling}}}\n")
    with pytest.raises(InvalidArgumentError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_recipes_rope_reaches_all_who_read_the_model(tmp_path: Path) -> None:
    run = "run: {prompts: p, heldout: p, iterations: 1}\n"
    (tmp_path / "recipe.yaml").write_text(f"model: m\nrope: {{theta: 1000000}}\ntrainer: {{rope: {{theta: 5}}}}\n{run}")
    values = load_recipe(tmp_path / "recipe.yaml").values
    found = [values[section]["rope"] for section in ("run", "rollout", "trainer")]
    assert found == [{"theta": 1e6}, {"theta": 1e6}, {"theta": 5}]


def test_the_pages_recipes_are_recipes(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs/long-context.md"
    texts = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    with_rope = [text for text in texts if "rope:" in text]
    assert with_rope
    for text in with_rope:
        recipe = text.replace("run:\n", "run:\n  prompts: p\n  heldout: p\n  iterations: 1\n")
        recipe = recipe.replace("trainer: {", "trainer: {model: m, run_path: r, ")
        (tmp_path / "recipe.yaml").write_text(recipe)
        assert load_recipe(tmp_path / "recipe.yaml").head.rope is not None


def test_a_changed_model_is_a_folder_of_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(PLAIN))
    for number in (1, 2):
        (tmp_path / f"blob{number}").write_bytes(b"weights %d" % number)
    (model / "model.safetensors").symlink_to(tmp_path / "blob1")
    rope = RopeConfig(scaling=RopeScaling(type="yarn", factor=4, original_max_position_embeddings=32))
    changed = Path(fetch_model(str(model), "trainer.model", rope, weights=True))
    # What the model's folder links to may change, as in a cache of the model hub.
    for blob in ("blob1", "blob2"):
        (model / "model.safetensors").unlink()
        (model / "model.safetensors").symlink_to(tmp_path / blob)
        assert (changed / "model.safetensors").samefile(tmp_path / blob)
    assert open_model_folder(changed, "m").context_tokens == 128
    assert open_model_folder(changed, "m").rope.settings["factor"] == 4
    assert json.loads((model / "config.json").read_text()) == PLAIN
    assert fetch_model(str(model), "run.model", rope) == str(changed)
    assert fetch_model(str(model), "run.model", RopeConfig(theta=2.0)) != str(changed)
    open_model_folder(changed, "m").require_rope(rope, "rollout.rope")
    with pytest.raises(InvalidArgumentError, match=r"rollout\.rope: is not the trainer's"):
        open_model_folder(model, "m").require_rope(rope, "rollout.rope")
    beyond = RopeConfig(scaling=rope.scaling, max_position_embeddings=129)
    with pytest.raises(InvalidArgumentError, match=r"rollout\.rope: is wrong for .* more than the 128 of factor"):
        fetch_model(str(model), "rollout.model", beyond)
