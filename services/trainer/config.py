"""Configuration of the trainer."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from services.kit.config import HttpConfig, ServiceConfig
from services.kit.rope import RopeConfig
from services.weights.config import WeightsConfig


class TrainerConfig(ServiceConfig):
    """The `trainer` section of a recipe."""

    section: ClassVar[str] = "trainer"

    model: str
    """Hugging Face folder of the base model, policy version 0: config.json, tokenizer.json, safetensors weights. A
    path, or a URL: s3://bucket/folder, hf://owner/model."""
    rope: RopeConfig | None = None
    """Rotary embedding in the place of the model's own, in training, checkpoints and exports; the recipe's `rope` when
    unset."""
    run_path: str
    """Folder for checkpoints; those of a run go to `checkpoints/<run id>` in it. A path, or a URL such as
    s3://bucket/folder: they are then written to this machine first."""
    buffer_address: str = "127.0.0.1:50052"
    """host:port of the replay buffer that trajectories are read from."""
    tensor_parallel: int = Field(1, ge=1)
    """Processes that each layer's matrices are split over."""
    pipeline_parallel: int = Field(1, ge=1)
    """Processes that the layers are divided over."""
    context_parallel: int = Field(1, ge=1)
    """Processes that the tokens of each micro-batch are divided over, so that one long sequence fits: each computes its
    share, and attention with a share of the heads (Ulysses). `tensor_parallel` times this divides the query heads."""
    data_parallel: int = Field(1, ge=1)
    """Copies of the model that share each step's sequences."""
    expert_parallel: int = Field(1, ge=1)
    """Processes that the experts of a mixture of experts (Qwen3-MoE) are divided over, out of those of
    `tensor_parallel`, `context_parallel` and `data_parallel` together, whose product it divides. Each expert is whole
    on its process, so that tensor parallelism alone does not divide experts."""
    nodes: int = Field(1, ge=1)
    """Machines that the processes are spread over, the same number on each; every one starts the trainer with its own
    `node_rank`, and has the model's and the run's folders under the same paths or URLs."""
    node_rank: int = Field(0, ge=0)
    """Number of this machine; 0 serves, the others follow it."""
    master_address: str | None = None
    """Name or address of machine 0, required with several."""
    master_port: int = Field(29500, ge=1, le=65535)
    """Port of machine 0 at which the processes meet; it carries no authentication: fence it off."""
    network_interface: str | None = None
    """Interface of the collectives (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), "eth0" for instance; unset takes loopback
    on one machine, and the one of the host name's address with several."""
    node_timeout_s: float = Field(30.0, ge=4)
    """Seconds without an answer after which another machine is taken for gone, and all processes end; whoever started
    them is to start them again."""
    visible_devices: str | None = None
    """GPUs of each machine that the processes take, one each in this order, as CUDA_VISIBLE_DEVICES names them: "0,1".
    All when unset. Rollout workers on the same machine want others, unless they take turns with the trainer."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of each process; all cores divided by the processes when unset."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights and activations; gradients and optimizer state are always float32."""
    recompute: bool = False
    """Keeps only each layer's input and computes the rest again in the backward pass, for long sequences."""
    recompute_layers: int | None = Field(None, ge=1)
    """With `recompute`, only the first so many layers of each pipeline stage are computed again, which costs less time
    and more memory; all when unset."""
    offload_activations: bool = False
    """Keeps what layers save for the backward pass in the machine's memory instead of a GPU's, together with
    `recompute` their inputs alone. Refused on a CPU, where both are the same memory."""
    vision: Literal["trained", "projector", "frozen"] = "trained"
    """What is trained of the vision tower of a model that takes images: all of it, only the projector that turns its
    features into embeddings, or nothing. The language model is trained in any case, and checkpoints, exports and pushes
    have all weights."""
    router_aux_loss_coef: float = Field(0.0, ge=0)
    """Factor of the load-balancing loss of a mixture of experts; 0 is none. The loss of a layer and micro-batch is the
    number of experts times the sum over experts of share of the choices times mean probability, 1 where all are used
    alike; that of a step is the sum over layers, weighted over micro-batches by their tokens."""
    max_microbatch_bytes: int | None = Field(None, ge=1 << 20)
    """Most memory that activations take on a process, by what a token takes when measured at the start, of the machine
    with `offload_activations`, else of the device. Tokens of a micro-batch are bounded by it and by
    `max_tokens_per_microbatch`, and a sequence that takes more is refused. When unset, half of what is free at the
    start, and a sequence that is longer has a micro-batch of its own."""
    max_sequence_length: int | None = Field(None, ge=2)
    """Longest prompt and response together, in tokens; the model's own limit when unset."""
    keep_checkpoints: int = Field(3, ge=2)
    """Checkpoints kept of each run; at least 2, so that an interrupted iteration finds the version it started from. The
    supervised model, a run's first policy, is kept besides, for comparisons from the same start."""
    offload_path: str | None = None
    """Folder on a disk of every machine that takes the weights while others use the memory; the system's temporary
    folder when unset. One in memory, such as /dev/shm, frees that of GPUs alone."""
    max_shard_bytes: int = Field(4 << 30, ge=1 << 20)
    """Largest safetensors file of a checkpoint."""
    buffer_timeout_s: float = Field(120.0, gt=0)
    """Deadline of one read of up to 512 trajectories from the buffer, beside 4 s for each 100,000 of their tokens."""
    seed: int = 0
    """Seed of the order of groups over optimizer steps."""
    http: HttpConfig = HttpConfig()
    """Calls of operators over HTTP, answered by machine 0."""
    weights: WeightsConfig = WeightsConfig()
    """How weights travel to rollout workers."""

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel

    @model_validator(mode="after")
    def _check_processes(self) -> Self:
        stage = self.tensor_parallel * self.context_parallel * self.data_parallel
        if stage % self.expert_parallel:
            raise ValueError(
                f"expert_parallel must divide tensor_parallel x context_parallel x data_parallel, {stage}, got "
                f"{self.expert_parallel}"
            )
        if self.recompute_layers is not None and not self.recompute:
            raise ValueError("recompute_layers says how much recompute computes again: set recompute to true, too")
        if self.world % self.nodes:
            raise ValueError(f"nodes must divide the {self.world} processes, got {self.nodes}")
        if self.node_rank >= self.nodes:
            raise ValueError(f"node_rank must be below nodes, got {self.node_rank} of {self.nodes}")
        if self.nodes > 1 and not self.master_address:
            raise ValueError("master_address is required with several nodes: name machine 0")
        return self
