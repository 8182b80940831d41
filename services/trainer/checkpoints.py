"""Checkpoints of a run: one Hugging Face folder per policy version, complete or absent, kept N deep.

They hold weights only: the optimizer is reset at each iteration.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from perigee.errors import DataLossError, FailedPreconditionError, NotFoundError, PerigeeError
from services.trainer.hf_config import read_json_file
from services.trainer.hf_folder import remove_stale_asides, write_folder

_META = "perigee.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint folders under `folder`, made from the model in `source` for its configuration and tokenizer."""

    folder: Path
    source: Path
    keep: int
    max_shard_bytes: int

    def versions(self) -> list[int]:
        """Versions that have a checkpoint, oldest first."""
        matches = [re.fullmatch(r"v(\d+)", path.name) for path in self.folder.glob("v*")]
        return sorted(int(match[1]) for match in matches if match)

    def path_of(self, version: int) -> Path:
        """The folder of a version."""
        return self.folder / f"v{version:06d}"

    def clean(self) -> None:
        """Removes what a killed process left half-written."""
        remove_stale_asides(self.folder)

    def write(self, run_id: str, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Writes a version and removes the oldest beyond `keep`; returns its bytes.

        Raises ResourceExhaustedError naming the folder when the disk refuses.
        """
        meta = {_META: {"run_id": run_id, "policy_version": version}}
        size = write_folder(self.path_of(version), self.source, tensors, meta, self.max_shard_bytes)
        for old in self.versions()[: -self.keep]:
            if old != version:
                shutil.rmtree(self.path_of(old))
        return size

    def find(self, run_id: str, version: int | None) -> tuple[int, Path]:
        """The version to restore and its folder: the newest when none is named, the base model as version 0.

        Raises NotFoundError when there is no such checkpoint, FailedPreconditionError when it is another run's.
        """
        held = self.versions()
        if version is None:
            version = held[-1] if held else 0
        if version not in held:
            if version == 0:
                return 0, self.source
            raise NotFoundError(f"{self.folder} holds no checkpoint of version {version}, only {held}")
        path = self.path_of(version)
        try:
            meta = read_json_file(path / _META)
        except PerigeeError as error:
            raise DataLossError(f"checkpoint {path} is damaged: {error.message}") from error
        if meta.get("run_id") != run_id:
            raise FailedPreconditionError(f"checkpoint {path} belongs to run {meta.get('run_id')}, not {run_id}")
        return version, path
