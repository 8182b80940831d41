"""What rank 0 asks all ranks to do together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.trainer.batches import TokenSequence
from services.trainer.fine_tune import FineTuning
from services.trainer.train_iteration import MirrorDescent
from services.trainer.trajectories import Group


@dataclass(frozen=True)
class FineTuneCommand:
    """Fine-tune on the examples."""

    examples: Sequence[TokenSequence]
    settings: FineTuning


@dataclass(frozen=True)
class TrainCommand:
    """One iteration of policy mirror descent."""

    groups: Sequence[Group]
    base_version: int
    settings: MirrorDescent
    seed: int


@dataclass(frozen=True)
class LoadCommand:
    """Take the weights of a Hugging Face folder."""

    folder: Path


@dataclass(frozen=True)
class CollectCommand:
    """Gather the weights to rank 0, where the caller takes them tensor by tensor."""


@dataclass(frozen=True)
class StopCommand:
    """Leave the loop."""


Command = FineTuneCommand | TrainCommand | LoadCommand | CollectCommand | StopCommand
