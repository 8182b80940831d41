"""Configuration of a run: the `run` section of a recipe."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from pydantic import BaseModel, ConfigDict, Field, create_model, field_serializer, field_validator, model_validator

from perigee.config import Model, validate
from perigee.errors import InvalidArgumentError
from perigee.images import ImageLimits
from perigee.rollout.v1 import rollout_pb2
from perigee.trainer.v1 import trainer_pb2
from services.kit.rope import RopeConfig

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


class PromptSource(Model):
    """Prompts of a file, folder or data set; a text is the path of one whose columns are a prompt line's fields."""

    path: str
    """JSON Lines or Parquet, a folder of these or of `datasets.save_to_disk`; a path or a URL, also
    hf://datasets/OWNER/NAME/FOLDER; for `perigee train` also suite:NAME, a suite of `perigee eval`."""
    columns: dict[str, str] = {}
    """Field by column: {prompt: question, answer: answer}; a dot leads into a column of objects. Other columns are left
    out."""
    answer_after: str = ""
    """The answer is what follows the last of these in its column."""
    verifier: str | dict[str, Any] | None = None
    """Verifier of lines that have none: its name, or {NAME: parameters}; math for lines with an answer when unset."""
    defaults: dict[str, Any] = {}
    """Values of other fields that lines lack: {domain: algebra}."""
    split: str | None = None
    """The split of a saved data set, or the beginning of the names of a folder's files."""
    name: str | None = None
    """Begins the ids of lines that have none; the file's name when unset."""
    weight: float = Field(1.0, gt=0)
    """Prompts are drawn from the sources in proportion to their weights."""

    @model_validator(mode="before")
    @classmethod
    def _accept_a_path(cls, values: Any) -> Any:
        return {"path": values} if isinstance(values, str) else values

    @property
    def renames(self) -> dict[str, str]:
        """Field by column of the data."""
        return {column: field for field, column in self.columns.items()}

    @property
    def defaults_with_verifier(self) -> dict[str, Any]:
        """Values of fields that lines lack."""
        return self.defaults | ({} if self.verifier is None else {"verifier": self.verifier})


class HeldoutConfig(Model):
    """Held-out problems: sources of their own, or a part of the prompts."""

    sources: tuple[PromptSource, ...] = ()
    """Sources like those of `prompts`; a path, a source or a list of sources may stand in the place of this section."""
    fraction: float | None = Field(None, gt=0, lt=1)
    """Part of the prompts' different questions that is held out, where there are no sources."""
    count: int | None = Field(None, ge=1)
    """Number of different questions held out, in the place of `fraction`."""
    seed: int = Field(0, ge=0)
    """Seed of the choice."""

    @model_validator(mode="before")
    @classmethod
    def _accept_sources(cls, values: Any) -> Any:
        if isinstance(values, str) or (isinstance(values, Mapping) and "path" in values):
            values = [values]
        return {"sources": values} if isinstance(values, list | tuple) else values

    @model_validator(mode="after")
    def _choose_one(self) -> Self:
        if sum(map(bool, (self.sources, self.fraction, self.count))) != 1:
            raise ValueError("wants one of a path, fraction and count")
        return self


class AlgorithmConfig(Model):
    """Algorithm that trains the policy. All keys but `name` are its own settings, which the trainer checks."""

    model_config = ConfigDict(extra="allow")

    name: str = Field("policy_mirror_descent", min_length=1)
    """An algorithm of the trainer."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that the recipe gives; the trainer has defaults for the others."""
        return dict(self.model_extra or {})

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of its message."""
        return {"name": self.name, "settings": self.settings}

    def message(self) -> trainer_pb2.Algorithm:
        """Returns the algorithm with its settings."""
        return ParseDict(self.fields, trainer_pb2.Algorithm())


class StageAlgorithmConfig(AlgorithmConfig):
    """Algorithm of a supervised stage. All keys but `name` are its own settings, which the trainer checks."""

    name: Literal["sft", "dpo"] = "sft"
    """sft: the responses of the file. dpo: direct preference optimization on its pairs."""


class SftStage(Model):
    """Supervised stage before the reinforcement learning."""

    dataset: str = Field(serialization_alias="dataset_path")
    """JSON Lines of {"prompt" or "messages", "response"}, for dpo of {..., "chosen", "rejected"}: a path, which the
    trainer is sent, or a URL that it reads."""
    algorithm: StageAlgorithmConfig = StageAlgorithmConfig()
    """What is learned from it."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    batch_size: int = Field(32, ge=1)
    """Examples per step."""
    max_tokens_per_microbatch: int = Field(4096, ge=1)
    """Tokens of a forward and backward pass on each process; with `trainer.context_parallel` a micro-batch holds that
    many times as many. Only a sequence that is longer is passed as it is, in a micro-batch of its own."""
    max_sequence_length: int | None = Field(None, ge=2)
    """Longest prompt and response together, in tokens; the context by `rope` when unset. A longer example is refused
    before the run."""
    rope: RopeConfig | None = None
    """Rotary embedding of this stage; what it leaves out is that of the recipe's `rope`, which the last stage, rollouts
    and exports have. A stage of shorter examples may so come before the longest ones (k1.5 section 2.2)."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The stage's optimizer. A stage that names no learning rate takes 1e-5, within the 2e-5 to 1e-6 of the k1.5
    report's supervised stages (section 2.5.2), for dpo too, which wants a tenth of it or less: name it there."""


class RepetitionStopConfig(Model):
    """Early end of responses whose tail repeats itself."""

    max_period: int = Field(16, ge=1)
    """Longest repeated pattern, in tokens."""
    min_repeats: int = Field(0, ge=0)
    """Repeats of the pattern that end the response; 0 is off."""

    def message(self) -> rollout_pb2.RepetitionStop:
        """Returns the settings for the rollout workers."""
        return to_message(self, rollout_pb2.RepetitionStop())


class TokenCosts(Model):
    """Costs of tokens in full batches, relative to a sampled token of a short context."""

    prefill: float = Field(0.25, gt=0)
    """A prefilled token of a short context."""
    prefill_doubles_at: float = Field(32_768.0, gt=0)
    """Position at which a prefilled token costs twice that: its attention costs as much as the rest."""
    sampling_doubles_at: float = Field(8_192.0, gt=0)
    """Position at which a sampled token costs twice that of a short context: reading its keys and values costs as much
    as the rest."""

    def prefill_work(self, tokens: int) -> float:
        """Returns the work of prefilling a context."""
        return self.prefill * (tokens + tokens * tokens / (2 * self.prefill_doubles_at))

    def sampling_work(self, tokens: int, new_tokens: float) -> float:
        """Returns the work of sampling `new_tokens` after a context."""
        return new_tokens * (1 + (tokens + new_tokens / 2) / self.sampling_doubles_at)

    def work(self, tokens: int, new_tokens: float) -> float:
        """Returns the work of prefilling a context and sampling after it."""
        return self.prefill_work(tokens) + self.sampling_work(tokens, new_tokens)

    def tokens_of(self, tokens: int, work: float) -> float:
        """Returns how many tokens the work samples after a context: the inverse of `sampling_work`."""
        first = 1 + tokens / self.sampling_doubles_at
        return 2 * work / (first + math.sqrt(first * first + 2 * work / self.sampling_doubles_at))

    def least_budget(self, tokens: int, max_prefill_share: float, iterations: int = 1) -> int:
        """Returns the fewest sampled tokens beside which prefilling a context is no more than this share of the work.

        The context is prefilled once in so many iterations. The share is above 0; 1 allows any budget.
        """
        sampling = self.prefill_work(tokens) / iterations * (1 - max_prefill_share) / max_prefill_share
        return math.ceil(self.tokens_of(tokens, sampling))


class RolloutSettings(Model):
    """Sampling of trajectories."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"response_cap": "max_response_tokens"}

    token_budget: int = Field(0, ge=0)
    """Output tokens that a trajectory may add in one iteration; 0 is no budget. `max_prefill_share` and
    `target_seconds` raise it. In an iteration in which every group begins, as in the first, they get one budget, two
    and so on up to `max_response_tokens` in turn, so that they do not all end together later."""
    max_prefill_share: float = Field(0.5, gt=0, le=1)
    """An update of the weights empties the prefix cache, so that every iteration prefills the context of a trajectory.
    Its budget grows with the context until that is no more than this share of its work in an iteration, by `costs`; 1
    is off."""
    target_seconds: float | None = Field(None, gt=0)
    """Seconds of a rollout phase that the budget of an iteration aims at, from `token_budget` up to
    `max_response_tokens`, by the speed of the iterations before. Unset, it is `token_budget`."""
    costs: TokenCosts = TokenCosts()
    """What prefilled and sampled tokens cost, relative to each other. The defaults are what arithmetic says of a dense
    model of 7B parameters on one GPU in batches of 64; `bench/token_costs.py` measures an engine."""
    max_response_tokens: int = Field(1024, ge=1)
    """Response tokens that a trajectory may have over all iterations; more than most responses of the model need: those
    cut by it have no answer."""
    during_training: bool | None = None
    """Workers that do not share the trainer's devices go on with partial trajectories while it trains, by the budgets
    of the next iteration. These tokens are one version older than they would be: below an `update.max_staleness` of 1
    they are left out of the loss. Unset, it is on in a hybrid deployment with a `max_staleness` of 1 or more."""
    max_kv_staleness: int = Field(0, ge=0)
    """Policy versions by which the keys and values that a worker keeps of prefixes may be older than its weights. At 0
    every commit empties the prefix cache, and partial trajectories are prefilled again. Above it the rollout's
    log-probabilities are those of mixed versions, which `train/train_infer_logprob_diff_mean` shows. A worker with a
    model that takes images keeps nothing."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    repetition_stop: RepetitionStopConfig = RepetitionStopConfig()
    """Early end of responses that repeat themselves."""

    @model_validator(mode="after")
    def _need_a_floor(self) -> Self:
        if self.target_seconds is not None and not self.token_budget:
            raise ValueError("target_seconds needs a token_budget above 0, the least that a trajectory gets")
        return self


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


class UpdateConfig(Model):
    """Update of the policy, whatever the algorithm."""

    minibatches: int = Field(2, ge=1)
    """Optimizer steps per iteration."""
    max_tokens_per_microbatch: int = Field(4096, ge=1)
    """Tokens of a forward and backward pass on each process; with `trainer.context_parallel` a micro-batch holds that
    many times as many. Only a sequence that is longer is passed as it is, in a micro-batch of its own."""
    max_staleness: int = Field(0, ge=0)
    """Tokens of versions older than the iteration's by more than this are left out of the loss."""
    token_scale: float = Field(1.0, gt=0)
    """Log-probability sums are divided by this before the loss. The loss is least where the sum over a response has
    moved by `token_scale * advantage / tau`: 1 keeps a pretrained model near its start, a response within 10 nats at
    tau 0.1 and rewards of 0 and 1; the tokens of a response let each token move as far, for small models that have much
    to learn."""
    tis_cap: float | None = Field(None, ge=0)
    """Cap of truncated importance sampling against the engine's log-probabilities; 0 is off. Unset, it is 2 where the
    trainer computes in bfloat16, whose rounding sets the two engines apart, and off in float32."""


class SamplesConfig(Model):
    """Responses that are kept for people to read, in samples.jsonl."""

    count: int = Field(10, ge=0, le=32)
    """Samples of an iteration, and of an evaluation: right, wrong, ungradable, capped, repeated in turn; 0 is none."""
    max_text_bytes: int = Field(4096, ge=64, le=8192)
    """Bytes of a prompt, and of a response; of longer ones beginning and end are kept."""


class EvaluationConfig(Model):
    """Accuracy on held-out problems."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"response_cap": "max_response_tokens"}

    every: int = Field(0, ge=0)
    """Iterations between periodic evaluations; 0 is none. The first and the last model are always evaluated."""
    samples: int = Field(2, ge=1)
    """Responses per problem at temperature 1."""
    problems: int | None = Field(None, ge=1)
    """Problems of a periodic evaluation; all when unset."""
    end_problems: int | None = Field(None, ge=1)
    """Problems of the first and of the last evaluation, the same for both; all when unset."""
    greedy: bool = True
    """Evaluate greedy decoding, too, in periodic evaluations."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Response tokens at most; the rollout's max_response_tokens when unset."""
    keep_checkpoints: bool = False
    """Keep the checkpoint of each evaluated version besides the newest `trainer.keep_checkpoints`, to choose from them
    later (`perigee choose`)."""


class HybridConfig(Model):
    """Memory that trainer and rollout workers leave to each other where they use the same devices in turn."""

    engine: Literal["keep", "sleep", "restart"] = "sleep"
    """What an engine does while the trainer trains: keep its memory, give that of weights and KV cache back, or end and
    start anew. A GPU's engine sleeps where `rollout.enable_sleep_mode` is set."""
    trainer: Literal["keep", "shelve"] = "shelve"
    """Whether the trainer keeps its memory while workers generate, or moves its weights to `trainer.offload_path`."""
    workers: tuple[str, ...] = ()
    """Ids of the workers on the trainer's devices; those with the trainer's host in their address when empty."""


class ImagesConfig(Model):
    """What images of prompts and supervised examples may be."""

    max_bytes: int = Field(10 << 20, ge=1, le=256 << 20)
    """Bytes of an image's file."""
    max_pixels: int = Field(40_000_000, ge=1)
    """Width times height of an image: what decoding it may take, whatever the size of its file."""
    max_per_prompt: int = Field(8, ge=0)
    """Images of a prompt; 0 refuses all."""
    allow_urls: bool = False
    """Lines may name images by http:// and https:// addresses, which the coordinator reads when the run starts."""

    @property
    def limits(self) -> ImageLimits:
        """The limits of one image."""
        return ImageLimits(self.max_bytes, self.max_pixels)


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
    rope: RopeConfig | None = None
    """Rotary embedding in the place of that of `model`; the recipe's `rope` when unset. Where the trainer is asked for
    the files, it must be the trainer's."""
    prompts: tuple[PromptSource, ...] = Field(min_length=1)
    """Training prompts: a path or URL of JSON Lines or other data, a source, or a list of sources that are mixed."""
    heldout: HeldoutConfig
    """Held-out problems: sources like those of `prompts`, or {fraction or count, seed} of the prompts."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Prompts the model's chat template is applied to. auto: those with `messages`, and all when there is a
    system_prompt. always: text, too, as what the user says. never: none; text is taken as it stands."""
    system_prompt: str = ""
    """First message of each chat that has no system message of its own."""
    instruction: str = ""
    """Follows the last text of the user on a line of its own, such as how to state the answer; verifiers and judges do
    not see it."""
    images: ImagesConfig = ImagesConfig()
    """What images of prompts and supervised examples may be."""
    iterations: int = Field(ge=0)
    """Iterations of reinforcement learning."""
    time_limit_s: float | None = Field(None, gt=0)
    """The run ends after the iteration in which its age, supervised stages and evaluations included, passes this."""
    sft: tuple[SftStage, ...] = ()
    """Supervised stages before the first iteration."""
    max_live_groups: int = Field(64, ge=1)
    """Groups generated at once; those that were trained on are replaced by new ones. By rule of thumb 32 to 256: an
    update on fewer follows the luck of a few prompts, more of them wait longer for an update."""
    group_size: int = Field(8, ge=2)
    """Trajectories per group. DAPO (arXiv 2503.14476) takes 16, GRPO (arXiv 2402.03300) 64; in smaller groups all
    rewards are equal more often, and nothing is trained."""
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
    """Leave out groups whose members have equal rewards: their advantage is zero. With the algorithm `rest`, which
    learns from right responses alone, groups without one are left out instead."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Algorithm that trains the policy."""
    update: UpdateConfig = UpdateConfig()
    """Update of the policy, whatever the algorithm."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)
    """Optimizer of each iteration; its learning rate is that of the first iteration. GRPO (arXiv 2402.03300) and DAPO
    (arXiv 2503.14476) trained models of 7B and 32B parameters at 1e-6; below 1B take up to 1e-5, by rule of thumb. The
    optimizer starts anew at each iteration, so that its first step moves every weight by the whole rate, whatever the
    loss's scale: 2e-5 made a model of 135M parameters ramble in three updates. Small models trained from scratch take
    1e-4 and more."""
    final_lr_ratio: float = Field(1.0, gt=0, le=1)
    """The learning rate falls linearly over the run's iterations to this fraction of the first iteration's."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Accuracy on held-out problems."""
    samples: SamplesConfig = SamplesConfig()
    """Responses that are kept for people to read."""
    deployment: Literal["separate", "hybrid"] = "separate"
    """`hybrid` has trainer and rollout workers use the same devices in turn; otherwise each has its own."""
    hybrid: HybridConfig = HybridConfig()
    """Memory of a hybrid deployment."""

    @field_validator("prompts", mode="before")
    @classmethod
    def _accept_one_source(cls, values: Any) -> Any:
        return values if isinstance(values, list | tuple) else [values]

    @field_serializer("prompts", "heldout")
    def _write_plain_paths(self, value: Any) -> Any:
        """Writes one plain path as such, so that a run's digest is that of a coordinator that knows no sources."""
        sources = value.sources if isinstance(value, HeldoutConfig) else value
        if len(sources) == 1 and sources[0] == PromptSource(path=sources[0].path):
            return sources[0].path
        sections = value if isinstance(value, tuple) else (value,)
        return [section.model_dump(mode="json", exclude_defaults=True) for section in sections]

    @model_validator(mode="after")
    def _end_with_the_runs_rope(self) -> Self:
        if self.sft and self.sft[-1].rope not in (None, self.rope):
            raise ValueError(
                "the last stage of sft has another rope than the run, and rollouts and exports have the run's: give it "
                "none"
            )
        return self

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.chat == "never" and self.system_prompt:
            raise ValueError("system_prompt needs a chat template, and chat is never: leave one of them out")
        return self

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

    def chat_message(self) -> trainer_pb2.ChatSettings:
        """Returns how prompts become what the model is asked."""
        return trainer_pb2.ChatSettings(mode=self.chat, system_prompt=self.system_prompt, instruction=self.instruction)

    def update_message(self) -> trainer_pb2.UpdateSettings:
        """Returns the settings of the update, for the temperature of the rollout."""
        own = {"temperature": self.rollout.temperature, "default_tis_cap": self.update.tis_cap is None}
        return to_message(self.update, trainer_pb2.UpdateSettings(), **own)

    def optimizer_message(self, learning_rate: float) -> trainer_pb2.Optimizer:
        """Returns the optimizer's settings at a learning rate."""
        return to_message(self.optimizer, trainer_pb2.Optimizer(), learning_rate=learning_rate)

    def algorithm_request(self, longest_sequence: int = 0) -> trainer_pb2.CheckAlgorithmRequest:
        """Returns the question whether, and how, the trainer trains with these settings."""
        return trainer_pb2.CheckAlgorithmRequest(
            algorithm=self.algorithm.message(),
            update=self.update_message(),
            optimizer=self.optimizer_message(self.optimizer.learning_rate),
            longest_sequence=longest_sequence,
        )

    @property
    def rolls_out_during_training(self) -> bool:
        """Whether workers that do not share the trainer's devices generate while it trains."""
        if self.rollout.during_training is not None:
            return self.rollout.during_training
        return self.deployment == "hybrid" and self.update.max_staleness > 0

    @property
    def overlong_cap(self) -> int:
        """Response tokens with the whole overlong penalty."""
        return self.overlong_penalty.cap or self.rollout.max_response_tokens


# Keys that may change when a run is resumed.
CHANGEABLE_KEYS = ("iterations", "time_limit_s", "evaluation", "samples", "images", "deployment", "hybrid")


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


@cache
def _first_kinds(
    run: type[RunConfig], update: type[UpdateConfig]
) -> tuple[type[RunConfig], type[RolloutSettings], type[UpdateConfig]]:
    """The kinds of a run, of its rollout and of its update, with the defaults that their keys had first."""
    rollout = create_model("FirstRollout", __base__=RolloutSettings, max_response_tokens=(int, 200))
    update = create_model("FirstUpdate", __base__=update, tis_cap=(float | None, 0.0))
    kind: type[RunConfig] = create_model(
        "FirstRun",
        __base__=run,
        max_live_groups=(int, 160),
        rollout=(rollout, rollout()),
        update=(update, update()),
        optimizer=(OptimizerConfig, OptimizerConfig(learning_rate=2e-4)),
    )
    return kind, rollout, update


def config_digest(config: RunConfig) -> str:
    """Returns a digest of everything that must stay the same when a run is resumed.

    Defaults are left out, so that a coordinator of a version with more keys resumes the run. A key counts from the
    default that it had first: a run goes on with the values that it began with, or not at all.
    """
    kind, rollout, update = _first_kinds(type(config), type(config.update))
    parts = {"rollout": rollout(**dict(config.rollout)), "update": update(**dict(config.update))}
    first = kind.model_construct(**dict(config) | parts)
    values = first.model_dump(mode="json", exclude={*CHANGEABLE_KEYS}, exclude_defaults=True)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
