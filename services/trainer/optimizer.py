"""AdamW by way of Megatron's optimizer, its reset between jobs, and the learning-rate schedule within one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from perigee.errors import InvalidArgumentError

_ADAM_EPSILON = 1e-8


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The optimizer's settings in one job. `max_grad_norm` 0 is off; `min_lr_ratio` is the end of the linear decay."""

    learning_rate: float
    beta1: float
    beta2: float
    weight_decay: float
    max_grad_norm: float
    warmup_steps: int
    min_lr_ratio: float

    def validate(self) -> None:
        """Raises InvalidArgumentError naming the first field out of range."""
        for field in ("learning_rate", "beta1", "beta2", "weight_decay", "max_grad_norm", "min_lr_ratio"):
            value = getattr(self, field)
            if not math.isfinite(value) or value < 0:
                raise InvalidArgumentError.of(f"optimizer.{field}", f"{value} is not a number of at least 0")
        for field in ("beta1", "beta2"):
            if getattr(self, field) >= 1:
                raise InvalidArgumentError.of(f"optimizer.{field}", f"{getattr(self, field)} is not below 1")
        if self.learning_rate == 0:
            raise InvalidArgumentError.of("optimizer.learning_rate", "0 would train nothing")


def scheduled_rate(settings: AdamW, step: int, steps: int) -> float:
    """The rate of `step` (from 0) of `steps`: linear warm-up to the peak, then linear decay towards its final share."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.learning_rate * (1 - (1 - settings.min_lr_ratio) * progress)


def build_optimizer(model: DistributedDataParallel, bf16: bool) -> MegatronOptimizer:
    """Megatron's optimizer over the model; its settings come with each job."""
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


def reset_optimizer(optimizer: MegatronOptimizer, settings: AdamW) -> None:
    """Forgets all moments and takes the settings of a new job (k1.5 section 2.3.2: reset at each iteration)."""
    for part in _parts(optimizer):
        part.optimizer.state.clear()
        # An infinite bound never scales, but has Megatron compute the norm that is reported.
        part.config.clip_grad = settings.max_grad_norm or math.inf
        for group in part.optimizer.param_groups:
            group["betas"] = (settings.beta1, settings.beta2)
            # Biases and norms come with wd_mult 0.
            group["weight_decay"] = settings.weight_decay * group.get("wd_mult", 1.0)


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Sets the learning rate of the next step."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            group["lr"] = rate


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
