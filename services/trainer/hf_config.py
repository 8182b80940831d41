"""Reads a Hugging Face model folder's configuration: which architectures are known and what their fields mean."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perigee.errors import InvalidArgumentError

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the trainer needs to know of an architecture to build it."""

    architecture: str
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    query_groups: int
    head_width: int
    vocabulary: int
    max_positions: int
    norm_epsilon: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    eos_token_id: int
    inverse_frequencies_D: torch.Tensor


def read_model_shape(folder: Path) -> ModelShape:
    """The shape of the model in `folder`.

    Raises InvalidArgumentError naming the file when the folder is no model or one that is not supported.
    """
    config = read_json_file(folder / "config.json")
    name = next(iter(config.get("architectures") or ["none"]))
    if name not in ARCHITECTURES:
        raise InvalidArgumentError(
            f"{folder / 'config.json'}: architecture {name} is not one of {sorted(ARCHITECTURES)}"
        )
    kind = ARCHITECTURES[name]
    for field, wanted in {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}.items():
        if config.get(field, wanted) != wanted:
            raise InvalidArgumentError(
                f"{folder / 'config.json'}: {field} {config[field]} is not supported, only {wanted}"
            )
    if kind != "qwen2" and config.get("attention_bias"):
        raise InvalidArgumentError(f"{folder / 'config.json'}: attention_bias true is not supported for {name}")
    try:
        heads = int(config["num_attention_heads"])
        head_width = int(config.get("head_dim") or config["hidden_size"] // heads)
        return ModelShape(
            architecture=kind,
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            ffn_hidden=int(config["intermediate_size"]),
            heads=heads,
            query_groups=int(config.get("num_key_value_heads") or heads),
            head_width=head_width,
            vocabulary=int(config["vocab_size"]),
            max_positions=int(config["max_position_embeddings"]),
            norm_epsilon=float(config["rms_norm_eps"]),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            tied=bool(config.get("tie_word_embeddings", False)),
            eos_token_id=_eos_token_id(folder, config),
            inverse_frequencies_D=_inverse_frequencies(folder, config, head_width),
        )
    except KeyError as error:
        raise InvalidArgumentError(f"{folder / 'config.json'}: the field {error} is missing") from error


def read_json_file(path: Path) -> dict[str, Any]:
    """A JSON object; InvalidArgumentError naming the file when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError(
            f"{path} cannot be read ({error.strerror}): is this a Hugging Face folder?"
        ) from error
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{path} holds no JSON object")
    return value


def _eos_token_id(folder: Path, config: dict[str, Any]) -> int:
    generation = folder / "generation_config.json"
    value = read_json_file(generation).get("eos_token_id") if generation.exists() else None
    if value is None:
        value = config.get("eos_token_id")
    if isinstance(value, list):
        value = value[0]
    if value is None:
        raise InvalidArgumentError(f"{folder / 'config.json'}: the field eos_token_id is missing")
    return int(value)


def _inverse_frequencies(folder: Path, config: dict[str, Any], head_width: int) -> torch.Tensor:
    # transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling.
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    exponents_D = torch.arange(0, head_width, 2, dtype=torch.int64).float() / head_width
    frequencies_D = 1.0 / theta**exponents_D
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return frequencies_D
    if kind == "linear":
        return frequencies_D / float(rope["factor"])
    if kind != "llama3":
        raise InvalidArgumentError(f"{folder / 'config.json'}: rope type {kind} is not one of default, linear, llama3")
    context = float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    wavelengths_D = 2 * math.pi / frequencies_D
    smooth_D = ((context / wavelengths_D - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth_D) * frequencies_D / float(rope["factor"]) + smooth_D * frequencies_D
