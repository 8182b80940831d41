"""Checkpoints of a training: everything that it takes to go on as if it had never stopped."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from perigee.errors import DataLossError, FailedPreconditionError
from services.reward.value_head.folder import writing_folder
from services.reward.value_head.network import ValueHead

_STATE = "state.pt"


@dataclass
class Progress:
    """How far a training is: steps done, evaluations in their order, and the step of the best one."""

    step: int = 0
    best_step: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoints:
    """The newest checkpoint under `folder`; `fingerprint` names settings and data, which have to stay the same."""

    folder: Path
    fingerprint: str

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        matches = [re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*")]
        return sorted(int(match[1]) for match in matches if match)

    def write(self, network: ValueHead, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Writes a checkpoint, then removes older ones.

        Raises ResourceExhaustedError naming the folder when the disk refuses.
        """
        state = {
            "fingerprint": self.fingerprint,
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "progress": vars(progress),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with writing_folder(self._path(progress.step)) as aside:
            torch.save(state, aside / _STATE)
        for step in self.steps():
            if step != progress.step:
                shutil.rmtree(self._path(step))

    def restore(self, network: ValueHead, optimizer: torch.optim.Optimizer) -> Progress:
        """Puts the newest checkpoint back; the beginning when there is none.

        Raises FailedPreconditionError when it is another training's, DataLossError when it cannot be read.
        """
        if not self.steps():
            return Progress()
        path = self._path(self.steps()[-1]) / _STATE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises what its unpickler and its archive reader raise
            raise DataLossError(f"checkpoint {path} is damaged: {error}") from error
        if state["fingerprint"] != self.fingerprint:
            raise FailedPreconditionError(
                f"{path.parent} was written with other settings or data; name another folder with --out, or train "
                "with the same ones"
            )
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available() and state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        return Progress(**state["progress"])

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"
