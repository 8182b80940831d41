"""Slices of a checkpoint that one worker of vLLM's engine takes, found by loading tensors that have no data.

`FakeRDTTensor` and the parts of the layerwise reload are vLLM 0.32's own and no public interface.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module
from vllm.distributed.weight_transfer.sharded_rdt_fake import FakeRDTTensor
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import (
    _get_original_loader,
    _place_kernel_tensors,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

from perigee.weights.v1 import weights_pb2 as pb
from services.weights.pieces import Rectangle, Slices
from services.weights.safetensors import DTYPES


@dataclass(frozen=True)
class TakenSlices:
    """What a worker takes of each tensor, and the layers that hold it; None where a copy went elsewhere."""

    rectangles: Slices
    layers: Mapping[str, AbstractSet[Module | None]]

    def find_reload(self, changed: AbstractSet[str]) -> tuple[AbstractSet[Module | None], Slices]:
        """Returns the layers that change with tensors, and what these need: a layer is loaded as a whole."""
        layers: AbstractSet[Module | None] = set()
        names = changed & self.layers.keys()
        while found := set().union(*(self.layers[name] for name in names)) - layers:
            layers = layers | found
            names = {name for name, holders in self.layers.items() if holders & layers}
        return layers, {name: self.rectangles[name] for name in names}


class SliceRecorder:
    """Sink of fake tensors: records which rectangle of which tensor is copied to which layer, and copies nothing.

    `layers` has the layer of each storage, by its address.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], layers: Mapping[int, Module] | None = None) -> None:
        self.rectangles: dict[str, set[Rectangle]] = defaultdict(set)
        self.layers: dict[str, set[Module | None]] = defaultdict(set)
        self._shapes = shapes
        self._layers = layers or {}

    def accept_copy(self, destination: torch.Tensor, source: Any) -> torch.Tensor:
        """Records a copy; the whole tensor where what is copied is no rectangle of it."""
        name, operations = source._key()
        whole = torch.empty(tuple(self._shapes[name]), dtype=source.dtype, device="meta")
        part: Any = whole
        for operation, arguments, options in operations:
            part = getattr(part, operation)(*arguments, **dict(options))
        self.rectangles[name].add(find_rectangle(whole, part))
        self.layers[name].add(self._layers.get(_storage(destination)))
        return destination


def find_rectangle(whole: torch.Tensor, part: torch.Tensor) -> Rectangle:
    """Returns the rectangle of a tensor that a view of it shows, or all of it when the view is no rectangle."""
    if part.stride() != whole.stride():
        return (0,) * whole.ndim, tuple(whole.shape)
    lower, offset = [], part.storage_offset()
    for stride in whole.stride():
        lower.append(offset // stride)
        offset %= stride
    return tuple(lower), tuple(low + n for low, n in zip(lower, part.shape, strict=True))


@torch.no_grad()
def find_slices(model: Module, tensors: Iterable[pb.TensorSpec]) -> TakenSlices:
    """Returns what the model's loaders copy of each tensor.

    No forward pass may run meanwhile; the model is as before when this returns or raises. Raises NotImplementedError
    when a loader does more than to copy views of a tensor.
    """
    specs = {spec.name: spec for spec in tensors}
    cpu = torch.device("cpu")
    initialize_layerwise_reload(model)
    try:
        layers = {}
        for module in model.modules():
            for tensor in get_layer_tensors(module).values():
                layers[_storage(tensor)] = module
                if hasattr(tensor, "weight_loader"):
                    tensor.weight_loader = _get_original_loader(tensor)
        recorder = SliceRecorder({name: spec.shape for name, spec in specs.items()}, layers)
        load: Any = model.load_weights
        load(
            (name, FakeRDTTensor(name, torch.Size(spec.shape), DTYPES[spec.dtype], cpu, sink=recorder))  # type: ignore[arg-type]
            for name, spec in specs.items()
        )
    finally:
        _put_back(model)
    return TakenSlices({name: sorted(found) for name, found in recorder.rectangles.items()}, dict(recorder.layers))


def start_reload(model: Module, layers: AbstractSet[Module]) -> None:
    """Puts some layers into the state that takes checkpoint tensors, as vLLM does with all.

    Attention comes along: some kinds of it derive weights of their own from those of a layer.
    """
    for layer in layers | {module for module in model.modules() if is_deferred_attention_layer(module)}:
        initialize_layerwise_reload(layer)


def _put_back(model: Module) -> None:
    """Gives every layer the tensors back that the kernels use."""
    for module in model.modules():
        info = get_layerwise_info(module)
        if info.can_load():
            if info.kernel_tensors is not None:
                _place_kernel_tensors(module, info)
            info.reset()  # type: ignore[no-untyped-call]
    model._do_torchao_reload = model._original_do_torchao_reload


def _storage(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
