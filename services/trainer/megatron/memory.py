"""Memory of a rank: the copies of the policy that it keeps, and what a forward pass keeps for its backward pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch.multiprocessing.reductions import StorageWeakRef

from services.trainer.megatron.optimizer import list_parts

_LIMIT = Path("/sys/fs/cgroup/memory.max")


def count_copies(parameters: Iterable[torch.nn.Parameter], optimizer: MegatronOptimizer) -> dict[str, int]:
    """Returns the bytes of this rank's weights, gradients, moments and main weights.

    Moments are there from a job's first step on. Main weights are the float32 copies that the optimizer of a bfloat16
    model updates.
    """
    own = list(parameters)
    storages = {_storage(parameter) for parameter in own}
    groups = [group for part in list_parts(optimizer) for group in part.optimizer.param_groups]
    updated = [weight for group in groups for weight in group["params"]]
    return {
        "weights": _bytes(own),
        "gradients": _bytes(parameter.main_grad for parameter in own if parameter.requires_grad),  # type: ignore[attr-defined]
        "moments": 2 * _bytes(updated),
        "main_weights": _bytes(weight for weight in updated if _storage(weight) not in storages),
    }


def free_bytes(device: torch.device, processes: int, limit: Path = _LIMIT) -> int:
    """Returns the memory that is free for this process: of its GPU, or its share of this machine and of the container.

    `limit` is the file that holds the container's limit, if any.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = int(_find(r"MemAvailable:\s+(\d+) kB", "/proc/meminfo")) * 1024 // processes
    bound = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    if bound == "max":
        return available
    used = int(limit.with_name("memory.current").read_text(encoding="utf-8"))
    cached = int(_find(r"inactive_file (\d+)", str(limit.with_name("memory.stat"))))  # given back when it is needed
    return min(available, (int(bound) - used + cached) // processes)


def whole_bytes(device: torch.device, processes: int, limit: Path = _LIMIT) -> int:
    """Returns all memory that this process could ever have: of its GPU, or its share of this machine or container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    physical = int(_find(r"MemTotal:\s+(\d+) kB", "/proc/meminfo")) * 1024
    bound = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return (physical if bound == "max" else min(physical, int(bound))) // processes


class OffloadedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Scope in which autograd saves tensors in the machine's memory; the parameters and small tensors stay.

    What several operations save is copied once, and what a backward pass computes again stays: it is taken at once. A
    copy runs on the device's stream, behind what computes the tensor and before what takes its memory next.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], min_bytes: int = 1 << 20) -> None:
        super().__init__(self._pack, self._unpack)
        self.moved_bytes = 0
        self._min_bytes = min_bytes
        self._parameters = {_storage(parameter) for parameter in parameters}
        # By the part of a storage, and the number of the changes that it had: a weak reference's number is given once.
        self._copies: WeakValueDictionary[Any, torch.Tensor] = WeakValueDictionary()

    def _pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.device | None]:
        is_backward = torch._C._current_graph_task_id() >= 0
        if is_backward or tensor.nbytes < self._min_bytes or _storage(tensor) in self._parameters:
            # The tensor itself would hold the operation that holds it.
            return tensor.detach(), None
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        copy = self._copies.get(key)
        if copy is None:
            copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            copy.copy_(tensor, non_blocking=True)
            self.moved_bytes += copy.nbytes
            self._copies[key] = copy
        return copy, tensor.device

    def _unpack(self, saved: tuple[torch.Tensor, torch.device | None]) -> torch.Tensor:
        tensor, device = saved
        return tensor if device is None else tensor.to(device, non_blocking=True)


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Scope that counts what autograd holds for backward passes; `peak` is the most bytes at one time.

    A storage that several operations save counts once; the parameters do not count.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(self._pack, self._unpack)
        self.peak = 0
        self._bytes = 0
        self._parameters = {_storage(parameter) for parameter in parameters}
        self._holders: Counter[int] = Counter()

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        key = _storage(tensor)
        if key in self._parameters:
            return _Saved(tensor.detach(), None)
        self._holders[key] += 1
        if self._holders[key] == 1:
            self._bytes += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self._bytes)
        return _Saved(tensor.detach(), self)

    def _unpack(self, saved: _Saved) -> torch.Tensor:
        return saved.tensor

    def release(self, tensor: torch.Tensor) -> None:
        """Takes a tensor out of the count that its backward pass has let go."""
        key = _storage(tensor)
        self._holders[key] -= 1
        if not self._holders[key]:
            self._bytes -= tensor.untyped_storage().nbytes()


class _Saved:
    """Tensor that autograd holds; its end is reported to the count."""

    def __init__(self, tensor: torch.Tensor, count: SavedTensors | None) -> None:
        self.tensor = tensor
        self._count = count

    def __del__(self) -> None:
        if self._count is not None:
            self._count.release(self.tensor)


def _find(pattern: str, file: str) -> str:
    found = re.search(pattern, Path(file).read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
