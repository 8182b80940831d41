"""Model folders: what is read, and what is said of folders that are none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from perigee.errors import InvalidArgumentError
from services.rollout.model import open_policy
from services.weights.manifest import export_image
from services.weights.safetensors import read_tensors
from tests.fixtures.rollout import CHARACTERS, CONTEXT, EOS, VOCABULARY, make_policy, policy_tensors


@pytest.fixture
def folder(policy_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(policy_folder, tmp_path / "model"))


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_reads_limits_stop_tokens_and_tokenizer(policy_folder: Path) -> None:
    model = open_policy(str(policy_folder), None)
    assert (model.context_tokens, model.vocabulary_size, model.stop_token_ids) == (CONTEXT, VOCABULARY, (EOS,))
    assert model.decode([2, 3, EOS]) == CHARACTERS[:2]
    assert model.decode([2, 0, EOS, 3]) == f"{CHARACTERS[0]}<pad><eos>{CHARACTERS[1]}"
    assert open_policy(str(policy_folder), 100).context_tokens == 100


def test_generation_config_adds_stop_tokens(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert open_policy(str(folder), None).stop_token_ids == (1, 7)


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
    "config is text": (lambda folder: (folder / "config.json").write_text("hello"), "config.json is not JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "is not a JSON object"),
    "no model": (lambda folder: edit_config(folder, model_type="", architectures=[]), "names no model_type"),
    "no positions": (lambda folder: edit_config(folder, max_position_embeddings=None), "no max_position_embeddings"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_folder_that_is_no_model_is_named(folder: Path, breakage: str) -> None:
    damage, message = BREAKAGES[breakage]
    damage(folder)
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        open_policy(str(folder), None)
    assert caught.value.violations[0].field == "rollout.model"
    assert str(folder) in caught.value.message


def test_no_stop_token_is_refused(folder: Path) -> None:
    edit_config(folder, eos_token_id=None)
    (folder / "generation_config.json").unlink()
    with pytest.raises(InvalidArgumentError, match="no response can end"):
        open_policy(str(folder), None)


def test_a_context_longer_than_the_model_is_refused(policy_folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"rollout\.max_model_len: 1000 is more than the model's 256"):
        open_policy(str(policy_folder), 1000)


def test_tensors_are_read_from_memory_as_they_were_written() -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.tensor(3),
        "d": torch.empty(0, 4),
        "e": torch.tensor([True, False, True]),
    }
    for padding in (0, 1, 4):
        image = memoryview(bytearray(bytes(padding) + save(tensors)))[padding:]
        read = dict(read_tensors(image))
        assert read.keys() == tensors.keys()
        assert all(
            read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) for name, tensor in tensors.items()
        )


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"xx", b"\x0b" + bytes(7) + b'{"a": {"x"}'])
def test_bytes_that_are_no_safetensors_file_are_refused(damage: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="header"):
        list(read_tensors(memoryview(damage)))


def test_a_tensor_outside_its_shard_is_refused() -> None:
    whole = save({"a": torch.zeros(8)})
    with pytest.raises(InvalidArgumentError, match="tensor a does not lie within its shard"):
        list(read_tensors(memoryview(whole[:-4])))


def test_a_tied_output_layer_may_come_along(policy_folder: Path, tmp_path: Path) -> None:
    tensors = policy_tensors(make_policy(0))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    image = export_image("run", 1, tensors.items(), 1 << 14, str(tmp_path))
    assert len(image.manifest.shards) > 1
    open_policy(str(policy_folder), None).check_image(image)
    image.close()


def test_a_tensor_that_the_model_has_not_is_named(policy_folder: Path, tmp_path: Path) -> None:
    tensors = policy_tensors(make_policy(0)) | {"model.extra": torch.zeros(2)}
    image = export_image("run", 1, tensors.items(), 1 << 20, str(tmp_path))
    with pytest.raises(InvalidArgumentError, match=r"the model has no tensor model\.extra"):
        open_policy(str(policy_folder), None).check_image(image)
    image.close()
