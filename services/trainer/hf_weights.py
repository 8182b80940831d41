"""Moves weights between Hugging Face names and Megatron's parameters, bit for bit, for any parallel split."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from perigee.errors import InvalidArgumentError
from services.trainer.hf_config import ModelShape
from services.trainer.megatron.parallel import ParallelDims


class Split(Enum):
    """How a parameter is cut over tensor-parallel ranks."""

    WHOLE = "whole"
    ROWS = "rows"
    COLUMNS = "columns"
    # Query heads, key and value of each group lie together.
    QKV = "qkv"
    # The halves of the gate and of the up projection lie together.
    GATED = "gated"


@dataclass(frozen=True)
class Mapping:
    """One Megatron parameter and the Hugging Face tensors that it holds."""

    parameter: torch.nn.Parameter
    names: tuple[str, ...]
    split: Split


_LAYER = {
    "input_layernorm.weight": (("input_layernorm.weight",), Split.WHOLE),
    "pre_mlp_layernorm.weight": (("post_attention_layernorm.weight",), Split.WHOLE),
    "self_attention.q_layernorm.weight": (("self_attn.q_norm.weight",), Split.WHOLE),
    "self_attention.k_layernorm.weight": (("self_attn.k_norm.weight",), Split.WHOLE),
    "self_attention.linear_qkv.weight": (tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), Split.QKV),
    "self_attention.linear_qkv.bias": (tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), Split.QKV),
    "self_attention.linear_proj.weight": (("self_attn.o_proj.weight",), Split.COLUMNS),
    "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), Split.GATED),
    "mlp.linear_fc2.weight": (("mlp.down_proj.weight",), Split.COLUMNS),
}


def map_parameters(core: GPTModel, tied: bool) -> list[Mapping]:
    """The parameters of this pipeline stage; with tied weights a last stage holds a second copy of the embedding."""
    mappings = []
    names: tuple[str, ...]
    for name, parameter in core.named_parameters():
        if name == "embedding.word_embeddings.weight":
            names, split = ("model.embed_tokens.weight",), Split.ROWS
        elif name == "output_layer.weight":
            names, split = ("model.embed_tokens.weight" if tied else "lm_head.weight",), Split.ROWS
        elif name == "decoder.final_layernorm.weight":
            names, split = ("model.norm.weight",), Split.WHOLE
        else:
            match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
            assert match is not None, name
            layer = core.decoder.layers[int(match[1])].layer_number - 1
            suffixes, split = _LAYER[match[2]]
            names = tuple(f"model.layers.{layer}.{suffix}" for suffix in suffixes)
        mappings.append(Mapping(parameter, names, split))
    return mappings


@torch.no_grad()
def load_weights(core: GPTModel, shape: ModelShape, dims: ParallelDims, read: Callable[[str], torch.Tensor]) -> None:
    """Fills this process's parameters with its parts of the tensors that `read` returns by Hugging Face name.

    Raises InvalidArgumentError naming the tensor whose shape does not fit the configuration.
    """
    ranks, rank = dims.tensor, dims.tensor_rank
    for mapping in map_parameters(core, shape.tied):
        tensors = [read(name) for name in mapping.names]
        if mapping.split is Split.QKV:
            grouped = [_group_rows(tensor, shape.query_groups) for tensor in tensors]
            part = torch.cat(grouped, dim=1).flatten(0, 1).chunk(ranks)[rank]
        elif mapping.split is Split.GATED:
            part = torch.cat([tensor.chunk(ranks)[rank] for tensor in tensors])
        elif mapping.split is Split.COLUMNS:
            part = tensors[0].chunk(ranks, dim=1)[rank]
        elif mapping.split is Split.ROWS:
            part = tensors[0].chunk(ranks)[rank]
        else:
            part = tensors[0]
        if part.shape != mapping.parameter.shape:
            raise InvalidArgumentError(
                f"tensor {mapping.names[0]} of shape {list(tensors[0].shape)} does not fit the model's config.json"
            )
        mapping.parameter.copy_(part)


@torch.no_grad()
def collect_weights(core: GPTModel, shape: ModelShape, dims: ParallelDims) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the whole policy as Hugging Face tensors, on every rank, in one order.

    Every rank has to run the iterator to its end: each tensor is gathered by collectives.
    """
    yielded: set[str] = set()
    for stage in range(dims.pipeline):
        own = _stage_tensors(core, shape, dims) if stage == dims.pipeline_rank else iter(())
        if dims.pipeline == 1:
            yield from own
            continue
        for name, tensor in _share_stage(own, stage, dims):
            # The embedding of tied weights comes from the first stage and again from the last.
            if name not in yielded:
                yielded.add(name)
                yield name, tensor


def _stage_tensors(core: GPTModel, shape: ModelShape, dims: ParallelDims) -> Iterator[tuple[str, torch.Tensor]]:
    group = parallel_state.get_tensor_model_parallel_group()
    heads_per_group = shape.heads // shape.query_groups
    widths = [heads_per_group * shape.head_width, shape.head_width, shape.head_width]
    for mapping in map_parameters(core, shape.tied):
        own = mapping.parameter.detach().contiguous()
        if mapping.split is Split.WHOLE:
            yield mapping.names[0], own.clone()
            continue
        parts = [own]
        if dims.tensor > 1:
            parts = [torch.empty_like(own) for _ in range(dims.tensor)]
            dist.all_gather(parts, own, group=group)
        if mapping.split is Split.QKV:
            grouped = _group_rows(torch.cat(parts), shape.query_groups)
            for name, tensor in zip(mapping.names, torch.split(grouped, widths, dim=1), strict=True):
                yield name, tensor.flatten(0, 1).contiguous()
        elif mapping.split is Split.GATED:
            for name, halves in zip(mapping.names, zip(*(part.chunk(2) for part in parts), strict=True), strict=True):
                yield name, torch.cat(halves)
        else:
            yield mapping.names[0], torch.cat(parts, dim=1 if mapping.split is Split.COLUMNS else 0)


def _share_stage(
    own: Iterator[tuple[str, torch.Tensor]], stage: int, dims: ParallelDims
) -> Iterator[tuple[str, torch.Tensor]]:
    group = parallel_state.get_pipeline_model_parallel_group()
    source = dist.get_global_rank(group, stage)
    while True:
        item = next(own, None)
        header: list[Any] = [None if item is None else (item[0], tuple(item[1].shape), item[1].dtype)]
        dist.broadcast_object_list(header, src=source, group=group)
        if stage != dims.pipeline_rank:
            if header[0] is None:
                return
            name, size, dtype = header[0]
            item = name, torch.empty(size, dtype=dtype, device=dims.device)
        if item is None:
            return
        dist.broadcast(item[1], src=source, group=group)
        yield item


def _group_rows(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    return tensor.reshape(groups, -1, *tensor.shape[1:])
