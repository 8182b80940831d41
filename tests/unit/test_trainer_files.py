"""Model folders and checkpoints: what is read, what is refused by name, and that a write is whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perigee.errors import (
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from services.trainer.checkpoints import Checkpoints
from services.trainer.hf import TensorReader, read_model_shape, write_folder


def tensors(offset: float = 0.0) -> Iterator[tuple[str, torch.Tensor]]:
    for i in range(5):
        yield f"t{i}", torch.full((100,), i + offset)


def change_config(source: Path, target: Path, **fields: Any) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "has architecture GPT2LMHeadModel, which is not one of"),
        ({"hidden_act": "gelu"}, "has hidden_act gelu, of which only silu is supported"),
        ({"use_sliding_window": True}, "has use_sliding_window True, of which only False"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "has rope type dynamic, which is not one of"),
    ],
)
def test_an_unsupported_model_is_refused_by_field(
    trainer_model: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = change_config(trainer_model, tmp_path / "model", **fields)
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        read_model_shape(folder)
    assert str(folder / "config.json") in caught.value.message


def test_shards_are_bounded_and_read_back(trainer_model: Path, tmp_path: Path) -> None:
    write_folder(str(tmp_path / "out"), trainer_model, tensors(), {"more.json": {"a": 1}}, max_shard_bytes=1000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    reader = TensorReader(tmp_path / "out")
    assert all(torch.equal(reader.read(name), value) for name, value in tensors())
    assert json.loads((tmp_path / "out" / "more.json").read_text()) == {"a": 1}
    with pytest.raises(InvalidArgumentError, match="holds no tensor t9"):
        reader.read("t9")


def test_a_failed_write_leaves_the_old_folder_and_runs_the_tensors_to_their_end(
    trainer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    write_folder(str(target), trainer_model, tensors(), {}, max_shard_bytes=400)
    seen = []

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in tensors(9.0):
            seen.append(name)
            yield name, value

    def fill_up(shard: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if path.name == "shard-1":
            raise OSError(28, "No space left on device", str(path))
        save_file(shard, path, metadata)

    monkeypatch.setattr("services.trainer.hf.save_file", fill_up)
    with pytest.raises(ResourceExhaustedError, match=rf"{target}: No space left on device"):
        write_folder(str(target), trainer_model, watched(), {}, max_shard_bytes=400)
    assert seen == [f"t{i}" for i in range(5)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert torch.equal(TensorReader(target).read("t3"), torch.full((100,), 3.0))


def test_a_folder_is_replaced_whole(trainer_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    write_folder(str(target), trainer_model, tensors(), {}, max_shard_bytes=400)
    write_folder(str(target), trainer_model, tensors(5.0), {}, max_shard_bytes=1 << 20)
    assert sorted(path.name for path in target.glob("*.safetensors*")) == ["model.safetensors"]
    assert load_file(target / "model.safetensors")["t1"][0] == 6.0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_checkpoints_are_kept_n_deep_and_found_by_version(trainer_model: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", trainer_model, keep=2, max_shard_bytes=1 << 20)
    assert checkpoints.find("r", None) == 0
    assert checkpoints.fetch("r", 0) == trainer_model
    for version in (1, 2, 3):
        checkpoints.write("r", version, tensors(version))
    assert checkpoints.versions("r") == [2, 3]
    assert checkpoints.find("r", None) == 3
    assert checkpoints.fetch("r", 3) == checkpoints.path_of("r", 3)
    with pytest.raises(NotFoundError, match=r"no checkpoint of version 1, only \[2, 3\]"):
        checkpoints.find("r", 1)
    checkpoints.write("pinned", 1, tensors(1), pinned=True)
    for version in (2, 3, 4, 5):
        checkpoints.write("pinned", version, tensors(version))
        if version == 3:
            assert checkpoints.pin("pinned", version) > 0
    assert checkpoints.versions("pinned") == [1, 3, 4, 5]
    checkpoints.write("pinned", 6, tensors(6))
    assert checkpoints.versions("pinned") == [1, 3, 5, 6]
    assert checkpoints.fetch("pinned", 3) == checkpoints.path_of("pinned", 3)
    (checkpoints.path_of("r", 3) / "perigee.json").unlink()
    with pytest.raises(DataLossError, match=str(checkpoints.path_of("r", 3))):
        checkpoints.fetch("r", 3)


def test_runs_neither_overwrite_nor_prune_each_other_s_checkpoints(trainer_model: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", trainer_model, keep=2, max_shard_bytes=1 << 20)
    for version in (1, 2):
        checkpoints.write("first", version, tensors(version))
    for version in (2, 3, 4):
        checkpoints.write("../second", version, tensors(10 * version))
    assert checkpoints.versions("first") == [1, 2]
    assert checkpoints.versions("../second") == [3, 4]
    assert TensorReader(checkpoints.fetch("first", 2)).read("t0")[0] == 2
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoints"]
    assert checkpoints.find("third", None) == 0
