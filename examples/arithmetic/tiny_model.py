"""The model that the recipe starts from: a Qwen2 config, random weights and a character tokenizer.

Nothing is downloaded. The folder is a Hugging Face one: `transformers`, vLLM and the trainer load it as it is.
"""

import json
import math
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

# The special tokens, in the order of their ids.
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
PAD_ID, EOS_ID = 0, 1
CHARACTERS = string.digits + "+-*/%()=;#:, " + string.ascii_lowercase
# Longest prompt and response together, in tokens.
CONTEXT = 256

# Small models start slowly with the usual 0.02: the loss of step 600 is reached by step 400 with this.
INITIAL_STD = 0.05


@dataclass(frozen=True)
class Shape:
    """Size of the model; the default has 745,600 parameters."""

    hidden: int = 128
    layers: int = 3
    intermediate: int = 512
    heads: int = 4
    kv_heads: int = 2


def make_tokenizer() -> Tokenizer:
    """Returns a tokenizer with one token per character; a character outside CHARACTERS becomes <unk>."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([PAD, EOS, UNKNOWN])
    return tokenizer


def make_config(vocabulary_size: int, shape: Shape) -> dict[str, Any]:
    """Returns the model's config.json."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": INITIAL_STD,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": CONTEXT,
        "max_window_layers": shape.layers,
        "model_type": "qwen2",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": PAD_ID,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocabulary_size,
    }


def make_weights(
    rng: np.random.Generator, vocabulary_size: int, shape: Shape
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Draws the weights: normal with INITIAL_STD, residual outputs scaled down by depth, norms 1, biases 0."""
    hidden, head = shape.hidden, shape.hidden // shape.heads
    residual_std = INITIAL_STD / math.sqrt(2 * shape.layers)

    def draw(rows: int, columns: int, std: float = INITIAL_STD) -> np.ndarray[Any, np.dtype[np.float32]]:
        return (rng.standard_normal((rows, columns)) * std).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": draw(vocabulary_size, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = draw(heads * head, hidden)
            weights[f"{prefix}.self_attn.{name}_proj.bias"] = np.zeros(heads * head, np.float32)
        weights[f"{prefix}.self_attn.o_proj.weight"] = draw(hidden, shape.heads * head, residual_std)
        weights[f"{prefix}.mlp.gate_proj.weight"] = draw(shape.intermediate, hidden)
        weights[f"{prefix}.mlp.up_proj.weight"] = draw(shape.intermediate, hidden)
        weights[f"{prefix}.mlp.down_proj.weight"] = draw(hidden, shape.intermediate, residual_std)
        weights[f"{prefix}.input_layernorm.weight"] = np.ones(hidden, np.float32)
        weights[f"{prefix}.post_attention_layernorm.weight"] = np.ones(hidden, np.float32)
    return weights


def write_model(folder: Path, seed: int, shape: Shape | None = None) -> None:
    """Writes the Hugging Face folder of an untrained model."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    size, shape = tokenizer.get_vocab_size(), shape or Shape()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "config.json", make_config(size, shape))
    _write_json(folder / "generation_config.json", {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID})
    weights = make_weights(np.random.default_rng(seed), size, shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
