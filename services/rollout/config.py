"""Configuration of a rollout worker."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from services.kit.config import Audience, HttpConfig, Model, ServiceConfig
from services.kit.rope import RopeConfig
from services.weights.config import WeightsConfig


class SupervisionConfig(Model):
    """Restarts of an engine that dies or does not start."""

    start_attempts: int = Field(3, ge=1)
    """Starts in a row that may fail before the service ends with the error."""
    retry_seconds: float = Field(1.0, gt=0)
    """Pause before an engine that failed to start is started again."""
    start_seconds: float = Field(1800.0, gt=0)
    """Seconds that a start may take, captured graphs included."""
    stall_seconds: float = Field(300.0, gt=0)
    """Seconds without a token after which an engine with requests counts as dead and is restarted, beside what the
    longest of them adds."""
    stall_token_seconds: float = Field(0.01, ge=0)
    """Seconds that each token of the longest sequence in the engine adds: its prefill gives no token."""


class RegistrationConfig(Model):
    """Lease of the worker at the coordinator."""

    retry_seconds: float = Field(1.0, gt=0)
    """Pause between attempts to reach a coordinator that does not answer."""
    timeout_seconds: float = Field(5.0, gt=0)
    """Deadline of one call."""


class EndpointConfig(HttpConfig):
    """OpenAI-compatible endpoint, with the host, the tokens, the certificates and the limits of `server`; calls of
    operators beside it, for tokens that are for `control`."""

    audience: ClassVar[Audience | None] = "policy"

    max_body_bytes: int | None = Field(16 << 20, ge=1)
    """Largest body of a request."""
    timeout_seconds: float | None = Field(3600.0, gt=0)
    """Deadline of a call that brings none."""
    max_sequences: int = Field(64, ge=1)
    """Responses under way at once, of all calls together; calls that pass it are refused with 429, so that the run's
    trajectories keep their room."""


class ImagesConfig(Model):
    """Images of prompts, for models that take them."""

    max_per_prompt: int = Field(8, ge=1)
    """Images that a prompt may have."""
    max_bytes: int = Field(10 << 20, ge=1)
    """Largest file of an image."""
    max_pixels: int = Field(40_000_000, ge=1)
    """Largest image, width times height."""
    allow_urls: bool = False
    """Whether the endpoint fetches images from http:// and https:// addresses of its callers."""
    store_bytes: int = Field(1 << 30, ge=1)
    """Files of images that callers of Generate and of the endpoint have put here. Those asked for least recently make
    room for others; those of calls under way stay."""
    cache_bytes: int = Field(1 << 30, ge=0)
    """Pixels that are kept for the next sequence with the same image: so much of decoded images, and so much twice of
    images that are scaled for the model, in this process and in the engine's."""


class RolloutConfig(ServiceConfig):
    """Rollout worker: one engine that holds one policy version at a time."""

    section: ClassVar[str] = "rollout"

    model: str | None = None
    """Folder with config.json and tokenizer.json of the policy, a path or a URL; its weights are pushed later, not read
    from here. The trainer is asked for these files when unset."""
    rope: RopeConfig | None = None
    """Rotary embedding in the place of that of `model`; the recipe's `rope` when unset. Where the trainer is asked for
    the files, it must be the trainer's."""
    trainer_address: str = "127.0.0.1:50054"
    """host:port of the trainer, which has the model's files."""
    worker_id: str | None = None
    """Name of this worker, unique in the run; host name and process id when unset."""
    advertise_address: str | None = None
    """host:port that the coordinator and the trainer dial; unset takes `server.advertise_host` and the bound port."""
    buffer_address: str = "127.0.0.1:50052"
    """host:port of the replay buffer."""
    coordinator_address: str | None = "127.0.0.1:50051"
    """host:port of the coordinator to register with; null serves without one."""

    engine: Literal["vllm"] = "vllm"
    """Generation engine."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; auto takes the one of the model's config.json."""
    max_model_len: int | None = Field(None, ge=2)
    """Prompt and response tokens a sequence may have; the model's own limit when unset."""
    max_num_seqs: int = Field(256, ge=1)
    """Sequences decoded at once."""
    max_num_batched_tokens: int | None = Field(None, ge=1)
    """Prompt and decode tokens of one engine step, over which longer prefills are split; at least `max_num_seqs`. More
    make a prefill faster and what is decoded meanwhile slower. The engine's choice when unset, 2048 on a CPU."""
    kv_cache_bytes: int | None = Field(None, ge=1)
    """Memory of the KV cache; when unset 1 GiB on a CPU, and what `gpu_memory_utilization` leaves on a GPU."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory that the engine takes when `kv_cache_bytes` is unset."""
    block_size: int = Field(32, ge=1)
    """Tokens of a KV-cache block, the grain of prefix reuse; on a CPU a multiple of 32."""
    visible_devices: str | None = None
    """GPUs that the engine may take, as CUDA_VISIBLE_DEVICES names them: "2,3". All when unset. A trainer on the same
    machine wants others, unless it takes turns with this worker."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that one engine spans."""
    enforce_eager: bool = True
    """Run without captured graphs; they make small models faster on GPUs and the start slower."""
    enable_sleep_mode: bool = False
    """Lets a GPU's engine sleep while a trainer uses the GPU, which `run.hybrid.engine: sleep` asks for; an engine on a
    CPU always can."""
    engine_threads: int = Field(1, ge=1)
    """Threads of one forward pass on a CPU."""
    router_replay: bool = False
    """Record the experts that each token passes in a mixture of experts, for the trainer to use the same ones. A token
    then takes layers times experts per token bytes more in the buffer, and twice that with more than 256 experts."""

    seed: int | None = Field(None, ge=0)
    """Seed of the engine's sampling; drawn at each start when unset. Give workers of one run different ones."""

    chunk_tokens: int = Field(64, ge=1, le=1 << 16)
    """Tokens of a trajectory that a crash can lose: it is appended to the buffer at least this often. What is lost is
    drawn again, and long responses lose more than short ones."""
    flush_seconds: float = Field(0.1, gt=0)
    """Seconds that ended segments wait for others, to share one append."""
    max_queued_sequences: int = Field(16384, ge=1)
    """Sequences accepted and not ended; calls that pass it are refused with RESOURCE_EXHAUSTED."""
    buffer_timeout_seconds: float = Field(60.0, gt=0)
    """Deadline of one call to the buffer, beside 4 s for each 100,000 tokens that it reads."""
    commit_wait_seconds: float = Field(120.0, gt=0)
    """Seconds that a weight commit waits for an engine that is starting."""
    update_timeout_seconds: float = Field(300.0, gt=0)
    """Seconds that an engine may take over new weights before it is restarted."""
    max_fingerprint_difference: float = Field(0.5, gt=0)
    """Mean absolute difference, in nats, of the engine's log-probabilities of a fixed prompt from the trainer's above
    which pulled weights are refused, when another engine has it, too."""
    fingerprint_timeout_seconds: float = Field(20.0, gt=0)
    """Seconds that this comparison may wait for a place in the engine; it is left out then."""

    images: ImagesConfig = ImagesConfig()
    """Images of prompts."""
    http: EndpointConfig = EndpointConfig()
    """The OpenAI-compatible endpoint, and calls of operators."""
    supervision: SupervisionConfig = SupervisionConfig()
    """Restarts of the engine."""
    registration: RegistrationConfig = RegistrationConfig()
    """Lease at the coordinator."""
    weights: WeightsConfig = WeightsConfig()
    """Reception of weights."""
