"""The Megatron side of the trainer: one engine per rank, all of its work in one thread, driven by rank 0's commands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from perigee.errors import InvalidArgumentError, PerigeeError, UnavailableError
from services.trainer.commands import CollectCommand, Command, FineTuneCommand, LoadCommand, StopCommand, TrainCommand
from services.trainer.config import TrainerConfig
from services.trainer.cpu_shim import megatron_on_cpu
from services.trainer.fine_tune import fine_tune
from services.trainer.hf_config import DTYPES, read_model_shape
from services.trainer.jobs import JobContext
from services.trainer.parallel import join, leave
from services.trainer.policy import Policy
from services.trainer.train_iteration import train_iteration

# Takes the gathered weights on rank 0; has to run the iterable to its end.
Sink = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]


class Engine:
    """The policy of this rank and the control channel. Every method runs in the thread that made the engine."""

    def __init__(self, config: TrainerConfig) -> None:
        self.broken = False
        with ExitStack() as stack:
            torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // config.world))
            stack.enter_context(megatron_on_cpu())
            folder = Path(config.model)
            self.shape = read_model_shape(folder)
            self.max_tokens = resolve_max_tokens(config, self.shape.max_positions)
            self.layout, self.control = join(
                config.tensor_parallel, config.pipeline_parallel, config.data_parallel, config.seed
            )
            stack.callback(leave)
            dtype = DTYPES[config.dtype]
            self.policy = Policy(self.shape, self.layout, dtype, self.max_tokens, config.recompute)
            self._load(folder)
            self.parameters = self._count_parameters()
            self._stack = stack.pop_all()

    def run(self, command: Command, context: JobContext | None = None, sink: Sink | None = None) -> Any:
        """Rank 0: has all ranks carry out the command, and returns its result.

        A job that fails leaves the weights as they were. Raises UnavailableError, and sets `broken`, when the ranks are
        no longer in step: another one died, or this one failed between collectives.
        """
        try:
            self.control.broadcast(command)
            return self._execute(command, context or JobContext(), sink)
        except PerigeeError:
            # Raised by every rank alike, or by rank 0 after the last collective.
            raise
        except Exception as error:
            if self.layout.world == 1:
                raise
            self.broken = True
            raise UnavailableError(f"the trainer's processes lost each other and are ending: {error}") from error

    def follow(self) -> None:
        """Other ranks: carries out rank 0's commands until it says stop."""
        while True:
            command = self.control.broadcast(None)
            if isinstance(command, StopCommand):
                return
            try:
                self._execute(command, JobContext(), None)
            except PerigeeError:
                # Rank 0 meets the same error and tells the caller.
                continue

    def close(self) -> None:
        """Leaves the process group and the thread's mode."""
        self._stack.close()

    def _execute(self, command: Command, context: JobContext, sink: Sink | None) -> Any:
        if isinstance(command, FineTuneCommand):
            return self._or_restore(
                lambda: fine_tune(self.policy, self.control, command.examples, command.settings, context)
            )
        if isinstance(command, TrainCommand):
            return self._or_restore(
                lambda: train_iteration(
                    self.policy,
                    self.control,
                    command.groups,
                    command.base_version,
                    command.settings,
                    command.seed,
                    context,
                )
            )
        if isinstance(command, LoadCommand):
            return self._or_restore(lambda: self._load(command.folder))
        if isinstance(command, CollectCommand):
            tensors = self.policy.collect()
            if sink is not None:
                return sink(tensors)
            for _ in tensors:
                pass
        return None

    def _or_restore(self, job: Callable[[], Any]) -> Any:
        snapshot = self.policy.take_snapshot()
        try:
            return job()
        except BaseException:
            self.policy.restore_snapshot(snapshot)
            raise

    def _load(self, folder: Path) -> None:
        """Loads on every rank or raises on every rank: each reads its own tensors, and one may be damaged."""
        problem = None
        try:
            self.policy.load(folder)
        except PerigeeError as error:
            problem = error.message
        problems = [text for text in self.control.gather(problem) if text is not None]
        if problems:
            raise InvalidArgumentError(problems[0])

    def _count_parameters(self) -> int:
        return sum(tensor.numel() for _, tensor in self.policy.collect())


def resolve_max_tokens(config: TrainerConfig, max_positions: int) -> int:
    """The longest sequence, from the configuration or the model.

    Raises InvalidArgumentError when the configuration asks for more than the model has positions.
    """
    if config.max_sequence_length is None:
        return max_positions
    if config.max_sequence_length > max_positions:
        raise InvalidArgumentError.of(
            "trainer.max_sequence_length",
            f"{config.max_sequence_length} is more than the model's {max_positions} positions",
        )
    return config.max_sequence_length
