"""The policy on one rank: a Megatron model and its optimizer, their steps, and weights by Hugging Face's names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from perigee.errors import InternalError, InvalidArgumentError
from perigee.trainer.v1 import trainer_pb2 as pb
from perigee.weights.v1.weights_pb2 import Fingerprint
from services.trainer.architecture import check_divisible
from services.trainer.hf import ModelShape, TensorReader
from services.trainer.megatron.attention import PackedAttention, PackedRotary, SharedRMSNorm
from services.trainer.megatron.context import gather_tokens
from services.trainer.megatron.experts import RoutedTokens, control_routers, reduce_apart
from services.trainer.megatron.head import Head, HiddenOutput
from services.trainer.megatron.memory import OffloadedTensors, SavedTensors, count_copies
from services.trainer.megatron.optimizer import build_optimizer, reset_optimizer, set_learning_rate
from services.trainer.megatron.parallel import ParallelDims
from services.trainer.megatron.shelf import Shelf
from services.trainer.megatron.vision import VisionGPT, build_tower, measure_tower
from services.trainer.packing import MicroBatch, TokenSequence, make_micro_batches, take_share
from services.weights.pieces import TensorSlice

# Sequences of the forward and backward pass that measures what a token takes: two that attention pads and one apart.
_PROBE = (14, 10, 8)
# The prompt of the fingerprint takes tokens from all over the vocabulary; few, so that short contexts hold it.
FINGERPRINT_TOKENS = 24
FINGERPRINT_STRIDE = 7919


@dataclass(frozen=True)
class Evaluated:
    """Log-probability of each of a micro-batch's T targets, and entropy of the distribution it was drawn from.

    Both are 0 where the target is not trained; entropies have no gradient.
    """

    batch: MicroBatch
    logprobs_T: torch.Tensor
    entropies_T: torch.Tensor


# The loss of a micro-batch, and what is to be reported of it.
LossFunction = Callable[[Evaluated], tuple[torch.Tensor, Any]]


class Policy:
    """Part of the model on this rank. Its methods are collectives: every rank calls them alike."""

    def __init__(
        self,
        shape: ModelShape,
        dims: ParallelDims,
        dtype: torch.dtype,
        max_sequence_length: int,
        recompute_layers: int = 0,
        router_aux_loss_coef: float = 0.0,
        vision: str = "trained",
        offload_activations: bool = False,
    ) -> None:
        self.shape = shape
        self.dims = dims
        self.model = build_model(shape, dims, dtype, max_sequence_length, recompute_layers, vision)
        self.core = core_of(self.model)
        self.set_rope(shape)
        self.optimizer = build_optimizer(self.model, bf16=dtype is torch.bfloat16)
        self._run_schedule = get_forward_backward_func()
        self._router_aux_loss_coef = router_aux_loss_coef
        self._recompute_layers = recompute_layers
        self._offload_activations = offload_activations
        self._context = parallel_state.get_context_parallel_group() if dims.context > 1 else None
        # The ranks that share the tokens of a micro-batch outside of attention.
        self._token_group = parallel_state.get_tensor_and_context_parallel_group()
        self._routers = control_routers(self.core, self._token_group) if shape.experts else []

    def set_rope(self, shape: ModelShape) -> None:
        """Takes the rotary embedding of a shape, which is else the policy's own."""
        self.core.rotary_pos_emb.inverse_frequencies_D = shape.inverse_frequencies_D
        # Megatron multiplies queries and keys by (0.1 m ln s + 1) / (0.1 n ln s + 1): with ln s = 10 by 1 + m.
        config = self.core.config
        config.yarn_rotary_scaling_factor, config.yarn_mscale_all_dim = math.exp(10), 0.0
        config.yarn_mscale = shape.attention_factor - 1

    def load(self, folder: Path) -> None:
        """Loads the weights of a Hugging Face folder."""
        load_weights(self.core, self.shape, self.dims, TensorReader(folder).read)
        self.optimizer.reload_model_params()

    def collect(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the whole policy as Hugging Face tensors; see `collect_weights`."""
        return collect_weights(self.core, self.shape, self.dims)

    def slices(self) -> Iterator[TensorSlice]:
        """Yields what this rank owns of the policy; see `own_slices`."""
        return own_slices(self.core, self.shape, self.dims)

    def take_snapshot(self) -> list[torch.Tensor]:
        """Copies this rank's trained weights, to go back to when a job fails."""
        return [parameter.detach().clone() for parameter in trained_parameters(self.core)]

    @torch.no_grad()
    def restore_snapshot(self, snapshot: Sequence[torch.Tensor]) -> None:
        """Puts the weights of a snapshot back."""
        for parameter, saved in zip(trained_parameters(self.core), snapshot, strict=True):
            parameter.copy_(saved)
        self.optimizer.reload_model_params()

    def begin_job(self, settings: pb.Optimizer) -> None:
        """Starts a job with a fresh optimizer."""
        reset_optimizer(self.optimizer, settings)

    def evaluate(self, batches: Sequence[MicroBatch], temperature: float) -> list[Evaluated]:
        """Evaluates the targets of each micro-batch, on ranks of the last pipeline stage; empty on others."""

        with torch.no_grad():
            return self._run(
                batches, temperature, lambda found: (found.logprobs_T.sum(), found), forward_only=True, entropies=True
            )

    def fingerprint(self) -> Fingerprint | None:
        """Returns the log-probabilities of a fixed prompt at temperature 1; None on ranks without the head."""
        tokens = np.arange(FINGERPRINT_TOKENS, dtype=np.int64) * FINGERPRINT_STRIDE % self.shape.vocabulary
        if self.shape.tower is not None:
            tokens[tokens == self.shape.tower.image_token_id] = 0
        prompt = TokenSequence(tokens, np.ones(len(tokens) - 1, np.bool_))
        found = self.evaluate(make_micro_batches([[prompt]], self.dims.device), 1.0)
        return Fingerprint(token_ids=tokens.tolist(), logprobs=found[0].logprobs_T.tolist()) if found else None

    def step(
        self,
        batches: Sequence[MicroBatch],
        temperature: float,
        loss: LossFunction,
        learning_rate: float,
        *,
        entropies: bool = False,
    ) -> tuple[float, list[Any]]:
        """Takes one optimizer step on the summed losses of all micro-batches of all ranks.

        The loss finds entropies of 0 unless asked for. Returns the gradient norm before clipping, and the reports of
        this rank's micro-batches (last stage only). Raises InternalError, on every rank, when the norm is not finite.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        balance = self._scale_router_loss(batches)
        with OffloadedTensors(self.core.parameters()) if self._offload_activations else nullcontext():
            reports = self._run(batches, temperature, loss, entropies=entropies, balance=balance)
        set_learning_rate(self.optimizer, learning_rate)
        _, norm, _ = self.optimizer.step()
        if not math.isfinite(norm):
            raise InternalError(f"the gradient norm is {norm}; the trainer went back to the version that it had before")
        return float(norm), reports

    def _scale_router_loss(self, batches: Sequence[MicroBatch]) -> float:
        """Returns the factor by which a step's load-balancing loss is the mean over its tokens, 0 without one."""
        if not self.shape.experts or not self._router_aux_loss_coef:
            return 0.0
        tokens = torch.tensor(float(sum(len(batch.inputs_T) for batch in batches)), device=self.dims.device)
        dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group())
        return self._router_aux_loss_coef / tokens.item()

    def _route(self, batch: MicroBatch, share: MicroBatch, balance: float) -> RoutedTokens:
        """Returns the tokens of this rank's share of a micro-batch that pass its routers."""
        dims, size = self.dims, len(share.inputs_T) // self.dims.tensor
        start = dims.context_rank * len(share.inputs_T) + dims.tensor_rank * size
        return RoutedTokens(
            experts_TLK=None if share.experts_TLK is None else torch.split(share.experts_TLK, size)[dims.tensor_rank],
            tokens=min(max(len(batch.inputs_T) - start, 0), size),
            balance=balance * self.shape.experts / (self.shape.experts_per_token * len(batch.inputs_T)),
        )

    def take_replay_counts(self) -> tuple[int, int]:
        """Returns expert choices that this stage's layers replayed since the last call, and those that differed."""
        if not self._routers:
            return 0, 0
        counts_2 = torch.tensor([router.take_counts() for router in self._routers], device=self.dims.device).sum(0)
        dist.all_reduce(counts_2, group=self._token_group)
        replayed, differing = counts_2.tolist()
        return replayed, differing

    def measure_activations(self) -> float:
        """Returns the bytes that a micro-batch's forward pass keeps for its backward pass, for each of its tokens.

        As many micro-batches as there are pipeline stages may be in flight. Buffers of a fixed size, such as the
        logits of a chunk, are not in it. With a vision tower each token counts as one of an image of its own.
        """
        probe = [TokenSequence(np.zeros(length + 1, np.int64), np.ones(length, np.bool_)) for length in _PROBE]
        batches = make_micro_batches([probe], self.dims.device)
        saved = SavedTensors(self.core.parameters())
        with saved:
            self._run(batches, 1.0, lambda found: (found.logprobs_T.sum(), None))
        self.model.zero_grad_buffer()
        tower = getattr(self.core, "tower", None)
        kept = saved.peak / sum(_PROBE) + (measure_tower(tower) if tower is not None else 0.0)
        return kept * self.dims.pipeline

    def offload(self, folder: Path) -> Shelf:
        """Moves this rank's weights to a file and drops gradients and moments, until the shelf is closed."""
        return Shelf(self.model, self.optimizer, folder)

    def count_copies(self) -> dict[str, int]:
        """Returns the bytes of each copy of the policy that this rank keeps, by name."""
        return count_copies(self.core.parameters(), self.optimizer)

    def _head(self, temperature: float) -> Head:
        """Returns the head; on ranks of the last pipeline stage."""
        tied = self.shape.tied
        weight_VD = self.core.shared_embedding_or_output_weight() if tied else self.core.output_layer.weight
        group = parallel_state.get_tensor_model_parallel_group() if self.dims.tensor > 1 else None
        return Head(weight_VD, temperature, group)

    def _run(
        self,
        batches: Sequence[MicroBatch],
        temperature: float,
        loss: LossFunction,
        *,
        forward_only: bool = False,
        entropies: bool = False,
        balance: float = 0.0,
    ) -> list[Any]:
        """Runs Megatron's schedule, which adds gradients to those that there are; returns the reports."""

        def forward_step(
            source: Iterator[MicroBatch], model: Any
        ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
            batch = next(source)
            share = take_share(batch, self.dims.context_rank, self.dims.context, self.dims.tensor)
            for router in self._routers:
                router.routed = self._route(batch, share, balance)
            output = model(share.inputs_T[None], None, None, packed_seq_params=share.packed)

            def finish_batch(hidden_1TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
                found = self._head(temperature).evaluate(
                    hidden_1TD[0], share.targets_T, share.trained_T, with_entropies=entropies
                )
                if self._context is not None:
                    # A loss is not always a sum over tokens: every rank makes that of the whole micro-batch.
                    found = gather_tokens(found[0], self._context), gather_tokens(found[1], self._context)
                logprobs_T, entropies_T = (each[: len(batch.inputs_T)] for each in found)
                value, report = loss(Evaluated(batch, logprobs_T, entropies_T))
                return value, torch.zeros((), dtype=torch.int), report

            return output, finish_batch

        for number, router in enumerate(self._routers):
            router.begin(recomputes=number < self._recompute_layers and not forward_only)
        reports: list[Any] = self._run_schedule(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=max(len(batch.inputs_T) for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return reports


def trained_parameters(core: GPTModel) -> Iterator[torch.nn.Parameter]:
    """Yields this stage's parameters without those of a vision tower that is frozen."""
    return (parameter for parameter in core.parameters() if parameter.requires_grad)


def build_model(
    shape: ModelShape,
    dims: ParallelDims,
    dtype: torch.dtype,
    max_sequence_length: int,
    recompute_layers: int,
    vision: str = "trained",
) -> DistributedDataParallel:
    """Builds this process's part of the model, with weights not loaded yet; see TrainerConfig for `vision`.

    Gradients are plain sums over micro-batches and data-parallel ranks: the losses carry their own normalization.
    Raises InvalidArgumentError when the parallel sizes do not divide the model.
    """
    check_divisible(
        heads=shape.heads,
        query_groups=shape.query_groups,
        feed_forward=0 if shape.experts else shape.ffn_hidden,
        vocabulary=shape.vocabulary,
        experts=shape.experts,
        layers=shape.layers,
        tensor=dims.tensor,
        context=dims.context,
        pipeline=dims.pipeline,
        expert=dims.expert,
    )
    config = _make_config(shape, dims, dtype, recompute_layers)
    spec = get_gpt_layer_local_spec(shape.experts or None, normalization="RMSNorm", qk_layernorm=shape.qk_norm)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        setattr(spec.submodules, name, SharedRMSNorm)
    if shape.qk_norm:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = SharedRMSNorm
    kind = GPTModel
    if shape.tower is not None:
        tower = build_tower(shape.tower, vision, recompute_layers > 0) if dims.pipeline_rank == 0 else None
        kind = partial(VisionGPT, tower=tower)
    core = kind(
        config,
        TransformerBlockSubmodules([spec] * (shape.layers // dims.pipeline), SharedRMSNorm),
        vocab_size=shape.vocabulary,
        max_sequence_length=max_sequence_length,
        pre_process=dims.pipeline_rank == 0,
        post_process=dims.is_last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
    )
    if dims.is_last_stage:
        core.output_layer = HiddenOutput(core.output_layer.weight, gathers=dims.tensor > 1)
    core.rotary_pos_emb = PackedRotary(shape.inverse_frequencies_D, shape.axes_D)
    core.to(dims.device)
    reduce_apart(core.named_parameters())
    module = Float16Module(config, core) if dtype is torch.bfloat16 else core
    # Gradients have the type of the weights; those of bfloat16 are summed in float32.
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype is torch.bfloat16, use_distributed_optimizer=dims.context * dims.data > 1
    )
    model = DistributedDataParallel(config, ddp_config, module)
    config.finalize_model_grads_func = _finalize_unscaled
    return model


def _make_config(shape: ModelShape, dims: ParallelDims, dtype: torch.dtype, recompute_layers: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.query_groups,
        kv_channels=shape.head_width,
        ffn_hidden_size=shape.ffn_hidden,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=dims.tensor,
        pipeline_model_parallel_size=dims.pipeline,
        context_parallel_size=dims.context,
        # Outside of attention and feed-forward parts tensor-parallel ranks share the tokens, and their activations.
        sequence_parallel=dims.tensor > 1,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        variable_seq_lengths=dims.pipeline > 1,
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=True,
        # Without this the schedules divide each loss by the number of micro-batches and ranks.
        calculate_per_token_loss=True,
        recompute_granularity="full" if recompute_layers else None,
        recompute_method="block" if recompute_layers else None,
        recompute_num_layers=recompute_layers or None,
        **(_expert_options(shape, dims) if shape.experts else {}),
    )


def _expert_options(shape: ModelShape, dims: ParallelDims) -> dict[str, Any]:
    return {
        "num_moe_experts": shape.experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.ffn_hidden,
        "moe_router_pre_softmax": not shape.norm_topk_prob,
        # Added by the routers' control.
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": dims.expert,
        "expert_tensor_parallel_size": 1,
    }


def core_of(model: DistributedDataParallel) -> GPTModel:
    """Returns the GPTModel inside the wrappers."""
    module = model.module
    return module.module if isinstance(module, Float16Module) else module


def _finalize_unscaled(model: Any, _num_tokens: Any = None, **kwargs: Any) -> None:
    finalize_model_grads(model, None, **kwargs)


class Split(Enum):
    """Cut of a parameter over tensor-parallel ranks."""

    WHOLE = "whole"
    ROWS = "rows"
    COLUMNS = "columns"
    # Query heads, key and value of each group lie together.
    QKV = "qkv"
    # The halves of the gate and of the up projection lie together.
    GATED = "gated"


@dataclass(frozen=True)
class Mapping:
    """A Megatron parameter and the Hugging Face tensors that it is made of."""

    parameter: torch.nn.Parameter
    names: tuple[str, ...]
    split: Split
    expert: int | None = None
    """Number of the expert, whose parameters are whole on one of the expert-parallel ranks."""


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
    "mlp.router.weight": (("mlp.gate.weight",), Split.WHOLE),
}
_EXPERT = {
    "linear_fc1.weight": (("gate_proj.weight", "up_proj.weight"), Split.GATED),
    "linear_fc2.weight": (("down_proj.weight",), Split.WHOLE),
}


def map_parameters(core: GPTModel, shape: ModelShape) -> list[Mapping]:
    """Returns the parameters of this stage; with tied weights a last stage has a second copy of the embedding."""
    mappings, embedding = [], f"{shape.prefix}embed_tokens.weight"
    names: tuple[str, ...]
    for name, parameter in core.named_parameters():
        expert = None
        if name == "embedding.word_embeddings.weight":
            names, split = (embedding,), Split.ROWS
        elif name == "output_layer.weight":
            names, split = (embedding if shape.tied else "lm_head.weight",), Split.ROWS
        elif name == "decoder.final_layernorm.weight":
            names, split = (f"{shape.prefix}norm.weight",), Split.WHOLE
        elif name.startswith("tower."):
            names, split = (core.tower.prefix + name.removeprefix("tower."),), Split.WHOLE
        else:
            match = re.fullmatch(r"decoder\.layers\.(\d+)\.(?:mlp\.experts\.local_experts\.(\d+)\.)?(.+)", name)
            assert match is not None, name
            layer = core.decoder.layers[int(match[1])]
            prefix = f"{shape.prefix}layers.{layer.layer_number - 1}."
            if match[2] is None:
                suffixes, split = _LAYER[match[3]]
            else:
                suffixes, split = _EXPERT[match[3]]
                expert = layer.mlp.local_expert_indices[int(match[2])]
                prefix += f"mlp.experts.{expert}."
            names = tuple(prefix + suffix for suffix in suffixes)
        mappings.append(Mapping(parameter, names, split, expert))
    return mappings


@torch.no_grad()
def load_weights(core: GPTModel, shape: ModelShape, dims: ParallelDims, read: Callable[[str], torch.Tensor]) -> None:
    """Copies this process's parts of the tensors that `read` returns, by Hugging Face name, into its parameters.

    Raises InvalidArgumentError naming the tensor whose shape does not fit the configuration.
    """
    for mapping in map_parameters(core, shape):
        ranks, rank = (dims.tensor, dims.tensor_rank) if mapping.expert is None else (1, 0)
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
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    expert_group = parallel_state.get_expert_model_parallel_group()
    for mapping in map_parameters(core, shape):
        if mapping.expert is None:
            yield from _join(mapping.names, mapping.split, _gather(mapping, tensor_group), shape)
            continue
        for rank, part in enumerate(_gather(mapping, expert_group)):
            expert = mapping.expert + (rank - dims.expert_rank) * shape.experts // dims.expert
            names = [name.replace(f"experts.{mapping.expert}.", f"experts.{expert}.") for name in mapping.names]
            yield from _join(names, mapping.split, [part], shape)


def _gather(mapping: Mapping, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Returns the parameter of each rank of the group, of this rank alone where all have the same."""
    own = mapping.parameter.detach().contiguous()
    if group.size() == 1 or (mapping.split is Split.WHOLE and mapping.expert is None):
        return [own]
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own, group=group)
    return parts


def _join(
    names: Sequence[str], split: Split, parts: Sequence[torch.Tensor], shape: ModelShape
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the Hugging Face tensors, in memory of their own, that the parts of a parameter make up."""
    if split is Split.QKV:
        heads_per_group = shape.heads // shape.query_groups
        widths = [heads_per_group * shape.head_width, shape.head_width, shape.head_width]
        grouped = _group_rows(torch.cat(list(parts)), shape.query_groups)
        for name, tensor in zip(names, torch.split(grouped, widths, dim=1), strict=True):
            yield name, tensor.flatten(0, 1).contiguous()
    elif split is Split.GATED:
        for name, halves in zip(names, zip(*(part.chunk(2) for part in parts), strict=True), strict=True):
            yield name, torch.cat(halves)
    else:
        yield names[0], torch.cat(list(parts), dim=1 if split is Split.COLUMNS else 0)


@torch.no_grad()
def own_slices(core: GPTModel, shape: ModelShape, dims: ParallelDims) -> Iterator[TensorSlice]:
    """Yields this rank's slices of Hugging Face tensors, without collectives; together the ranks have every element.

    The first tensor-parallel rank has what is not split, and the first stage the embedding of tied weights. Copies of
    the model have the same slices and share the pieces out, and so do the copies of an expert.
    """
    heads_per_group = shape.heads // shape.query_groups
    widths = [heads_per_group * shape.head_width, shape.head_width, shape.head_width]
    for mapping in map_parameters(core, shape):
        own, ranks, rank = mapping.parameter.detach(), dims.tensor, dims.tensor_rank
        copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        copies = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        if mapping.expert is not None:
            ranks, rank = 1, 0
            copy = parallel_state.get_expert_data_parallel_rank()
            copies = parallel_state.get_expert_data_parallel_world_size()
        if mapping.split is Split.WHOLE:
            parts = [own] if rank == 0 else []
        elif mapping.split is Split.QKV:
            grouped = _group_rows(own, shape.query_groups // ranks)
            parts = [part.flatten(0, 1) for part in torch.split(grouped, widths, dim=1)]
        elif mapping.split is Split.GATED:
            parts = list(own.chunk(2))
        elif mapping.names == (f"{shape.prefix}embed_tokens.weight",) and dims.pipeline_rank > 0:
            parts = []
        else:
            parts = [own]
        for name, part in zip(mapping.names, parts, strict=False):
            whole, lower = list(part.shape), [0] * part.ndim
            if mapping.split is not Split.WHOLE:
                axis = 1 if mapping.split is Split.COLUMNS else 0
                whole[axis], lower[axis] = ranks * part.shape[axis], rank * part.shape[axis]
            yield TensorSlice(name, tuple(whole), tuple(lower), part, copy, copies)


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
