"""The Megatron side of the trainer: one engine per rank, in one thread, driven by the commands of rank 0."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from perigee.buffer.client import BufferClient
from perigee.errors import InvalidArgumentError, PerigeeError, UnavailableError
from perigee.trainer.v1 import trainer_pb2 as pb
from perigee.weights.v1.weights_pb2 import Fingerprint
from services.kit.hf import open_model_folder
from services.kit.server import channel_options
from services.kit.telemetry import get_logger
from services.kit.vision import VisionModel, open_vision
from services.trainer.checkpoints import Checkpoints, identify
from services.trainer.config import TrainerConfig
from services.trainer.data import Trajectory, read_trajectories
from services.trainer.fine_tuning import Example, fine_tune, stage_rope
from services.trainer.hf import DTYPES, read_model_shape
from services.trainer.job import JobContext
from services.trainer.machines import MachineWatch, check_hosts, connect_machines, reached_host
from services.trainer.megatron.memory import free_bytes, whole_bytes
from services.trainer.megatron.model import Policy
from services.trainer.megatron.parallel import join_group, leave_group, megatron_on_cpu, open_channels
from services.trainer.megatron.shelf import Shelf
from services.trainer.training import Reader, train_iteration
from services.weights.pieces import Export, PieceStore

log = get_logger(__name__)

RequestT = TypeVar("RequestT", pb.TrainRequest, pb.FineTuneRequest)

# Seconds beyond `server.drain_seconds` that rank 0 has to end in order.
_END_S = 5.0
# Receives the gathered weights on rank 0; has to run the iterable to its end.
Sink = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]


@dataclass(frozen=True)
class FineTuneCommand:
    """Fine-tune on examples with the counts of `count_tokens`; rank 0 has the examples."""

    request: pb.FineTuneRequest
    counts: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class LoadCommand:
    """Load a version of a run, the base model as version 0."""

    run_id: str
    version: int


@dataclass(frozen=True)
class CollectCommand:
    """Gather the weights to rank 0, where a sink receives them tensor by tensor."""


@dataclass(frozen=True)
class ExportCommand:
    """Convert what each rank owns and register it; the result is the exports of all ranks and the fingerprint."""


@dataclass(frozen=True)
class OffloadCommand:
    """Move the weights out of memory; the result is the bytes dropped and shelved by all ranks."""


@dataclass(frozen=True)
class OnloadCommand:
    """Bring the weights back, as every command does that needs them."""


@dataclass(frozen=True)
class StopCommand:
    """Leave the loop."""


# A TrainRequest runs one iteration of reinforcement learning.
Command = (
    FineTuneCommand
    | pb.TrainRequest
    | LoadCommand
    | CollectCommand
    | ExportCommand
    | OffloadCommand
    | OnloadCommand
    | StopCommand
)


class Engine:
    """Policy of this rank and its channels to the others. All methods run in the thread that made the engine.

    `read` fetches trajectories from the buffer for this rank's data-parallel replica.
    """

    saved: Path | None = None
    """Folder that holds the loaded weights; on rank 0, whose caller sets it after a save. None while none does."""
    shelf: Shelf | None = None
    """Where the weights are while they are out of memory."""

    def __init__(self, config: TrainerConfig, read: Reader) -> None:
        self.broken = False
        self._end_s = config.server.drain_seconds + _END_S
        self._snapshot_bytes = 0
        self._offload_path = Path(config.offload_path or tempfile.gettempdir())
        self._read = read
        self._seed = abs(config.seed)
        self.checkpoints = Checkpoints.of(config)
        with ExitStack() as stack:
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", config.world))
            torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // processes))
            stack.enter_context(megatron_on_cpu())
            self._folder = folder = Path(config.model)
            self.shape = read_model_shape(folder)
            self.max_tokens = config.max_sequence_length or self.shape.max_positions
            if self.max_tokens > self.shape.max_positions:
                raise InvalidArgumentError.for_field(
                    "trainer.max_sequence_length",
                    f"{self.max_tokens} is more than the model's {self.shape.max_positions} positions",
                )
            if config.offload_activations and not torch.cuda.is_available():
                raise InvalidArgumentError.for_field(
                    "trainer.offload_activations", "has nothing to free without a GPU: leave it out"
                )
            self.dims = join_group(
                tensor=config.tensor_parallel,
                pipeline=config.pipeline_parallel,
                context=config.context_parallel,
                data=config.data_parallel,
                expert=config.expert_parallel,
                seed=config.seed,
            )
            stack.callback(leave_group)
            layers = self.shape.layers // self.dims.pipeline
            self.everyone, self.replica = open_channels(self.dims)
            self.policy = Policy(
                self.shape,
                self.dims,
                DTYPES[config.dtype],
                self.max_tokens,
                min(config.recompute_layers or layers, layers) if config.recompute else 0,
                config.router_aux_loss_coef,
                config.vision,
                config.offload_activations,
            )
            self._load(lambda: folder)
            self.parameters = sum(tensor.numel() for _, tensor in self.policy.collect())
            self._log_copies()
            self._pieces = self._open_pieces(config, self.dims.rank // processes)
            stack.callback(self._pieces.close)
            self._offloads = config.offload_activations
            self._max_tokens = self._bound_tokens(config.max_microbatch_bytes, processes)
            self._is_bounded = config.max_microbatch_bytes is not None
            if self._is_bounded:
                self._check_longest(config)
                self.max_tokens = min(self.max_tokens, self._max_tokens)
            held_by = torch.device("cpu") if self._offloads else self.dims.device
            # With activations elsewhere the copies of the policy take nothing of their room.
            copies = 0 if self._offloads else sum(self.policy.count_copies().values())
            room = whole_bytes(held_by, processes) - copies
            self._longest = min(self.everyone.gather(int(room / self._token_bytes)))
            # Ranks that fail before this do so together, each with the reason.
            connections = connect_machines(self.everyone, self.dims.rank, self.dims.world, processes)
            self._watch = MachineWatch(connections, config.node_timeout_s, self._end)
            stack.callback(self._watch.close)
            self._stack = stack.pop_all()

    def job_context(self, **caller: Any) -> JobContext:
        """Returns the context of a job: without fields of its own one that reports nothing and is never cancelled."""
        return JobContext(self.everyone, self.replica, **caller)

    def run(
        self,
        command: Command,
        context: JobContext | None = None,
        examples: Sequence[Example] | None = None,
        sink: Sink | None = None,
    ) -> Any:
        """Has all ranks carry out the command, and returns its result; for rank 0.

        A job that fails leaves the weights as they were. Raises UnavailableError, and sets `broken`, when the ranks are
        no longer in step: another one died, or this one failed between collectives.
        """
        try:
            self.everyone.broadcast(command)
            return self._execute(command, context or self.job_context(), examples, sink)
        except PerigeeError:
            # Raised by every rank alike, or by rank 0 after the last collective.
            raise
        except Exception as error:
            if self.dims.world == 1:
                raise
            self.broken = True
            raise UnavailableError(f"the trainer's processes lost each other and are ending: {error}") from error

    def follow(self) -> None:
        """Carries out the commands of rank 0 until it says stop; for the other ranks."""
        while True:
            command = self.everyone.broadcast(None)
            try:
                self._execute(command, self.job_context(), None, None)
            except PerigeeError:
                # Rank 0 raises the same error and answers the caller.
                continue
            if isinstance(command, StopCommand):
                return

    def close(self) -> None:
        """Leaves the process group and the thread's mode."""
        self._stack.close()

    def _execute(
        self, command: Command, context: JobContext, examples: Sequence[Example] | None, sink: Sink | None
    ) -> Any:
        policy = self.policy
        if isinstance(command, StopCommand):
            # Nobody leaves before everybody takes that for no loss.
            self._watch.end()
            return self.everyone.gather(None)
        if isinstance(command, OffloadCommand):
            return self._offload()
        self._onload()
        if isinstance(command, FineTuneCommand):
            tuning = self._bound(command.request)
            with self._rope_of(command.request):
                return self._or_restore(lambda: fine_tune(policy, context, tuning, command.counts, examples))
        if isinstance(command, pb.TrainRequest):
            seed = self._seed + command.iteration
            training = self._bound(command)
            result = self._or_restore(lambda: train_iteration(policy, context, training, seed, self._read))
            copies = self._count_copies()
            result.metrics.update({f"train/{name}_bytes": max(each[name] for each in copies) for name in copies[0]})
            result.metrics["train/activation_bytes_per_token"] = self._token_bytes
            result.metrics["train/max_microbatch_tokens"] = training.update.max_tokens_per_microbatch
            return result
        if isinstance(command, LoadCommand):
            return self._or_restore(lambda: self._load(lambda: self.checkpoints.fetch(command.run_id, command.version)))
        if isinstance(command, CollectCommand):
            tensors = policy.collect()
            if sink is not None:
                return sink(tensors)
            for _ in tensors:
                pass
        if isinstance(command, ExportCommand):
            return self._export()
        return None

    def _open_pieces(self, config: TrainerConfig, machine: int) -> PieceStore:
        """Makes the store of what this rank lends; RDMA that is not there is found on every rank, and now."""
        weights = config.weights.reached_at(reached_host(config.server, machine))
        check_hosts(self.everyone, str(weights.host))
        pieces, problem = PieceStore(weights, self.dims.rank), None
        if weights.transport == "rdma":
            try:
                pieces.open()
            except PerigeeError as error:
                problem = error
        self.everyone.raise_first(problem)
        return pieces

    def _end(self, reason: str) -> None:
        """Ends this process without its main thread, which may wait for a machine that is gone; called in a thread."""
        print(f"trainer: {reason}", file=sys.stderr, flush=True)
        self.broken = True
        if self.dims.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(self._end_s)
        os._exit(1)

    def _export(self) -> tuple[list[Export], Fingerprint]:
        """Exports on every rank or raises on every rank: one may lack memory. Returns what the weights compute, too."""
        problem, export = None, None
        try:
            export = self._pieces.fill(self.policy.slices)
        except PerigeeError as error:
            problem = error
        self.everyone.raise_first(problem)
        found = self.everyone.gather((export, self.policy.fingerprint()))
        return [each for each, _ in found], next(each for _, each in found if each is not None)

    def _offload(self) -> tuple[int, int]:
        """Offloads on every rank or raises on every rank."""
        problem = None
        if self.shelf is None:
            try:
                self.shelf = self.policy.offload(self._offload_path)
            except OSError as error:
                problem = UnavailableError(f"trainer.offload_path: {self._offload_path} takes no weights: {error}")
        try:
            self.everyone.raise_first(problem)
        except PerigeeError:
            self._onload()
            raise
        assert self.shelf is not None
        sizes = self.everyone.gather((self.shelf.dropped, self.shelf.shelved))
        return sum(dropped for dropped, _ in sizes), sum(shelved for _, shelved in sizes)

    def _onload(self) -> None:
        if self.shelf is not None:
            self.shelf.close()
            self.shelf = None

    def _or_restore(self, job: Callable[[], Any]) -> Any:
        """Runs a job, and puts the weights back when it fails: from the folder that holds them, else from a copy."""
        folder: Path | None = self.everyone.broadcast(self.saved)
        # A folder may be on the machine of rank 0 alone, and that of an earlier attempt on another one.
        found = [None] if folder is None else self.everyone.gather(identify(folder))
        on_disk = found[0] is not None and len(set(found)) == 1
        snapshot = [] if on_disk else self.policy.take_snapshot()
        self._snapshot_bytes = sum(tensor.nbytes for tensor in snapshot)
        self.saved = None
        try:
            return job()
        except BaseException as error:
            # Ranks that raise anything else are out of step and end.
            if self.dims.world == 1 or isinstance(error, PerigeeError):
                self._restore(folder if on_disk else None, snapshot)
                self.saved = folder
            raise

    def _restore(self, folder: Path | None, snapshot: Sequence[torch.Tensor]) -> None:
        """Puts the weights back; sets `broken` when the folder that holds them cannot be read any more."""
        if folder is None:
            self.policy.restore_snapshot(snapshot)
            return
        try:
            self._load(lambda: folder)
        except BaseException:
            self.broken = True
            raise

    def _count_copies(self) -> list[dict[str, int]]:
        """Returns the bytes of each copy of the policy, by rank."""
        return self.everyone.gather(self.policy.count_copies() | {"undo_snapshot": self._snapshot_bytes})

    def _log_copies(self) -> None:
        copies = self._count_copies()
        if self.dims.rank == 0:
            for rank, each in enumerate(copies):
                log.info("memory of the policy", rank=rank, **{f"{name}_bytes": size for name, size in each.items()})

    def _bound_tokens(self, limit: int | None, processes: int) -> int:
        """Returns the tokens of a micro-batch whose activations take at most `limit` bytes on every rank."""
        if limit is None and self._offloads:
            limit = free_bytes(torch.device("cpu"), processes) // 2
        if limit is None:
            moments = self.policy.count_copies()["moments"]
            limit = (free_bytes(self.dims.device, processes) - moments) // 2
        token_bytes = self.policy.measure_activations()
        self._token_bytes: float = max(self.everyone.gather(token_bytes))
        tokens: int = min(self.everyone.gather(int(limit / token_bytes)))
        if tokens < 1:
            raise InvalidArgumentError.for_field(
                "trainer.max_microbatch_bytes",
                "leaves no room for the activations of one token on some rank: free memory, use more ranks, or set it",
            )
        if self.dims.rank == 0:
            log.info("micro-batches are bounded by memory", max_tokens=tokens, token_bytes=self._token_bytes)
        return tokens

    def check_examples(self, counts: Sequence[tuple[int, int]]) -> None:
        """Raises InvalidArgumentError for an example, all its responses together, that takes more than it may."""
        longest = max(tokens for tokens, _ in counts)
        if self._is_bounded and longest > self._max_tokens:
            raise InvalidArgumentError.for_field(
                "trainer.max_microbatch_bytes",
                f"holds the activations of {self._max_tokens} tokens, and an example has {longest}: raise it, "
                "or use recompute or more context-parallel processes",
            )

    def _check_longest(self, config: TrainerConfig) -> None:
        """Raises InvalidArgumentError where the longest sequence that is asked for takes more memory than it may."""
        longest = config.max_sequence_length or 0
        if longest > self._max_tokens:
            raise InvalidArgumentError.for_field(
                "trainer.max_sequence_length",
                f"{longest} tokens take {longest * self._token_bytes:,.0f} bytes of activations on a process, and "
                "trainer.max_microbatch_bytes is less: raise it, lower the length, or use recompute or more "
                "context-parallel processes",
            )

    def check_length(self, field: str, tokens: int) -> None:
        """Raises InvalidArgumentError naming the field for a sequence that no job on these processes could train."""
        if tokens > self.max_tokens:
            raise InvalidArgumentError.for_field(
                field,
                f"{tokens} tokens of prompt and response are more than the {self.max_tokens} that the trainer takes",
            )
        # Of a model with images the measure counts every token as one of a picture.
        if tokens > self._longest and self.shape.tower is None:
            raise InvalidArgumentError.for_field(
                field,
                f"{tokens} tokens of prompt and response do not fit in the trainer's processes, whose memory takes the "
                f"activations of {self._longest}: lower it, raise trainer.context_parallel, or set trainer.recompute",
            )

    def _bound(self, request: RequestT) -> RequestT:
        """Returns the request with micro-batches that fit in memory, those of all context-parallel ranks together.

        The caller's stays as it is.
        """
        bounded = type(request)()
        bounded.CopyFrom(request)
        settings = bounded.update if isinstance(bounded, pb.TrainRequest) else bounded
        asked = settings.max_tokens_per_microbatch * self.dims.context
        settings.max_tokens_per_microbatch = min(asked, self._max_tokens)
        return bounded

    @contextmanager
    def _rope_of(self, request: pb.FineTuneRequest) -> Iterator[None]:
        """Gives the policy the rotary embedding of a supervised stage for as long as the block lasts."""
        rope = stage_rope(request)
        if rope is not None:
            self.policy.set_rope(read_model_shape(self._folder, rope))
        try:
            yield
        finally:
            self.policy.set_rope(self.shape)

    def _load(self, find_folder: Callable[[], Path]) -> None:
        """Loads on every rank or raises on every rank: each reads its own tensors, and one may be damaged."""
        problem, folder = None, None
        try:
            folder = find_folder()
            self.policy.load(folder)
        except PerigeeError as error:
            problem = error
        self.everyone.raise_first(problem)
        self.saved = folder


def follow(config: TrainerConfig) -> None:
    """Runs a rank other than 0 until rank 0 says stop, with a channel of its own to the buffer."""

    def read(run_id: str, ids: Sequence[str], tokens: int) -> Mapping[str, Trajectory]:
        return asyncio.run(read_over_own_channel(config, run_id, ids, tokens, vision))

    vision = open_vision(open_model_folder(config.model, "trainer.model"))
    engine = Engine(config, read)
    # torchrun sends it to every rank: rank 0 ends its jobs and then this loop, so that memory is given back.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    engine.follow()
    engine.close()


async def read_over_own_channel(
    config: TrainerConfig, run_id: str, ids: Sequence[str], tokens: int = 0, vision: VisionModel | None = None
) -> Mapping[str, Trajectory]:
    """Reads trajectories over a channel that lasts as long as the call."""
    async with BufferClient(config.buffer_address, channel_options(config)) as buffer:
        return await read_trajectories(buffer, run_id, ids, config.buffer_timeout_s, vision, tokens)
