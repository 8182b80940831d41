"""Hugging Face model folders: the shape that a configuration describes, tensors by name, and folders written whole."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from perigee.errors import InvalidArgumentError, ResourceExhaustedError
from services.kit import storage
from services.kit.hf import (
    COMPANION_FILES,
    CONFIG_FILE,
    INDEX_FILE,
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    SINGLE_FILE,
    ModelFolder,
    open_model_folder,
)
from services.kit.rope import Rope, RopeConfig
from services.trainer.architecture import read_architecture, takes_images, text_prefix
from services.weights.safetensors import cut_into_shards

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TowerShape:
    """Vision tower of a model that takes images; `folder` describes it and its image processor."""

    architecture: str
    """Hugging Face's name of the whole model."""
    folder: Path
    image_token_id: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes and options by which an architecture is built."""

    architecture: str
    layers: int
    hidden: int
    ffn_hidden: int
    """Width of the feed-forward part, or of each expert."""
    heads: int
    query_groups: int
    head_width: int
    vocabulary: int
    max_positions: int
    norm_epsilon: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    experts: int
    """0 without a mixture of experts."""
    experts_per_token: int
    norm_topk_prob: bool
    inverse_frequencies_D: torch.Tensor
    attention_factor: float
    """Factor of queries and of keys, by which YaRN sharpens attention; else 1."""
    axes_D: torch.Tensor | None
    """Axis of the positions (time, height, width) that each frequency turns by; None where positions count tokens."""
    prefix: str
    """What the names of the language model's tensors begin with."""
    tower: TowerShape | None
    """None of a model that takes text alone."""


def read_model_shape(path: Path, rope: RopeConfig | None = None) -> ModelShape:
    """Returns the shape of the model in a folder, with another rotary embedding where one is given.

    Raises InvalidArgumentError naming the file when the folder is no model or one that is not supported.
    """
    folder = open_model_folder(path, "trainer.model")
    if rope is not None:
        folder = folder.with_rope(rope, "rope")
    config = folder.text_config
    kind = read_architecture(folder)
    heads = folder.positive_integer("num_attention_heads")
    hidden = folder.positive_integer("hidden_size")
    head_width = int(config.get("head_dim") or hidden // heads)
    is_moe = kind == "qwen3_moe"
    # transformers 4 writes num_experts, transformers 5 num_local_experts.
    count = "num_experts" if "num_experts" in config else "num_local_experts"
    return ModelShape(
        architecture=kind,
        layers=folder.positive_integer("num_hidden_layers"),
        hidden=hidden,
        ffn_hidden=folder.positive_integer("moe_intermediate_size" if is_moe else "intermediate_size"),
        heads=heads,
        query_groups=int(config.get("num_key_value_heads") or heads),
        head_width=head_width,
        vocabulary=folder.vocabulary_size,
        max_positions=folder.context_tokens,
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        tied=folder.is_tied,
        experts=folder.positive_integer(count) if is_moe else 0,
        experts_per_token=folder.positive_integer("num_experts_per_tok") if is_moe else 0,
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        inverse_frequencies_D=inverse_frequencies(folder.rope, head_width),
        attention_factor=attention_factor(folder.rope),
        axes_D=_rotary_axes(folder, head_width),
        prefix=text_prefix(folder),
        tower=_read_tower(folder),
    )


def _read_tower(folder: ModelFolder) -> TowerShape | None:
    if not takes_images(folder):
        return None
    for name in ("vision_config", "image_token_id"):
        if name not in folder.config:
            raise folder.error(CONFIG_FILE, f"has no {name}")
    if not any((folder.path / name).is_file() for name in (PREPROCESSOR_FILE, PROCESSOR_FILE)):
        raise folder.error(PREPROCESSOR_FILE, "is missing: it says how images are prepared")
    return TowerShape(folder.config["architectures"][0], folder.path, int(folder.config["image_token_id"]))


def _rotary_axes(folder: ModelFolder, head_width: int) -> torch.Tensor | None:
    """Returns the axis of each frequency, [head_width / 2]; None where all positions are on one."""
    sections = folder.rope.settings.get("mrope_section")
    if sections is None:
        return None
    if len(sections) != 3 or sum(sections) != head_width // 2:
        raise folder.error(CONFIG_FILE, f"has mrope_section {sections}, which is not three parts of {head_width // 2}")
    return torch.repeat_interleave(torch.arange(3), torch.tensor(sections))


def inverse_frequencies(rope: Rope, head_width: int) -> torch.Tensor:
    """Returns the rotary embedding's frequencies, [head_width / 2], in radians per position."""
    exponents_D = torch.arange(0, head_width, 2, dtype=torch.int64).float() / head_width
    steps_D = rope.theta**exponents_D
    frequencies_D = 1.0 / steps_D
    if rope.type == "default":
        return frequencies_D
    settings, factor = rope.settings, float(rope.settings["factor"])
    if rope.type == "linear":
        return frequencies_D / factor
    context = float(settings["original_max_position_embeddings"])
    if rope.type == "yarn":
        kept_D = 1 - _yarn_ramp(rope, head_width)
        # In the order of transformers: what a division rounds otherwise grows with the position.
        return 1.0 / (factor * steps_D) * (1 - kept_D) + frequencies_D * kept_D
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    wavelengths_D = 2 * math.pi / frequencies_D
    smooth_D = ((context / wavelengths_D - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth_D) * frequencies_D / factor + smooth_D * frequencies_D


def _yarn_ramp(rope: Rope, head_width: int) -> torch.Tensor:
    """Returns how far each frequency is divided, 0 to 1 (arXiv 2309.00071, section 3.2), [head_width / 2]."""
    settings = rope.settings
    context = settings["original_max_position_embeddings"]
    low, high = (
        head_width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (settings.get("beta_fast") or 32, settings.get("beta_slow") or 1)
    )
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(head_width // 2).float() - low) / (high - low)).clamp(0.0, 1.0)


def attention_factor(rope: Rope) -> float:
    """Returns the factor of queries and of keys: YaRN's, as transformers and vLLM compute it, else 1."""
    if rope.type != "yarn":
        return 1.0
    settings = rope.settings
    if (given := settings.get("attention_factor")) is not None:
        return float(given)
    upper, lower = settings.get("mscale"), settings.get("mscale_all_dim")
    if not (upper and lower):
        upper, lower = 1.0, 0.0
    growth = 0.1 * math.log(max(settings["factor"], 1.0))
    return float((upper * growth + 1) / (lower * growth + 1))


class TensorReader:
    """Reads tensors by name from the safetensors files of a folder, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_by_name = open_model_folder(folder, "trainer.model").tensor_files()
        if not self._file_by_name:
            with _open_tensors(folder / SINGLE_FILE) as file:
                self._file_by_name = dict.fromkeys(file.keys(), folder / SINGLE_FILE)

    def read(self, name: str) -> torch.Tensor:
        """Returns the tensor called `name`; raises InvalidArgumentError naming the folder or file without it."""
        if name not in self._file_by_name:
            raise InvalidArgumentError(f"{self._folder} holds no tensor {name}")
        with _open_tensors(self._file_by_name[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


@contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InvalidArgumentError(f"{path} cannot be read: {error}") from error


def write_folder(
    target: str,
    source: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    extra: Mapping[str, Mapping[str, Any]],
    max_shard_bytes: int,
    rope: RopeConfig | None = None,
) -> int:
    """Writes the tensors with the configuration and tokenizer of `source` as folder or URL `target`; returns its bytes.

    The folder appears whole or not at all; one that was there is replaced. `extra` holds further JSON files by name,
    and `rope` is a rotary embedding in the place of that of `source`.
    The iterable is always run to its end, as other ranks take part in it. Raises ResourceExhaustedError naming the
    folder when the disk refuses, and then leaves nothing behind.
    """
    remaining = iter(tensors)
    try:
        with storage.writing_folder(target, "path", CONFIG_FILE) as staging:
            dtype = _write_shards(staging, remaining, max_shard_bytes)
            model = open_model_folder(source, "trainer.model")
            model = model if rope is None else model.with_rope(rope, "rope")
            config = model.config | {"dtype": dtype, "torch_dtype": dtype}
            for name, content in {CONFIG_FILE: config, **extra}.items():
                _write_json(staging / name, content)
            for name in COMPANION_FILES:
                if (source / name).exists():
                    shutil.copyfile(source / name, staging / name)
            return sum(path.stat().st_size for path in staging.iterdir())
    except (OSError, SafetensorError) as error:
        for _ in remaining:
            pass
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ResourceExhaustedError(
            f"the model cannot be written to {target}: {reason}; free space or name another folder", retry_after_s=None
        ) from error


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> str:
    """Writes shards of bounded size under Hugging Face's names; returns the name of the weights' dtype."""
    shard_by_name: dict[str, int] = {}
    shards = total_bytes = 0
    dtype = "float32"
    for each in cut_into_shards(((name, tensor.cpu()) for name, tensor in tensors), max_shard_bytes):
        shard = dict(each)
        save_file(shard, folder / f"shard-{shards}", metadata={"format": "pt"})
        shard_by_name.update(dict.fromkeys(shard, shards))
        shards += 1
        for tensor in shard.values():
            total_bytes += tensor.nbytes
            dtype = str(tensor.dtype).removeprefix("torch.")
    if shards == 1:
        (folder / "shard-0").rename(folder / SINGLE_FILE)
        return dtype
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
    weight_map = {name: names[i] for name, i in shard_by_name.items()}
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return dtype


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
