"""Context of a run, which all of its parts use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from perigee.buffer.client import BufferClient
from perigee.image_sources import ImageStore
from perigee.reward.client import RewardClient
from perigee.reward.scoring import ScoreJob
from perigee.trainer.client import TrainerClient
from perigee.weights.client import WeightReceiverClient
from services.coordinator.config import CoordinatorConfig
from services.coordinator.directory import Directory
from services.coordinator.prompts import Prompt
from services.coordinator.run_config import RunConfig
from services.coordinator.run_log import RunLog
from services.coordinator.run_status import RunStatus
from services.coordinator.workers import WorkerRegistry


@dataclass(frozen=True)
class Peers:
    """Clients of the services that a run calls."""

    buffer: BufferClient
    trainer: TrainerClient
    reward: RewardClient
    connect_receiver: Callable[[str], WeightReceiverClient] = WeightReceiverClient.connect


@dataclass(frozen=True)
class RunInputs:
    """Request and files of a run, checked and read."""

    run_id: str
    run_path: Path
    # Where the trainer exports the model to; its own choice when empty.
    export_path: str
    config: RunConfig
    tokenizer: Tokenizer
    prompts: Mapping[str, Prompt]
    heldout: Mapping[str, Prompt]
    # Images of all of them, in the run's folder.
    images: ImageStore

    def score_job(self, job_id: str, prompt: Prompt, response: str, left_out_bytes: int = 0) -> ScoreJob:
        """Returns the job of scoring a response, with the question's images where its verifier looks at them.

        One of which `left_out_bytes` are not here, since no message holds it, fails.
        """
        line = prompt.line
        return ScoreJob(job_id, response, line.item, line.judged_images, self.images, left_out_bytes)


@dataclass(frozen=True)
class RunContext:
    """Inputs, peers, workers, status and log of a run."""

    inputs: RunInputs
    settings: CoordinatorConfig
    peers: Peers
    registry: WorkerRegistry
    directory: Directory
    status: RunStatus
    log: RunLog

    @property
    def run_id(self) -> str:
        """Id of the run, part of every request."""
        return self.inputs.run_id

    @property
    def config(self) -> RunConfig:
        """The recipe's `run` section."""
        return self.inputs.config
