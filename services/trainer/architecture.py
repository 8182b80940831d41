"""Architectures that the trainer builds, told by config.json alone, without torch."""

from __future__ import annotations

from typing import Any

from perigee.errors import InvalidArgumentError
from services.kit.hf import CONFIG_FILE, ModelFolder

IDEFICS3, QWEN2_VL, QWEN2_5_VL = (f"{name}ForConditionalGeneration" for name in ("Idefics3", "Qwen2VL", "Qwen2_5_VL"))
ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "LlamaForCausalLM": "llama",
    IDEFICS3: "llama",
    QWEN2_VL: "qwen2",
    QWEN2_5_VL: "qwen2",
}
# What the names of the language model's tensors begin with, of the architectures that take images.
TEXT_PREFIXES = {IDEFICS3: "model.text_model.", QWEN2_VL: "model.", QWEN2_5_VL: "model."}


def read_architecture(folder: ModelFolder) -> str:
    """Returns the kind of language model; raises InvalidArgumentError when it, or an option of it, is not supported."""
    config = folder.text_config
    name = next(iter(folder.config.get("architectures") or ["none"]))
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
    if folder.is_tied and not config.get("tie_word_embeddings"):
        raise folder.error(
            CONFIG_FILE,
            "has tie_word_embeddings, and its text_config has not: transformers goes by the one and engines by the "
            "other, so set both",
        )
    _ = folder.rope
    return kind


def check_divisible(
    *,
    heads: int,
    query_groups: int,
    feed_forward: int,
    vocabulary: int,
    experts: int,
    layers: int,
    tensor: int,
    context: int,
    pipeline: int,
    expert: int,
) -> None:
    """Raises InvalidArgumentError naming the parallel size that does not divide the model.

    `feed_forward` is the width of the layers' feed-forward networks, 0 where experts are in their place, which stay
    whole.
    """
    shared = {
        "attention heads": heads,
        "key-value heads": query_groups,
        "feed-forward width": feed_forward,
        "vocabulary": vocabulary,
    }
    for name, size in shared.items():
        if size % tensor:
            raise InvalidArgumentError(f"trainer.tensor_parallel {tensor} does not divide the model's {name} ({size})")
    if heads % (tensor * context):
        raise InvalidArgumentError(
            f"trainer.tensor_parallel x trainer.context_parallel, {tensor} x {context}, does not divide the model's "
            f"attention heads ({heads})"
        )
    if experts % expert or experts < expert > 1:
        raise InvalidArgumentError(f"trainer.expert_parallel {expert} does not divide the model's experts ({experts})")
    if layers % pipeline:
        raise InvalidArgumentError(f"trainer.pipeline_parallel {pipeline} does not divide the model's {layers} layers")


def takes_images(folder: ModelFolder) -> bool:
    """Returns whether the model has a vision tower."""
    return folder.config["architectures"][0] in TEXT_PREFIXES


def text_prefix(folder: ModelFolder) -> str:
    """Returns what the names of the language model's tensors begin with."""
    return TEXT_PREFIXES.get(folder.config["architectures"][0], "model.")
