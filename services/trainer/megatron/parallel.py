"""Process groups: Megatron's, the object channels beside them, and the scope in which Megatron runs on CPU."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.overrides import TorchFunctionMode

from perigee.errors import InvalidArgumentError, PerigeeError

# Ranks wait in an object channel between jobs, for as long as no job comes.
_CHANNEL_TIMEOUT = datetime.timedelta(days=365)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the parallel dimensions and this process's rank in each."""

    tensor: int
    pipeline: int
    context: int
    data: int
    expert: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    expert_rank: int
    rank: int
    device: torch.device

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def is_last_stage(self) -> bool:
        """Whether this process has the output head."""
        return self.pipeline_rank == self.pipeline - 1

    @property
    def is_replica_leader(self) -> bool:
        """Whether this process reads the tokens of its data-parallel replica."""
        return self.reports and self.pipeline_rank == 0

    @property
    def reports(self) -> bool:
        """Whether what this process finds of a loss counts: others of its tensor and context groups find the same."""
        return self.tensor_rank == 0 and self.context_rank == 0


class ObjectChannel:
    """Collectives over Python objects among some ranks, on CPU; the first of `ranks` is the source."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = list(ranks)
        self._group = dist.new_group(self._ranks, backend="gloo", timeout=_CHANNEL_TIMEOUT) if len(ranks) > 1 else None

    def broadcast(self, value: Any) -> Any:
        """Returns the source's value, on every rank."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self._ranks[0], group=self._group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's value, in rank order, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * len(self._ranks)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """Returns the source's value for this rank; the other ranks pass None."""
        if self._group is None:
            assert values is not None
            return values[0]
        box: list[Any] = [None]
        dist.scatter_object_list(box, None if values is None else list(values), src=self._ranks[0], group=self._group)
        return box[0]

    def agree(self, code: int) -> int:
        """Returns the source's small number, on every rank; cheap enough for each step."""
        if self._group is None:
            return code
        code_1 = torch.tensor([code])
        dist.broadcast(code_1, src=self._ranks[0], group=self._group)
        return int(code_1.item())

    def raise_first(self, error: PerigeeError | None) -> None:
        """Raises the first error that any rank passes, on every rank."""
        for found in self.gather(None if error is None else (type(error), error.message)):
            if found is not None:
                raise found[0](found[1])


def join_group(
    tensor: int = 1, pipeline: int = 1, context: int = 1, data: int = 1, expert: int = 1, seed: int = 0
) -> ParallelDims:
    """Enters the process group described by RANK and WORLD_SIZE and builds Megatron's groups.

    Experts are divided over `expert` of the ranks of a pipeline stage, and are whole on each.

    Raises InvalidArgumentError when the sizes do not multiply to WORLD_SIZE, or when there are GPUs and none of them is
    left for this process.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if tensor * pipeline * context * data != world:
        raise InvalidArgumentError(
            f"tensor_parallel {tensor} x pipeline_parallel {pipeline} x context_parallel {context} x data_parallel "
            f"{data} is not {world} processes"
        )
    device = _CPU
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise InvalidArgumentError.for_field(
                "trainer.nodes",
                f"this machine has {torch.cuda.device_count()} GPUs for more processes, and NCCL wants one for each: "
                "use more machines or lower the parallel sizes",
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "nccl"
    if world == 1:
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    parallel_state.initialize_model_parallel(
        tensor,
        pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ParallelDims(
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        data=data,
        expert=expert,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        rank=rank,
        device=device,
    )


def leave_group() -> None:
    """Tears the groups down, in the reverse order of `join_group`."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def open_channels(dims: ParallelDims) -> tuple[ObjectChannel, ObjectChannel]:
    """Returns the channel among all ranks and the one among the ranks of this process's data-parallel replica."""
    everyone = ObjectChannel(range(dims.world))
    data_ranks = everyone.gather(dims.data_rank)
    # Every rank takes part in the making of every group.
    replicas = [
        ObjectChannel([rank for rank, data_rank in enumerate(data_ranks) if data_rank == replica])
        for replica in range(dims.data)
    ]
    return everyone, replicas[dims.data_rank]


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron sorts parameters by `param.type() == "torch.cuda.FloatTensor"`.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": _CPU}
        elif func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str) and args[1].startswith("cuda"):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _ignore(*_: object, **__: object) -> None:
    return None


def _move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    # Megatron's own leaves a tensor that is on CPU as it is, which all_to_all_single does not take for split sizes.
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class _NoStream:
    """CUDA's stream and event where there is none: what it is asked for has been done."""

    synchronize = wait_stream = _ignore

    def record_event(self) -> Self:
        """Returns an event that has happened."""
        return self


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Scope, for this thread, in which megatron-core 0.16.1 may be built, run and stepped without a GPU.

    Retargets the places where it names CUDA; does nothing where there is CUDA. The mode is thread-local: the thread
    that builds, steps or loads a model has to be inside it.
    """
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    patches: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch.cuda, "current_device", lambda: _CPU),
        (torch.cuda, "synchronize", _ignore),
        (torch.cuda, "Stream", _NoStream),
        (torch.cuda, "current_stream", lambda *_: _NoStream()),
        (torch.cuda, "stream", lambda _: contextlib.nullcontext()),
        (torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _move_to_cpu),
        (megatron_random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        (megatron_random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        with _CudaMeansCpu():
            yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
