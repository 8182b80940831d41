"""The model that the visual recipe starts from: an Idefics3 config, random weights and a character tokenizer.

Nothing is downloaded. The folder is a Hugging Face one: `transformers`, vLLM and the trainer load it as it is.
Idefics3, the architecture of SmolVLM, is a Llama behind a tower of its own; its processor needs no torchvision.
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

# The special tokens, in the order of their ids. Those around an image are Idefics3's own.
PAD, EOS, UNKNOWN, IMAGE = "<pad>", "<eos>", "<unk>", "<image>"
SPECIAL_TOKENS = [PAD, EOS, UNKNOWN, "<fake_token_around_image>", "<global-img>", IMAGE, "<end_of_utterance>"]
PAD_ID, EOS_ID, IMAGE_ID = 0, 1, 5
CHARACTERS = string.digits + "+-*/%()=;#:,.?! " + string.ascii_lowercase
# What is said, images where they stand, and "=" before each answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}={% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
# Longest prompt and response together, in tokens.
CONTEXT = 256
Weights = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


@dataclass(frozen=True)
class Shape:
    """Size of the model, 1.04 million parameters by default, and standard deviation of its first weights.

    An image is resized to `image` pixels on its longer side and becomes (image / patch / scale)² tokens. A tower of
    this size starts far more slowly with the usual deviation of 0.02.
    """

    hidden: int = 128
    layers: int = 3
    intermediate: int = 512
    heads: int = 4
    kv_heads: int = 2
    vision_hidden: int = 96
    vision_layers: int = 2
    vision_heads: int = 4
    image: int = 56
    patch: int = 14
    scale: int = 1
    std: float = 0.06

    @property
    def image_tokens(self) -> int:
        """Tokens of an image, without the three around them."""
        return (self.image // self.patch // self.scale) ** 2


def make_tokenizer() -> Tokenizer:
    """Returns a tokenizer with one token per character; a character outside CHARACTERS becomes <unk>."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def make_config(vocabulary_size: int, shape: Shape) -> dict[str, Any]:
    """Returns the model's config.json; transformers reads the outer `tie_word_embeddings`, vLLM the inner one."""
    text = {
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "head_dim": shape.hidden // shape.heads,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": shape.std,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": CONTEXT,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": PAD_ID,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": vocabulary_size,
    }
    vision = {
        "model_type": "idefics3_vision",
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": shape.vision_hidden,
        "image_size": shape.image,
        "initializer_range": shape.std,
        "intermediate_size": 4 * shape.vision_hidden,
        "layer_norm_eps": 1e-6,
        "num_attention_heads": shape.vision_heads,
        "num_channels": 3,
        "num_hidden_layers": shape.vision_layers,
        "patch_size": shape.patch,
    }
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_token_id": IMAGE_ID,
        "pad_token_id": PAD_ID,
        "scale_factor": shape.scale,
        "text_config": text,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vision_config": vision,
    }


def make_weights(rng: np.random.Generator, vocabulary_size: int, shape: Shape) -> Weights:
    """Draws the weights: normal, residual outputs scaled down by depth, norms 1, biases 0."""
    weights = _make_tower(rng, shape) | _make_decoder(rng, vocabulary_size, shape)
    projection = (shape.hidden, shape.vision_hidden * shape.scale**2)
    return weights | {"model.connector.modality_projection.proj.weight": _draw(rng, projection, shape.std)}


def _make_tower(rng: np.random.Generator, shape: Shape) -> Weights:
    hidden, prefix = shape.vision_hidden, "model.vision_model"
    places = (shape.image // shape.patch) ** 2
    weights = {
        f"{prefix}.embeddings.patch_embedding.weight": _draw(rng, (hidden, 3, shape.patch, shape.patch), shape.std),
        f"{prefix}.embeddings.patch_embedding.bias": np.zeros(hidden, np.float32),
        f"{prefix}.embeddings.position_embedding.weight": _draw(rng, (places, hidden), shape.std),
    }
    linears = {f"self_attn.{name}": (hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    linears |= {"mlp.fc1": (4 * hidden, hidden), "mlp.fc2": (hidden, 4 * hidden)}
    norms, residual_std = [f"{prefix}.post_layernorm"], shape.std / math.sqrt(2 * shape.vision_layers)
    for layer in range(shape.vision_layers):
        block = f"{prefix}.encoder.layers.{layer}"
        norms += [f"{block}.layer_norm1", f"{block}.layer_norm2"]
        for name, size in linears.items():
            std = residual_std if name in ("self_attn.out_proj", "mlp.fc2") else shape.std
            weights[f"{block}.{name}.weight"] = _draw(rng, size, std)
            weights[f"{block}.{name}.bias"] = np.zeros(size[0], np.float32)
    for norm in norms:
        weights[f"{norm}.weight"] = np.ones(hidden, np.float32)
        weights[f"{norm}.bias"] = np.zeros(hidden, np.float32)
    return weights


def _make_decoder(rng: np.random.Generator, vocabulary_size: int, shape: Shape) -> Weights:
    hidden, intermediate, prefix = shape.hidden, shape.intermediate, "model.text_model"
    keys, residual_std = hidden // shape.heads * shape.kv_heads, shape.std / math.sqrt(2 * shape.layers)
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    weights = {
        f"{prefix}.embed_tokens.weight": _draw(rng, (vocabulary_size, hidden), shape.std),
        f"{prefix}.norm.weight": np.ones(hidden, np.float32),
    }
    for layer in range(shape.layers):
        block = f"{prefix}.layers.{layer}"
        for name, size in linears.items():
            std = residual_std if name in ("self_attn.o_proj", "mlp.down_proj") else shape.std
            weights[f"{block}.{name}.weight"] = _draw(rng, size, std)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{block}.{norm}.weight"] = np.ones(hidden, np.float32)
    return weights


def _draw(rng: np.random.Generator, size: tuple[int, ...], std: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (rng.standard_normal(size) * std).astype(np.float32)


def make_processor(shape: Shape) -> dict[str, dict[str, Any]]:
    """Returns preprocessor_config.json and processor_config.json: whole images, never split into parts."""
    edge = {"longest_edge": shape.image}
    return {
        "preprocessor_config.json": {
            "image_processor_type": "Idefics3ImageProcessor",
            "processor_class": "Idefics3Processor",
            "do_convert_rgb": True,
            "do_image_splitting": False,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "max_image_size": edge,
            "size": edge,
        },
        "processor_config.json": {"processor_class": "Idefics3Processor", "image_seq_len": shape.image_tokens},
    }


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
    files = make_processor(shape) | {
        "tokenizer_config.json": tokenizer_config,
        "config.json": make_config(size, shape),
        "generation_config.json": {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID},
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    weights = make_weights(np.random.default_rng(seed), size, shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
