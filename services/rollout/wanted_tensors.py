"""Checks a checkpoint against the tensors that the model of a folder wants, before the engine sees it."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from perigee.errors import InvalidArgumentError
from services.rollout.engine import WeightShard
from services.rollout.safetensors_image import read_header

FIELD = "manifest.shards"
OUTPUT_LAYER = "lm_head.weight"


class WantedTensors:
    """Names and shapes of a model's tensors, made from its config.json without any memory for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that a checkpoint must hold."""
        config = AutoConfig.from_pretrained(self._folder)
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(config).state_dict()  # type: ignore[no-untyped-call]
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if config.tie_word_embeddings:
            del shapes[OUTPUT_LAYER]
        return shapes


def check_image(path: Path, shards: Sequence[WeightShard], wanted: WantedTensors) -> None:
    """Checks that the shards of an image are one whole checkpoint of the model.

    A missing part of a fused weight would leave rubbish in its place without any error from the engine. The output
    layer may come along when it is tied to the embedding.
    Raises InvalidArgumentError that names the first tensor that is wrong.
    """
    found: dict[str, tuple[int, ...]] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
        for shard in shards:
            with memoryview(image)[shard.offset : shard.offset + shard.bytes] as view:
                found |= {entry.name: entry.shape for entry in read_header(view)[0]}
    missing = sorted(wanted.shapes.keys() - found.keys())
    if missing:
        raise InvalidArgumentError.of(FIELD, f"tensor {missing[0]} is missing ({len(missing)} in all)")
    for name, shape in found.items():
        expected = wanted.shapes.get(name)
        if expected is None and name != OUTPUT_LAYER:
            raise InvalidArgumentError.of(FIELD, f"the model has no tensor {name}")
        if expected is not None and shape != expected:
            raise InvalidArgumentError.of(
                FIELD, f"tensor {name} has shape {list(shape)}, the model wants {list(expected)}"
            )
