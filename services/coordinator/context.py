"""What every part of a run works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perigee.buffer.client import BufferClient
from perigee.reward.client import RewardClient
from perigee.trainer.client import TrainerClient
from services.coordinator.config import CoordinatorConfig
from services.coordinator.prompts import ModelFolder, PromptSet
from services.coordinator.records import Records
from services.coordinator.run_config import RunConfig
from services.coordinator.snapshot import StatusBoard
from services.coordinator.workers import WorkerRegistry


@dataclass(frozen=True)
class Peers:
    """Clients of the services that a run needs."""

    buffer: BufferClient
    trainer: TrainerClient
    reward: RewardClient


@dataclass(frozen=True)
class RunInputs:
    """What a run was asked to do, checked and read."""

    run_id: str
    run_path: Path
    config: RunConfig
    model: ModelFolder
    prompts: PromptSet
    heldout: PromptSet


@dataclass(frozen=True)
class RunContext:
    """A run's inputs, peers, and where it shows and records what it does."""

    inputs: RunInputs
    settings: CoordinatorConfig
    peers: Peers
    registry: WorkerRegistry
    board: StatusBoard
    records: Records

    @property
    def run_id(self) -> str:
        """The run's id, part of every request."""
        return self.inputs.run_id

    @property
    def config(self) -> RunConfig:
        """The recipe's run section."""
        return self.inputs.config
