"""Configuration of the reward service."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SecretStr, model_validator

from services.kit.config import Audience, HttpConfig, Model, ServiceConfig

MAX_VOTES = 32


class ChecksConfig(Model):
    """Checks in processes that may be killed."""

    workers: int = Field(2, ge=1)
    """Processes that check; each takes one after the other."""
    check_timeout_s: float = Field(5.0, gt=0)
    """CPU time of one check; past it, or 8 times as long by the clock, its process is killed and the item FAILED."""
    memory_bytes: int = Field(1 << 30, ge=1 << 27)
    """Memory of one check; past it its process is killed and the item FAILED."""
    start_timeout_s: float = Field(60.0, gt=0)
    """Time for a worker process to get ready."""
    slow_check_s: float = Field(0.25, gt=0)
    """A check that takes longer while others wait goes on beside them."""
    slow_checks: int = Field(4, ge=0)
    """Checks that may go on beside the others, in each worker."""


class MathConfig(ChecksConfig):
    """The math verifier; its checks are comparisons of expressions, plain numbers need none."""


class PatternConfig(ChecksConfig):
    """The regex and json verifiers; their checks are matches and validations."""

    workers: int = Field(1, ge=1)
    check_timeout_s: float = Field(2.0, gt=0)


class CodeConfig(Model):
    """The code verifier."""

    concurrency: int = Field(16, ge=1)
    """Programs and patches at the sandbox at once; more wait here."""
    timeout_s: float = Field(60.0, gt=0)
    """Time of one program or patch at the sandbox, retries included; past it the item is FAILED."""
    retry_starved: bool = False
    """Has a program that computed, and met the wall-clock limit with CPU time to spare, judged once more with no other
    job of the sandbox beside it: for machines whose cores others share."""


class JudgeEndpointConfig(Model):
    """A judge: a model behind an OpenAI-compatible endpoint, how it is asked and how much."""

    base_url: str = Field(pattern=r"^https?://\S+$")
    """Where the API begins, its version included: http://127.0.0.1:8000/v1 for one."""
    model: str = Field(min_length=1)
    """The model's name at the endpoint."""
    api_key: SecretStr | None = None
    """Bearer token; give it in the environment, as PERIGEE_REWARD__JUDGE__JUDGES__<NAME>__API_KEY."""
    temperature: float | None = Field(0.6, ge=0)
    """Sampling temperature; the endpoint's own when null. Several votes at 0 are one."""
    max_tokens: int = Field(4096, ge=1)
    """Longest answer; one that is cut off there is a failed vote."""
    extra_body: dict[str, Any] = {}
    """Further fields of each request, laid over the others; null takes a field out."""
    structured_output: bool = True
    """Have the server hold the answer to a JSON schema; an endpoint that refuses is asked in words from then on."""
    votes: int = Field(1, ge=1, le=MAX_VOTES)
    """Votes on one item unless it says otherwise; more than half of them have to agree."""
    timeout_s: float = Field(120.0, gt=0)
    """Time of one vote from its first request on, retries included; past it the vote has failed."""
    attempt_timeout_s: float = Field(90.0, gt=0)
    """Time of one request."""
    concurrency: int = Field(16, ge=1)
    """Votes under way at once; more wait here."""
    calls_per_minute: int | None = Field(None, ge=1)
    """Requests in any minute; more wait here."""
    tokens_per_minute: int | None = Field(None, ge=1)
    """Prompt and answer tokens in any minute; more wait here."""
    total_calls: int | None = Field(None, ge=1)
    """Requests of the whole process; afterwards votes fail."""
    total_tokens: int | None = Field(None, ge=1)
    """Prompt and answer tokens of the whole process; afterwards votes fail."""


class JudgeConfig(Model):
    """The judge verifier."""

    judges: dict[str, JudgeEndpointConfig] = {}
    """Judges by name; without any the verifier is unavailable."""
    default: str = ""
    """The judge of items that name none; the first one unless set."""
    max_response_characters: int = Field(60_000, ge=100)
    """Longest text that is judged in full; of a longer one the middle is left out, which the judge is told."""

    @model_validator(mode="after")
    def _check_default(self) -> Self:
        if self.default and self.default not in self.judges:
            raise ValueError(f"default: {self.default!r} is none of the judges {sorted(self.judges)}")
        return self


class ValueHeadConfig(Model):
    """The value-head verifier."""

    path: str | None = None
    """Folder of a model made by `perigee reward train`; without it the verifier is unavailable."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")
    """cpu, cuda or cuda:1; auto takes a GPU when there is one."""
    threads: int = Field(1, ge=1)
    """Threads of the model on a CPU."""
    reward: Literal["verdict", "probability"] = "verdict"
    """What is given: 1 for correct and 0 for wrong, or the model's probability."""
    max_batch_tokens: int = Field(16_384, ge=1)
    """Tokens of one batch, padding included; a longer response is a batch by itself."""
    max_batch_items: int = Field(64, ge=1)
    """Responses of one batch."""
    batch_wait_ms: float = Field(3.0, ge=0)
    """How long a batch that is not full waits for more."""
    timeout_s: float = Field(60.0, gt=0)
    """Time of one batch; past it the model's process is replaced and the batch's items FAILED."""
    start_timeout_s: float = Field(300.0, gt=0)
    """Time for the model to load."""


class RewardConfig(ServiceConfig):
    """The reward service's section of a recipe."""

    section: ClassVar[str] = "reward"
    audience: ClassVar[Audience] = "reward"

    http: HttpConfig = HttpConfig()
    """How the service answers HTTP."""
    sandbox_address: str = "127.0.0.1:50056"
    """The sandbox that runs programs."""
    math: MathConfig = MathConfig()
    """The math verifier."""
    pattern: PatternConfig = PatternConfig()
    """The regex and json verifiers."""
    code: CodeConfig = CodeConfig()
    """The code verifier."""
    judge: JudgeConfig = JudgeConfig()
    """The judge verifier."""
    value_head: ValueHeadConfig = ValueHeadConfig()
    """The value-head verifier."""
    cache_entries: int = Field(100_000, ge=0)
    """Outcomes kept, so that the same response to the same prompt is judged once; the oldest make room."""
    max_queued_items: int = Field(16_384, ge=1)
    """Items of one verifier under way in all calls; a call that would exceed it is refused with RESOURCE_EXHAUSTED."""
    max_response_bytes: int = Field(1 << 20, ge=1)
    """Largest response of an item, in UTF-8."""
    max_prompt_bytes: int = Field(1 << 20, ge=1)
    """Largest prompt of an item, in UTF-8."""
    max_images: int = Field(16, ge=0)
    """Most images of an item."""
    max_image_bytes: int = Field(8 << 20, ge=1)
    """Largest image, in bytes."""
    max_image_pixels: int = Field(40_000_000, ge=1)
    """Largest image, in pixels."""
    max_request_bytes: int = Field(64 << 20, ge=4 << 20)
    """Largest call; below it, an item that is too large is told by its field."""

    @property
    def message_bytes(self) -> int:
        """As configured: batches of long responses and images are larger than most calls."""
        return self.max_request_bytes
