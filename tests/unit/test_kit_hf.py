"""Hugging Face folders: what is read of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perigee.errors import InvalidArgumentError
from services.kit.hf import open_model_folder


def write_model(folder: Path, **files: object) -> Path:
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def test_a_model_folder_is_read(tmp_path: Path) -> None:
    config = {"model_type": "qwen2", "max_position_embeddings": 64, "vocab_size": 5, "eos_token_id": 2}
    model = open_model_folder(write_model(tmp_path, config=config, generation_config={"eos_token_id": [4, 2]}), "model")
    assert (model.context_tokens, model.vocabulary_size, model.dtype) == (64, 5, "auto")
    assert (model.stop_token_ids, model.eos_token_id) == ((2, 4), 4)
    assert model.tensor_files() == {}
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-1.safetensors"}}')
    assert model.tensor_files() == {"w": tmp_path / "model-1.safetensors"}


def test_a_model_that_takes_images_has_its_sizes_in_the_text_config(tmp_path: Path) -> None:
    text = {"max_position_embeddings": 64, "vocab_size": 5, "eos_token_id": 2}
    config = {"model_type": "idefics3", "vocab_size": 9, "text_config": text}
    model = open_model_folder(write_model(tmp_path, config=config), "model")
    assert (model.context_tokens, model.vocabulary_size, model.stop_token_ids) == (64, 5, (2,))
    assert model.eos_token_id == 2
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [3, 1]}))
    model = open_model_folder(tmp_path, "model")
    assert (model.stop_token_ids, model.eos_token_id) == ((1, 3), 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"model: .*config\.json cannot be read: No such file"),
        ([], "is not a JSON object"),
        ({}, "names no model_type"),
        ({"model_type": "x"}, "has no max_position_embeddings"),
        ({"model_type": "x", "max_position_embeddings": 8}, "has no vocab_size"),
        ({"model_type": "x", "max_position_embeddings": 8, "vocab_size": 3}, "has no eos_token_id"),
    ],
)
def test_a_folder_that_is_no_models_is_refused(tmp_path: Path, config: object, message: str) -> None:
    if config is not None:
        write_model(tmp_path, config=config)

    def read() -> tuple[object, ...]:
        model = open_model_folder(tmp_path, "model")
        return model.context_tokens, model.vocabulary_size, model.stop_token_ids

    with pytest.raises(InvalidArgumentError, match=message):
        read()


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    model = open_model_folder(write_model(tmp_path, config={"model_type": "x"}), "rollout.model")
    with pytest.raises(InvalidArgumentError, match=r"rollout\.model: .*tokenizer\.json is missing"):
        model.open_tokenizer()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidArgumentError, match="is not a tokenizer"):
        model.open_tokenizer()
