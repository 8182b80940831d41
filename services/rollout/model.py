"""Policy of a model folder: limits, stop tokens, tokenizer, and the tensors that a checkpoint of it must hold."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from perigee.buffer.packing import choice_bytes
from perigee.errors import InvalidArgumentError
from services.kit.chat import PromptEncoder, open_encoder
from services.kit.hf import ModelFolder, count_experts, open_model_folder
from services.kit.vision import VisionModel
from services.weights.manifest import WeightImage
from services.weights.safetensors import FIELD as SHARDS_FIELD
from services.weights.safetensors import read_header

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FIELD = "rollout.model"
OUTPUT_LAYER = "lm_head.weight"


@dataclass(frozen=True)
class PolicyModel:
    """Shape and tokenizer of a policy; its weights are pushed later."""

    path: Path
    context_tokens: int
    """Prompt and response tokens that a sequence may have."""
    vocabulary_size: int
    dtype: str
    """Type of the weights by config.json; "auto" when it names none."""
    stop_token_ids: tuple[int, ...]
    encoder: PromptEncoder
    """Chat template and tokenizer."""
    expert_bytes: int = 0
    """Bytes of a token's packed expert choices; 0 without a mixture of experts."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer."""
        return self.encoder.tokenizer

    @property
    def vision(self) -> VisionModel | None:
        """Returns how it takes images; None for one that takes none."""
        return self.encoder.vision

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of a response without the stop token that ends it; special tokens inside it are shown."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    @cached_property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors of a checkpoint, from config.json; no memory is taken for them."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.core_model_loading import revert_weight_conversion

        config = AutoConfig.from_pretrained(self.path)
        with torch.device("meta"):
            model = (AutoModelForImageTextToText if self.vision else AutoModelForCausalLM).from_config(config)
            # In memory the experts of a layer are one tensor.
            state = revert_weight_conversion(model, model.state_dict())
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if config.tie_word_embeddings:
            del shapes[OUTPUT_LAYER]
        return shapes

    def require_vision(self) -> VisionModel:
        """Returns how the model takes images; raises InvalidArgumentError for one that takes none."""
        if self.vision is None:
            raise InvalidArgumentError.for_field("image_digests", f"the model of {self.path} takes no images")
        return self.vision

    def check_image(self, image: WeightImage) -> None:
        """Checks that an image is one whole checkpoint of this model; the tied output layer may come along.

        A missing part of a fused weight would leave garbage in its place without any error from the engine.
        Raises InvalidArgumentError that names the first tensor that is wrong.
        """
        found = {tensor.name: tuple(tensor.shape) for tensor in image.manifest.tensors}
        with image.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for shard in image.manifest.shards:
                with memoryview(mapped)[shard.offset : shard.offset + shard.bytes] as view:
                    found |= {entry.name: entry.shape for entry in read_header(view)[0]}
        missing = sorted(self.tensor_shapes.keys() - found.keys())
        if missing:
            reason = f"tensor {missing[0]} is missing ({len(missing)} in all)"
            raise InvalidArgumentError.for_field(SHARDS_FIELD, reason)
        for name, shape in found.items():
            expected = self.tensor_shapes.get(name)
            if expected is None and name != OUTPUT_LAYER:
                raise InvalidArgumentError.for_field(SHARDS_FIELD, f"the model has no tensor {name}")
            if expected is not None and shape != expected:
                reason = f"tensor {name} has shape {list(shape)}, the model wants {list(expected)}"
                raise InvalidArgumentError.for_field(SHARDS_FIELD, reason)


def open_policy(path: str, max_model_len: int | None) -> PolicyModel:
    """Reads a Hugging Face model folder, except for weights.

    Raises InvalidArgumentError that names the file when the folder is not a model's, or is one that cannot generate.
    """
    folder = open_model_folder(path, FIELD)
    context = folder.context_tokens
    if max_model_len is not None and max_model_len > context:
        raise InvalidArgumentError.for_field(
            "rollout.max_model_len", f"{max_model_len} is more than the model's {context} positions"
        )
    return PolicyModel(
        path=folder.path,
        context_tokens=min(context, max_model_len or context),
        vocabulary_size=folder.vocabulary_size,
        dtype=folder.dtype,
        stop_token_ids=folder.stop_token_ids,
        encoder=open_encoder(folder),
        expert_bytes=count_expert_bytes(folder),
    )


def count_expert_bytes(folder: ModelFolder) -> int:
    """Returns the bytes of a token's packed expert choices; 0 without a mixture of experts."""
    experts = count_experts(folder.config)
    if not experts:
        return 0
    layers = folder.positive_integer("num_hidden_layers")
    return layers * folder.positive_integer("num_experts_per_tok") * choice_bytes(experts)


def require_experts(path: Path, experts: int) -> None:
    """Raises InvalidArgumentError for a model without experts, whose choices router replay would record."""
    if not experts:
        reason = f"{path} is no mixture of experts, so there is nothing to record: unset it"
        raise InvalidArgumentError.for_field("rollout.router_replay", reason)
