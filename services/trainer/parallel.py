"""The process group, Megatron's parallel groups on top of it, and the control channel from rank 0 to the others."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from perigee.errors import InvalidArgumentError

# Ranks wait in the control group between jobs, for as long as no job comes.
_CONTROL_TIMEOUT = datetime.timedelta(days=365)


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions and this process's place in them."""

    tensor: int
    pipeline: int
    data: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    rank: int
    device: torch.device

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data

    @property
    def is_last_stage(self) -> bool:
        """Whether this process computes logits."""
        return self.pipeline_rank == self.pipeline - 1


class Control:
    """Collectives over Python objects and flags, on CPU, beside Megatron's own groups."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.group = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT) if world > 1 else None

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, code: int) -> int:
        """Rank 0's small number, on every rank; cheap enough for each step."""
        if self.group is None:
            return code
        code_1 = torch.tensor([code])
        dist.broadcast(code_1, src=0, group=self.group)
        return int(code_1.item())


def join(tensor: int, pipeline: int, data: int, seed: int) -> tuple[Layout, Control]:
    """Enters the process group described by RANK and WORLD_SIZE and builds Megatron's groups.

    Raises InvalidArgumentError when the sizes do not multiply to WORLD_SIZE.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if tensor * pipeline * data != world:
        raise InvalidArgumentError(
            f"tensor_parallel {tensor} x pipeline_parallel {pipeline} x data_parallel {data} is not {world} processes"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "nccl"
    if world == 1:
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    parallel_state.initialize_model_parallel(tensor, pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    layout = Layout(
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        rank=rank,
        device=device,
    )
    return layout, Control(world)


def leave() -> None:
    """Tears the groups down, in the reverse order of `join`."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
