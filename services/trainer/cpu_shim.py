"""Runs megatron-core 0.16.1 on CPU and gloo by retargeting the places where it names CUDA; a no-op where CUDA is there.

The mode is thread-local: the thread that builds, steps or loads a model must be inside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


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


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Scope, for this thread, in which megatron.core may be built, run and stepped without a GPU."""
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.tensor_parallel import random as megatron_random

    patches: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch.cuda, "current_device", lambda: _CPU),
        (torch.cuda, "synchronize", _ignore),
        (torch.cuda, "get_rng_state", lambda *_, **__: torch.get_rng_state()),
        (torch.cuda, "manual_seed", torch.manual_seed),
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
