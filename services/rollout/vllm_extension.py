"""Extension of vLLM's engine process: it loads weights from shared memory, and gives memory back.

vLLM imports this module in the engine's process because `WorkerExtension` is named as the worker's extension class.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import dummy_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCoreProc

from perigee.weights.v1 import weights_pb2 as pb
from services.rollout.held_outputs import hold_outputs
from services.rollout.step_seconds import count_step_seconds
from services.rollout.vllm_experts import record_experts
from services.rollout.vllm_slices import TakenSlices, find_slices, start_reload
from services.weights.pieces import Slices, digest_tensors, read_pieces
from services.weights.safetensors import read_tensors

BACKEND = "perigee-shm"
# Of an engine that has got no weights yet.
INITIAL_WEIGHT = 1e-3


class WorkerExtension:
    """Methods of a worker: what it takes of pulled tensors, and its memory on a CPU; vLLM sleeps on GPUs alone."""

    model_runner: Any
    # Tensors without memory, with the bytes that they had, by vLLM's tag.
    _freed: dict[str, list[tuple[torch.Tensor, int]]]

    def free_memory(self) -> None:
        """Frees parameters, the packed copies that the kernels use, and the KV cache, of an engine that is paused.

        Buffers stay: no checkpoint has them.
        """
        model = self.model_runner.model
        for module in model.modules():
            if hasattr(module, "cpu_linear"):
                # The packed copy lives in this closure; the next reload makes another.
                module.cpu_linear = None
        forget_packed_experts(model.modules())
        self._freed = {"weights": _free(model.parameters()), "kv_cache": _free(_flatten(self.model_runner.kv_caches))}
        ctypes.CDLL(None).malloc_trim(0)

    def take_memory(self, tag: str) -> None:
        """Gives `weights` memory with arbitrary content, or the `kv_cache` memory that is zeroed."""
        for tensor, size in self._freed[tag]:
            storage = tensor.untyped_storage()
            storage.resize_(size)
            if tag == "kv_cache":
                # The tensor may be one layer's part of it.
                storage.fill_(0)  # type: ignore[attr-defined]

    def find_slices(self, manifest: bytes) -> Slices | str:
        """Learns and returns which parts of the manifest's tensors this worker takes; why it takes all where it does.

        Loaders that do arithmetic with a tensor get all of it.
        """
        worker: Any = self
        engine: ImageTransferEngine = worker.weight_transfer_engine
        engine.taken = None
        try:
            with set_current_vllm_config(worker.vllm_config):
                engine.taken = find_slices(engine.model, pb.Manifest.FromString(manifest).tensors)
        except NotImplementedError as error:
            return str(error)
        return engine.taken.rectangles


def _free(tensors: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
    """Frees the storages of tensors; returns one tensor of each, with its bytes."""
    freed = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if size := storage.nbytes():
            storage.resize_(0)
            freed.append((tensor, size))
    return freed


def _flatten(tensors: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of nested lists."""
    if isinstance(tensors, torch.Tensor):
        yield tensors
    else:
        for each in tensors:
            yield from _flatten(each)


@dataclass
class ImageInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class ImageUpdate(WeightTransferUpdateInfo):
    """File in shared memory that holds an image, and the image's manifest as bytes."""

    path: str = ""
    manifest: bytes = b""
    everything: bool = True
    """Whether tensors are loaded, too, that the worker has loaded before and that are the same."""


class ImageTransferEngine(WeightTransferEngine[ImageInit, ImageUpdate]):
    """Reloads the model in place, layer by layer, from an image of a whole checkpoint."""

    init_info_cls = ImageInit
    update_info_cls = ImageUpdate
    taken: TakenSlices | None = None
    """What this worker takes of each tensor; all of it when None."""
    loaded: Mapping[str, bytes] = {}
    """Checksums of the tensors that the layers hold, as far as they are known."""

    def init_transfer_engine(self, init_info: ImageInit) -> None:
        """Unlinks the memory that tensor-parallel processes on a CPU share, which is freed then however they end."""
        if identity := os.environ.get("VLLM_DIST_IDENT"):
            for path in Path("/dev/shm").glob(f"{identity}-*"):
                path.unlink(missing_ok=True)

    def start_weight_update(self) -> None:
        """Does nothing yet: the image says which layers are to be loaded."""

    def receive_weights(self, update_info: ImageUpdate) -> None:
        """Loads the layers whose tensors have changed, in one pass: parts of a fused weight must not come in two."""
        manifest = pb.Manifest.FromString(update_info.manifest)
        checksums = digest_tensors(manifest)
        roots, wanted = self._find_reload({} if update_info.everything else self.loaded, checksums)
        layers = {layer for root in roots for layer in root.modules()}
        # Until the end nobody knows what the layers hold.
        self.loaded = {}
        if current_platform.is_cpu():
            forget_packed_experts(layers)
        start_reload(self.model, roots)
        with open(update_info.path, "rb") as file:
            image = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        # The layers keep views of the image until they are processed, so it is unmapped with the last of them.
        model: Any = self.model
        model.load_weights(_tensors(image, manifest, wanted))
        finalize_layerwise_reload(model, self.model_config)  # type: ignore[no-untyped-call]
        repack_tied_heads(model.modules(), layers)
        self.loaded = checksums

    def _find_reload(
        self, loaded: Mapping[str, bytes], checksums: Mapping[str, bytes]
    ) -> tuple[AbstractSet[Module], Slices | None]:
        """Returns the layers to load, the whole model where it is not known which, and what they take of tensors."""
        if self.taken is None:
            return {self.model}, None
        changed = {name for name, checksum in checksums.items() if loaded.get(name) != checksum}
        layers, wanted = self.taken.find_reload(changed)
        known = {layer for layer in layers if layer is not None}
        if not loaded or not checksums or len(known) < len(layers):
            return {self.model}, self.taken.rectangles
        return known, wanted

    def finish_weight_update(self) -> None:
        """Has nothing left to do."""

    def shutdown(self) -> None:
        """Nothing to release."""


def forget_packed_experts(layers: Iterable[Module]) -> None:
    """Has the load that follows pack a mixture's experts, which vLLM on a CPU does with the first load alone.

    A reload would put unpacked weights in their place, without an error, with logprobs off by several nats.
    """
    for layer in layers:
        quant_method: Any = getattr(layer, "quant_method", None)
        if getattr(quant_method, "moe_kernel", None) is not None:
            quant_method.moe_kernel = None


def repack_tied_heads(modules: Iterable[Module], loaded: AbstractSet[Module]) -> None:
    """Packs an output layer again when it shares its weight with an embedding that was loaded.

    The CPU kernel keeps a packed copy of the output layer that the reload of a tied model does not refresh: the old
    head would stay in use without an error, with logprobs off by several nats.
    """
    embeddings: list[Any] = [
        each for each in loaded if isinstance(each, VocabParallelEmbedding) and not isinstance(each, ParallelLMHead)
    ]
    shared = {embedding.weight.data_ptr() for embedding in embeddings}
    heads: list[Any] = [each for each in modules if isinstance(each, ParallelLMHead)]
    for head in heads:
        if head.weight.data_ptr() in shared:
            head.quant_method.process_weights_after_loading(head)


def restore_seeds_of_split_prefills(runner: Any) -> None:
    """Lets seeded requests pass prefills that are split over steps, on the class of a CPU's model runner.

    A step draws a token for every sequence and drops those of unfinished prefills. vLLM then turns the generator of a
    dropped draw back by an offset, which generators on a CPU do not have: the step fails, and the engine with it. Here
    the state from before the draw is put back, so that a seed gives the same tokens however its prefill is split.
    """
    sample, keep_books = runner._sample, runner._bookkeeping_sync

    def sample_and_restore(self: Any, *arguments: Any, **options: Any) -> Any:
        batch = self.input_batch
        dropped = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        generators = [batch.generators[index] for index in dropped if index in batch.generators]
        states = [generator.get_state() for generator in generators]
        output = sample(self, *arguments, **options)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        return output

    def keep_books_without_generators(self: Any, *arguments: Any, **options: Any) -> Any:
        generators, self.input_batch.generators = self.input_batch.generators, {}
        try:
            return keep_books(self, *arguments, **options)
        finally:
            self.input_batch.generators = generators

    runner._sample, runner._bookkeeping_sync = sample_and_restore, keep_books_without_generators


def begin_with_one_value(loader: Any) -> None:
    """Has vLLM's loader of meaningless weights write one value instead of drawing billions, on the loader's module."""
    draw = loader.initialize_single_dummy_weight

    @torch.no_grad()
    def fill(parameter: torch.Tensor) -> None:
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
            parameter.fill_(getattr(parameter, "dummy_weight_value", INITIAL_WEIGHT))
        else:
            draw(parameter)

    loader.initialize_single_dummy_weight = fill


def _tensors(image: memoryview, manifest: pb.Manifest, wanted: Slices | None) -> Iterator[tuple[str, torch.Tensor]]:
    for shard in manifest.shards:
        yield from read_tensors(image[shard.offset : shard.offset + shard.bytes])
    yield from read_pieces(image, manifest, wanted)


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, ImageTransferEngine)
    hold_outputs(EngineCoreProc, Scheduler)
    count_step_seconds(EngineCoreProc, Scheduler)
    begin_with_one_value(dummy_loader)
    if current_platform.is_cpu():
        from vllm.v1.executor import multiproc_executor
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        # Tensor-parallel processes of an engine that are not forked import vLLM once more, each.
        multiproc_executor.get_mp_context = partial(multiprocessing.get_context, "fork")  # type: ignore[attr-defined]
        restore_seeds_of_split_prefills(CPUModelRunner)
        record_experts(CPUModelRunner, VllmConfig)
