"""Memory of a rank: the copies of the policy that it keeps, and what a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from services.trainer.megatron.optimizer import list_parts


def count_copies(parameters: Iterable[torch.nn.Parameter], optimizer: MegatronOptimizer) -> dict[str, int]:
    """Returns the bytes of this rank's weights, gradients, moments (0 before a job's first step) and main weights.

    Main weights are the float32 copies that the optimizer of a bfloat16 model updates.
    """
    own = list(parameters)
    storages = {_storage(parameter) for parameter in own}
    inner = [part.optimizer for part in list_parts(optimizer)]
    updated = [weight for each in inner for group in each.param_groups for weight in group["params"]]
    states = [state for each in inner for state in each.state.values()]
    return {
        "weights": _bytes(own),
        "gradients": _bytes(parameter.main_grad for parameter in own),  # type: ignore[attr-defined]
        "moments": _bytes(state[name] for state in states for name in ("exp_avg", "exp_avg_sq")),
        "main_weights": _bytes(weight for weight in updated if _storage(weight) not in storages),
    }


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
            return _Saved(tensor, None)
        self._holders[key] += 1
        if self._holders[key] == 1:
            self._bytes += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self._bytes)
        return _Saved(tensor, self)

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


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
