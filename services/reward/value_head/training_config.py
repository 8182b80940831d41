"""Settings of the training of a value head."""

from __future__ import annotations

from pydantic import Field

from services.kit.config import Model
from services.reward.value_head.data import Loss


class TrainingConfig(Model):
    """What `perigee reward train` is told."""

    data: str
    """JSON Lines: question, reference, response, label; or question, reference, chosen, rejected."""
    backbone: str
    """Folder of the Hugging Face model to start from."""
    out: str
    """Folder to write to: the best model so far is `model` in it."""
    eval_data: str | None = None
    """Examples to evaluate on; a share of the questions of `data` unless set."""
    eval_share: float = Field(0.05, gt=0, lt=1)
    """Share of the questions that is held out."""
    loss: Loss = "both"
    """pointwise: right or wrong, one by one; pairwise: right before wrong, in pairs; both: their sum."""
    pairwise_weight: float = Field(1.0, gt=0)
    """Weight of the pairwise loss in `both`."""
    epochs: int = Field(1, ge=1)
    """Passes over the examples."""
    batch_size: int = Field(64, ge=1)
    """Responses, or pairs, of one step."""
    max_tokens: int = Field(2048, ge=8)
    """Longest input; longer responses lose their beginning."""
    max_microbatch_tokens: int = Field(16_384, ge=1)
    """Tokens of one forward pass, padding included; a step accumulates gradients over as many as it takes."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak rate of AdamW; it falls to 0 in a straight line."""
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises."""
    weight_decay: float = Field(0.01, ge=0)
    """Decay of matrices; vectors have none."""
    max_gradient_norm: float = Field(1.0, gt=0)
    """Longer gradients are cut to this norm."""
    eval_every_steps: int | None = Field(None, ge=1)
    """Steps between evaluations; an epoch unless set."""
    patience: int = Field(3, ge=1)
    """Evaluations without a better one after which training stops."""
    checkpoint_every_steps: int = Field(500, ge=1)
    """Steps between checkpoints; there is one at each evaluation, too."""
    seed: int = Field(0, ge=0)
    """Seed of split, pairs, order, head and dropout."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")
    """cpu, cuda or cuda:1; a GPU computes in bfloat16 with float32 weights, a CPU in float32."""
    threads: int | None = Field(None, ge=1)
    """Threads on a CPU; torch's choice unless set."""
    gradient_checkpointing: bool = False
    """Compute activations twice to save memory."""
    resume: bool = False
    """Go on from the last checkpoint in `out`."""
