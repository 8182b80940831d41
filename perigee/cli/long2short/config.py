"""The section `long2short` of a recipe: the models, and how each method shortens the long one's responses."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from perigee.config import Model
from perigee.report.choice import MAX_LOSS

Method = Literal["merge", "rejection", "dpo", "rl"]


class MergeConfig(Model):
    """The average of the two models' weights."""

    method: Literal["linear", "slerp", "ties", "task_arithmetic"] = "linear"
    """As `perigee merge` has it."""
    short_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the short model; the long one has the rest."""
    base: str | None = None
    """Model that both were trained from, which ties and task_arithmetic need."""


class SamplesConfig(Model):
    """Responses of the long model, of which rejection sampling and DPO make their sets."""

    per_prompt: int = Field(8, ge=2)
    """Responses to each prompt; the report has 8."""
    prompts: str | None = None
    """Prompt file; `run.prompts` when that is one."""
    limit: int | None = Field(None, ge=1)
    """First prompts only; all when unset."""
    reject_wrong: bool = True
    """DPO rejects wrong responses that are longer than the shortest correct one."""
    reject_longer: float | None = Field(1.5, gt=1)
    """DPO rejects correct responses of at least this many times its length; null for none."""


class SecondPhaseConfig(Model):
    """Second phase of reinforcement learning."""

    max_accuracy_loss: float = Field(MAX_LOSS, ge=0, lt=1)
    """Where `long` is a run that kept its checkpoints, the phase starts from the one with the shortest responses whose
    accuracy is below the best by no more than this; from the long model otherwise."""
    run: dict[str, Any] = {}
    """Keys of `run` that differ in this phase besides what `perigee choose --recipe` changes: the length reward is on
    (0.5, unless `run` has a weight), `rollout.max_response_tokens` is halved, `sft` and `curriculum` are left out."""


class ComparisonConfig(Model):
    """Evaluation of every model on the same problems, and what counts as shortened."""

    problems: str | None = None
    """Prompt file, or a suite of `perigee eval`; `run.heldout` when that is one."""
    limit: int | None = Field(None, ge=2)
    """First problems only; all when unset."""
    samples: int = Field(4, ge=1)
    """Responses to each problem at temperature 1, beside a greedy one."""
    max_tokens: int | None = Field(None, ge=1)
    """Response tokens at most, the same for all; `run.rollout.max_response_tokens` when unset."""
    min_shortening: float = Field(0.25, ge=0, lt=1)
    """Fraction of the long model's mean response length that a method is to save."""
    max_accuracy_loss: float = Field(0.05, ge=0, le=1)
    """Sampled accuracy that it may lose."""


class Long2ShortConfig(Model):
    """The four ways of section 2.4 of the report from a long model to short responses (`perigee long2short`)."""

    long: str | None = None
    """The long model: a folder, a URL or a finished run."""
    short: str | None = None
    """A model of the same shape with short responses, which `merge` needs: a folder, a URL or a finished run."""
    methods: tuple[Method, ...] = ("merge", "rejection", "dpo", "rl")
    """Methods to compare."""
    merge: MergeConfig = MergeConfig()
    """The average of the two models' weights."""
    samples: SamplesConfig = SamplesConfig()
    """Responses of the long model, of which rejection sampling and DPO make their sets."""
    rejection: dict[str, Any] = {"steps": 100}
    """Supervised stage on the shortest correct responses: keys of `run.sft[]` but `dataset`."""
    dpo: dict[str, Any] = {"algorithm": {"name": "dpo"}, "steps": 100}
    """Supervised stage on the pairs: keys of `run.sft[]` but `dataset`."""
    rl: SecondPhaseConfig = SecondPhaseConfig()
    """Second phase of reinforcement learning."""
    comparison: ComparisonConfig = ComparisonConfig()
    """Evaluation of every model on the same problems."""
