"""AdamW as Megatron's optimizer: how it is built, reset for each job, and scheduled within one."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from perigee.trainer.v1 import trainer_pb2 as pb

_ADAM_EPSILON = 1e-8


def scheduled_rate(settings: pb.Optimizer, step: int, steps: int) -> float:
    """Returns the learning rate of `step` (from 0) of `steps`: linear warm-up to the peak, then linear decay."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.learning_rate * (1 - (1 - settings.min_lr_ratio) * progress)


def build_optimizer(model: DistributedDataParallel, bf16: bool) -> MegatronOptimizer:
    """Builds the optimizer of a model, without settings: those come with each job."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        weight_decay=1.0,
        adam_eps=_ADAM_EPSILON,
        clip_grad=math.inf,
        bf16=bf16,
        use_distributed_optimizer=model.ddp_config.use_distributed_optimizer,
    )
    return get_megatron_optimizer(config, [model])


def reset_optimizer(optimizer: MegatronOptimizer, settings: pb.Optimizer) -> None:
    """Clears all moments and sets what a new job asks for (k1.5 section 2.3.2: a fresh optimizer each iteration)."""
    for part in list_parts(optimizer):
        part.optimizer.state.clear()
        # With an infinite bound Megatron scales nothing, but computes the norm that is reported.
        vars(part.config).update(clip_grad=settings.max_grad_norm or math.inf)
        for group in part.optimizer.param_groups:
            group["betas"] = (settings.beta1, settings.beta2)
            # Biases and norms come with wd_mult 0.
            group["weight_decay"] = settings.weight_decay * group.get("wd_mult", 1.0)


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Sets the learning rate of the next step."""
    for part in list_parts(optimizer):
        for group in part.optimizer.param_groups:
            group["lr"] = rate


def list_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Returns the optimizers that Megatron chained together, or the only one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
