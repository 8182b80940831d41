"""Configuration of a run: the `run` section of a recipe."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from pydantic import BaseModel, ConfigDict, Field, model_validator

from perigee.config import Model, validate
from perigee.errors import InvalidArgumentError
from perigee.rollout.v1 import rollout_pb2
from perigee.trainer.v1 import trainer_pb2

MessageT = TypeVar("MessageT", bound=Message)


class OptimizerConfig(Model):
    """AdamW and its learning rate within one job; every job starts with a fresh optimizer."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"clip_grad": "max_grad_norm", "final_share": "min_lr_ratio"}

    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient norm above which gradients are scaled down; 0 is off."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    min_lr_ratio: float = Field(1.0, ge=0, le=1)
    """The learning rate falls linearly to this fraction of its peak over the job."""

    @model_validator(mode="before")
    @classmethod
    def _accept_betas(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("betas"), list | tuple):
            return values
        warnings.warn(
            "the key betas is beta1 and beta2 now; it goes with the next release", FutureWarning, stacklevel=2
        )
        rest = {key: value for key, value in values.items() if key != "betas"}
        return dict(zip(("beta1", "beta2"), values["betas"], strict=True)) | rest


class SftStage(Model):
    """Supervised stage before the reinforcement learning."""

    dataset: str = Field(serialization_alias="dataset_path")
    """JSON Lines of {"prompt", "response"}: a path, which the trainer is sent, or a URL, which it reads."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(32, ge=1)
    """Examples per step."""
    max_tokens_per_microbatch: int = Field(4096, ge=1)
    """Tokens per packed sequence."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The stage's optimizer."""


class RepetitionStopConfig(Model):
    """Early end of responses whose tail repeats itself."""

    max_period: int = Field(16, ge=1)
    """Longest repeated pattern, in tokens."""
    min_repeats: int = Field(0, ge=0)
    """Repeats of the pattern that end the response; 0 is off."""

    def message(self) -> rollout_pb2.RepetitionStop:
        """Returns the settings for the rollout workers."""
        return to_message(self, rollout_pb2.RepetitionStop())


class RolloutSettings(Model):
    """Sampling of trajectories."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"response_cap": "max_response_tokens"}

    token_budget: int = Field(0, ge=0)
    """Output tokens that a trajectory may add in one iteration; 0 is no budget."""
    max_response_tokens: int = Field(200, ge=1)
    """Response tokens that a trajectory may have over all iterations."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    repetition_stop: RepetitionStopConfig = RepetitionStopConfig()
    """Early end of responses that repeat themselves."""


class CurriculumConfig(Model):
    """Difficulties that an iteration may draw prompts of (k1.5 section 2.3.4)."""

    kind: Literal["all", "ramp", "hard_after_warmup"] = "all"
    """all: every prompt. ramp: up to a difficulty that rises. hard_after_warmup: every prompt first, then hard ones."""
    start_difficulty: float = 0.0
    """ramp: highest difficulty at the first iteration."""
    end_difficulty: float = 0.0
    """ramp: highest difficulty from `iterations` on. hard_after_warmup: lowest difficulty after `iterations`."""
    iterations: int = Field(1, ge=1)
    """Iterations of the ramp, or of drawing every prompt."""


class PrioritizedConfig(Model):
    """Probabilities of prompts in proportion to 1 - success rate (k1.5 section 2.3.4)."""

    enabled: bool = False
    """Use them; otherwise the prompts drawn least come first."""
    floor: float = Field(0.05, gt=0, le=1)
    """Smallest weight, so that a solved prompt can be drawn again."""


class LengthRewardConfig(Model):
    """The length reward (k1.5 section 2.3.3)."""

    weight: float = Field(0.0, ge=0)
    """Weight in the reward at full strength; 0 is off."""
    start_iteration: int = Field(1, ge=1)
    """First iteration with a length reward."""
    warmup_iterations: int = Field(1, ge=1)
    """Iterations over which the weight rises to its full strength."""


class OverlongPenaltyConfig(Model):
    """Penalty for responses near a length, which makes a long-CoT model's responses shorter (k1.5 section 2.4)."""

    weight: float = Field(0.0, ge=0)
    """Reward that a response at the cap loses; 0 is off."""
    cap: int | None = Field(None, ge=1)
    """Response tokens with the whole penalty; the rollout's max_response_tokens when unset."""
    buffer: int = Field(64, ge=1)
    """Tokens below the cap over which the penalty grows from 0; less than the cap."""


class AlgorithmConfig(Model):
    """Algorithm that trains the policy. All keys but `name` are its own settings, which the trainer checks."""

    model_config = ConfigDict(extra="allow")

    name: str = Field("policy_mirror_descent", min_length=1)
    """An algorithm of the trainer."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that the recipe gives; the trainer has defaults for the others."""
        return dict(self.model_extra or {})


class UpdateConfig(Model):
    """Update of the policy, whatever the algorithm."""

    minibatches: int = Field(2, ge=1)
    """Optimizer steps per iteration."""
    max_tokens_per_microbatch: int = Field(4096, ge=1)
    """Tokens per forward and backward pass."""
    max_staleness: int = Field(0, ge=0)
    """Tokens of versions older than the iteration's by more than this are left out of the loss."""
    token_scale: float = Field(1.0, gt=0)
    """Log-probability sums are divided by this before the loss."""
    tis_cap: float = Field(0.0, ge=0)
    """Cap of truncated importance sampling against the engine's log-probabilities; 0 is off."""


class EvaluationConfig(Model):
    """Accuracy on held-out problems."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"response_cap": "max_response_tokens"}

    every: int = Field(0, ge=0)
    """Iterations between periodic evaluations; 0 is none. The first and the last model are always evaluated."""
    samples: int = Field(2, ge=1)
    """Responses per problem at temperature 1."""
    problems: int | None = Field(None, ge=1)
    """Problems of a periodic evaluation; all when unset. The first and the last evaluation use all problems."""
    greedy: bool = True
    """Evaluate greedy decoding, too, in periodic evaluations."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Response tokens at most; the rollout's max_response_tokens when unset."""


class RunConfig(Model):
    """Configuration of a run."""

    renamed_keys: ClassVar[Mapping[str, str]] = {
        "warmup": "sft",
        "groups.live": "max_live_groups",
        "groups.size": "group_size",
        **{f"algorithm.{key}": f"update.{key}" for key in UpdateConfig.model_fields},
        "algorithm.importance_cap": "update.tis_cap",
        "algorithm.optimizer": "optimizer",
        "algorithm.final_learning_rate_share": "final_lr_ratio",
    }

    seed: int = Field(0, ge=0)
    """Seed of prompt sampling and of the order of supervised examples."""
    model: str | None = None
    """Hugging Face folder of the base model, a path or a URL, for its tokenizer and context length; the trainer is
    asked for them when it is unset or not on the coordinator's machine."""
    prompts: str
    """JSON Lines of training prompts: a path or a URL."""
    heldout: str
    """JSON Lines of held-out problems: a path or a URL."""
    iterations: int = Field(ge=0)
    """Iterations of reinforcement learning."""
    time_limit_s: float | None = Field(None, gt=0)
    """The run ends after the iteration in which its age, supervised stages and evaluations included, passes this."""
    sft: tuple[SftStage, ...] = ()
    """Supervised stages before the first iteration."""
    max_live_groups: int = Field(160, ge=1)
    """Groups generated at once; those that were trained on are replaced by new ones."""
    group_size: int = Field(8, ge=2)
    """Trajectories per group."""
    rollout: RolloutSettings = RolloutSettings()
    """Sampling of trajectories."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Difficulties that an iteration may draw prompts of."""
    prioritized: PrioritizedConfig = PrioritizedConfig()
    """Probabilities of prompts by their success rate."""
    length_reward: LengthRewardConfig = LengthRewardConfig()
    """Reward for short correct responses."""
    repetition_penalty: float = Field(0.0, ge=0)
    """Reward that a response loses which was cut for repeating itself."""
    overlong_penalty: OverlongPenaltyConfig = OverlongPenaltyConfig()
    """Reward that a response loses near a length."""
    drop_uniform_groups: bool = True
    """Leave out groups whose members have equal rewards: their advantage is zero."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Algorithm that trains the policy."""
    update: UpdateConfig = UpdateConfig()
    """Update of the policy, whatever the algorithm."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4)
    """Optimizer of each iteration; its learning rate is that of the first iteration."""
    final_lr_ratio: float = Field(1.0, gt=0, le=1)
    """The learning rate falls linearly over the run's iterations to this fraction of the first iteration's."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Accuracy on held-out problems."""

    @model_validator(mode="after")
    def _leave_room_below_the_cap(self) -> Self:
        penalty, cap = self.overlong_penalty, self.overlong_cap
        if penalty.weight and penalty.buffer >= cap:
            raise ValueError(f"overlong_penalty.buffer must be less than the cap of {cap} tokens, is {penalty.buffer}")
        if penalty.weight and cap > self.rollout.max_response_tokens:
            raise ValueError(
                f"overlong_penalty.cap of {cap} tokens is never reached: rollout.max_response_tokens is "
                f"{self.rollout.max_response_tokens}"
            )
        return self

    def algorithm_message(self) -> trainer_pb2.Algorithm:
        """Returns the algorithm with its settings."""
        return ParseDict({"name": self.algorithm.name, "settings": self.algorithm.settings}, trainer_pb2.Algorithm())

    def update_message(self) -> trainer_pb2.UpdateSettings:
        """Returns the settings of the update, for the temperature of the rollout."""
        return to_message(self.update, trainer_pb2.UpdateSettings(), temperature=self.rollout.temperature)

    def optimizer_message(self, learning_rate: float) -> trainer_pb2.Optimizer:
        """Returns the optimizer's settings at a learning rate."""
        return to_message(self.optimizer, trainer_pb2.Optimizer(), learning_rate=learning_rate)

    @property
    def overlong_cap(self) -> int:
        """Response tokens with the whole overlong penalty."""
        return self.overlong_penalty.cap or self.rollout.max_response_tokens


# These may change when a run is resumed.
_NOT_IN_DIGEST = {"iterations", "time_limit_s", "evaluation"}


def to_message(config: BaseModel, message: MessageT, **changes: Any) -> MessageT:
    """Fills a message that has the fields of `config`; `changes` are further fields, or other values of the same."""
    return ParseDict(config.model_dump(mode="json", by_alias=True) | changes, message)


def parse_run_config(text: str) -> RunConfig:
    """Reads the `run` section from its YAML text.

    Raises InvalidArgumentError naming the field, or saying that the text is no YAML mapping.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidArgumentError.for_field("config_yaml", f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InvalidArgumentError.for_field("config_yaml", "must be a mapping: the run section of a recipe")
    return validate(RunConfig, values, "recipe", "run")


def config_digest(config: RunConfig) -> str:
    """Returns a digest of everything that must stay the same when a run is resumed.

    Defaults are left out, so that a coordinator of a version with more keys resumes the run.
    """
    values = config.model_dump(mode="json", exclude=_NOT_IN_DIGEST, exclude_defaults=True)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
