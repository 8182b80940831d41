"""Architectures that the trainer builds, told by config.json alone, without torch."""

from __future__ import annotations

from typing import Any

from services.kit.hf import CONFIG_FILE, ModelFolder

ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "LlamaForCausalLM": "llama",
}
ROPE_TYPES = ("default", "linear", "llama3")


def read_architecture(folder: ModelFolder) -> str:
    """Returns the kind of architecture; raises InvalidArgumentError when it, or an option of it, is not supported."""
    config = folder.config
    name = next(iter(config.get("architectures") or ["none"]))
    if name not in ARCHITECTURES:
        raise folder.error(CONFIG_FILE, f"has architecture {name}, which is not one of {sorted(ARCHITECTURES)}")
    kind = ARCHITECTURES[name]
    wanted: dict[str, Any] = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}
    if kind != "qwen2":
        wanted["attention_bias"] = False
    if kind == "qwen3_moe":
        wanted |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        if config.get("num_experts_per_tok") == 1:
            wanted["norm_topk_prob"] = False
    for field, value in wanted.items():
        if (config.get(field) or value) != value:
            raise folder.error(CONFIG_FILE, f"has {field} {config[field]}, of which only {value} is supported")
    read_rope(folder)
    return kind


def read_rope(folder: ModelFolder) -> tuple[str, dict[str, Any]]:
    """Returns the type of the rotary embedding and its settings; raises InvalidArgumentError for another type."""
    # transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling.
    rope = {**(folder.config.get("rope_scaling") or {}), **(folder.config.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise folder.error(CONFIG_FILE, f"has rope type {kind}, which is not one of {', '.join(ROPE_TYPES)}")
    return kind, rope
