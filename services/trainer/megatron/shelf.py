"""Shelf: the weights of a rank in a file while others use its memory, and what a fresh optimizer does without.

Every job resets the optimizer (k1.5 section 2.3.2), so moments are dropped, and gradients with them. Weights, and the
float32 copies that the optimizer of a bfloat16 model updates, come back bit for bit.
"""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from services.trainer.megatron.memory import count_copies
from services.trainer.megatron.optimizer import list_parts

_PIECE = 64 << 20


def list_moments(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """Yields the tensors of an optimizer's state. Whoever keeps them keeps their memory."""
    for part in list_parts(optimizer):
        for state in part.optimizer.state.values():
            yield from (each for each in state.values() if isinstance(each, torch.Tensor))


class Shelf:
    """Memory of a model and its optimizer: given back by `__init__`, taken again by `close`.

    `dropped` and `shelved` are the bytes that are forgotten and that lie in the file, which has no name and ends with
    this process at the latest. Raises OSError where the folder has no room; the memory is untouched then.
    """

    def __init__(self, model: DistributedDataParallel, optimizer: MegatronOptimizer, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._model = model
        self._gpu = next(model.parameters()).is_cuda
        copies = count_copies(model.parameters(), optimizer)
        parts = list_parts(optimizer)
        self.dropped = copies["gradients"] + sum(each.nbytes for each in list_moments(optimizer))
        updated = [weight for part in parts for group in part.optimizer.param_groups for weight in group["params"]]
        buffers = [each.param_data for each in model.buffers + model.expert_parallel_buffers]
        weights = [each for each in buffers if each is not None]
        self._storages = _distinct([*weights, *model.parameters(), *updated])
        self.shelved = sum(size for _, size in self._storages)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by `close`)
        for storage, size in self._storages:
            _write(self._file, storage, size)
        for part in parts:
            part.optimizer.state.clear()
        model.offload_grad_buffers(synchronize=self._gpu, empty_cache=False)
        for storage, _ in self._storages:
            storage.resize_(0)
        gc.collect()
        # After all of it, or PyTorch would keep a GPU's memory for itself.
        torch.cuda.empty_cache()
        ctypes.CDLL(None).malloc_trim(0)

    def close(self) -> None:
        """Brings the weights back and makes room for gradients, zeroed."""
        self._file.seek(0)
        for storage, size in self._storages:
            storage.resize_(size)
            _read(self._file, storage, size)
        self._model.restore_grad_buffers(synchronize=self._gpu)
        self._file.close()


def _distinct(tensors: Iterable[torch.Tensor]) -> list[tuple[torch.UntypedStorage, int]]:
    """Returns the storages of tensors, each once, with their bytes."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if size := storage.nbytes():
            found[storage.data_ptr()] = storage, size
    return list(found.values())


def _write(file: IO[bytes], storage: torch.UntypedStorage, size: int) -> None:
    """Writes a storage; an array over it would keep it from being resized for ever."""
    host = storage.cpu()  # type: ignore[no-untyped-call]
    view = memoryview((ctypes.c_char * size).from_address(host.data_ptr())).cast("B")
    for start in range(0, size, _PIECE):
        file.write(view[start : start + _PIECE])
    file.flush()
    # Written pages would count as this machine's used memory for as long as they are dirty.
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(file: IO[bytes], storage: torch.UntypedStorage, size: int) -> None:
    """Reads a storage back."""
    host = storage if storage.device.type == "cpu" else torch.UntypedStorage(size)  # type: ignore[no-untyped-call]
    view = memoryview((ctypes.c_char * size).from_address(host.data_ptr())).cast("B")
    for start in range(0, size, _PIECE):
        if file.readinto(view[start : start + _PIECE]) != min(_PIECE, size - start):  # type: ignore[attr-defined]
            raise OSError("the file of the offloaded weights ends early")
    if host is not storage:
        storage.copy_(host)
