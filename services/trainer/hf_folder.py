"""Hugging Face folders on disk: reading tensors by name, and writing folders that appear complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from perigee.errors import InvalidArgumentError, ResourceExhaustedError
from services.trainer.hf_config import read_json_file

# What a model folder holds beside config.json and the weights; copied as it is when present.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class TensorReader:
    """Reads tensors by name from the safetensors files of a folder, one at a time."""

    def __init__(self, folder: Path) -> None:
        index = folder / _INDEX
        if index.exists():
            self._file_by_name = {name: folder / file for name, file in read_json_file(index)["weight_map"].items()}
        else:
            self._file_by_name = dict.fromkeys(_names_in(folder / _SINGLE), folder / _SINGLE)
        self._folder = folder

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`; InvalidArgumentError naming the folder or file when it is not there."""
        if name not in self._file_by_name:
            raise InvalidArgumentError(f"{self._folder} holds no tensor {name}")
        path = self._file_by_name[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise InvalidArgumentError(f"{path} cannot be read: {error}") from error


def write_folder(
    target: Path,
    source: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    extra: dict[str, dict[str, Any]],
    max_shard_bytes: int,
) -> int:
    """Writes the tensors with the configuration and tokenizer of `source` as folder `target`; returns its bytes.

    Written beside the target, synced to disk, then renamed; a folder that was there is replaced. `extra` holds further
    JSON files by name. The iterable is always run to its end, as other ranks take part in it. Raises
    ResourceExhaustedError naming the folder when the disk refuses, and then leaves nothing behind.
    """
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    remaining = iter(tensors)
    try:
        aside.mkdir(parents=True)
        dtype = _write_shards(aside, remaining, max_shard_bytes)
        _write_json(
            aside / "config.json", {**read_json_file(source / "config.json"), "dtype": dtype, "torch_dtype": dtype}
        )
        for name in COMPANION_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, aside / name)
                _sync(aside / name)
        for name, content in extra.items():
            _write_json(aside / name, content)
        size = sum(path.stat().st_size for path in aside.iterdir())
        _sync(aside)
        _replace(aside, target)
        return size
    except (OSError, SafetensorError) as error:
        for _ in remaining:
            pass
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ResourceExhaustedError(
            f"the model cannot be written to {target}: {reason}; free space or name another folder", retry_after_s=None
        ) from error


def remove_stale_asides(folder: Path) -> None:
    """Removes what a killed writer left half-written beside its targets in `folder`."""
    for path in folder.glob(".*.????????"):
        shutil.rmtree(path)


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise InvalidArgumentError(f"{path} cannot be read: {error}") from error


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> str:
    """Writes shards of bounded size under Hugging Face's names; returns the name of the weights' dtype."""
    file_by_name: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}
    shards = shard_bytes = total_bytes = 0
    dtype = "float32"

    def flush() -> None:
        nonlocal shards, shard_bytes
        path = folder / f"shard-{shards}"
        save_file(shard, path, metadata={"format": "pt"})
        _sync(path)
        file_by_name.update(dict.fromkeys(shard, shards))
        shard.clear()
        shards, shard_bytes = shards + 1, 0

    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            flush()
        shard[name] = tensor.cpu()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        dtype = str(tensor.dtype).removeprefix("torch.")
    flush()
    if shards == 1:
        (folder / "shard-0").rename(folder / _SINGLE)
        return dtype
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
    weight_map = {name: names[i] for name, i in file_by_name.items()}
    _write_json(folder / _INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return dtype


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def _replace(aside: Path, target: Path) -> None:
    if target.exists():
        # rename(2) does not replace a folder that holds files; the old one steps aside for the moment between.
        old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
        target.rename(old)
        aside.rename(target)
        shutil.rmtree(old)
    else:
        aside.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
