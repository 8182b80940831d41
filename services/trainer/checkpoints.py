"""Checkpoints: one Hugging Face folder per run and policy version, complete or absent, each run's kept N deep.

They hold weights only: the optimizer is reset at each iteration.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch

from perigee.errors import DataLossError, NotFoundError, PerigeeError
from services.trainer.hf_config import read_json_file
from services.trainer.hf_folder import remove_stale_asides, write_folder

_META = "perigee.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint folders `folder/<run id>/v<version>`; configuration and tokenizer are those of `source`."""

    folder: Path
    source: Path
    keep: int
    max_shard_bytes: int

    def versions(self, run_id: str) -> list[int]:
        """Returns the versions of a run that have a checkpoint, oldest first."""
        if not run_id:
            return []
        matches = [re.fullmatch(r"v(\d+)", path.name) for path in self._run_folder(run_id).glob("v*")]
        return sorted(int(match[1]) for match in matches if match)

    def path_of(self, run_id: str, version: int) -> Path:
        """Returns the folder of a version."""
        return self._run_folder(run_id) / f"v{version:06d}"

    def clean(self) -> None:
        """Removes what a killed process left half-written."""
        for run_folder in self.folder.glob("*"):
            remove_stale_asides(run_folder)

    def write(self, run_id: str, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Writes a version and removes the run's oldest beyond `keep`; returns its bytes.

        Raises ResourceExhaustedError naming the folder when the disk refuses.
        """
        meta = {_META: {"run_id": run_id, "policy_version": version}}
        size = write_folder(self.path_of(run_id, version), self.source, tensors, meta, self.max_shard_bytes)
        for old in self.versions(run_id)[: -self.keep]:
            if old != version:
                shutil.rmtree(self.path_of(run_id, old))
        return size

    def find(self, run_id: str, version: int | None) -> tuple[int, Path]:
        """Returns a version of a run and its folder: the newest when none is named, the base model as version 0.

        Raises NotFoundError when there is no such checkpoint, DataLossError when it is damaged.
        """
        written = self.versions(run_id)
        if version is None:
            version = written[-1] if written else 0
        path = self.path_of(run_id, version)
        if version not in written:
            if version == 0:
                return 0, self.source
            raise NotFoundError(f"{path.parent} holds no checkpoint of version {version}, only {written}")
        try:
            meta = read_json_file(path / _META)
        except PerigeeError as error:
            raise DataLossError(f"checkpoint {path} is damaged: {error.message}") from error
        if meta != {"run_id": run_id, "policy_version": version}:
            raise DataLossError(f"checkpoint {path} says that it is {meta}")
        return version, path

    def _run_folder(self, run_id: str) -> Path:
        # A run id may hold any character; a folder name may not, nor may it begin with a dot.
        return self.folder / re.sub(r"^\.", "%2E", quote(run_id, safe=""))
