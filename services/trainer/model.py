"""Builds the policy as a Megatron GPTModel, split by tensor and pipeline, inside Megatron's data-parallel wrapper."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from perigee.errors import InvalidArgumentError
from services.trainer.attention import PackedAttention, PackedRotary
from services.trainer.hf_config import ModelShape
from services.trainer.parallel import Layout


def build_model(
    shape: ModelShape, layout: Layout, dtype: torch.dtype, max_sequence_length: int, recompute: bool
) -> DistributedDataParallel:
    """This process's part of the model, with weights not loaded yet.

    Gradients are plain sums over micro-batches and data-parallel ranks: the losses carry their own normalization.
    Raises InvalidArgumentError when the parallel sizes do not divide the model.
    """
    check_divisible(shape, layout)
    config = TransformerConfig(
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
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=True,
        # Without this the schedules divide each loss by the number of micro-batches and ranks.
        calculate_per_token_loss=True,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_norm)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    core = GPTModel(
        config,
        spec,
        vocab_size=shape.vocabulary,
        max_sequence_length=max_sequence_length,
        pre_process=layout.pipeline_rank == 0,
        post_process=layout.is_last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
    )
    core.rotary_pos_emb = PackedRotary(shape.inverse_frequencies_D)
    core.to(layout.device)
    module = Float16Module(config, core) if dtype is torch.bfloat16 else core
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=layout.data > 1)
    model = DistributedDataParallel(config, ddp_config, module)
    config.finalize_model_grads_func = _finalize_unscaled
    return model


def core_of(model: DistributedDataParallel) -> GPTModel:
    """The GPTModel inside the wrappers."""
    module = model.module
    return module.module if isinstance(module, Float16Module) else module


def check_divisible(shape: ModelShape, layout: Layout) -> None:
    """Raises InvalidArgumentError naming the parallel size that does not divide the model."""
    for name, size in {
        "attention heads": shape.heads,
        "key-value heads": shape.query_groups,
        "vocabulary": shape.vocabulary,
    }.items():
        if size % layout.tensor:
            raise InvalidArgumentError(
                f"trainer.tensor_parallel {layout.tensor} does not divide the model's {name} ({size})"
            )
    if shape.layers % layout.pipeline:
        raise InvalidArgumentError(
            f"trainer.pipeline_parallel {layout.pipeline} does not divide the model's {shape.layers} layers"
        )


def _finalize_unscaled(model: Any, _num_tokens: Any = None, **kwargs: Any) -> None:
    finalize_model_grads(model, None, **kwargs)
