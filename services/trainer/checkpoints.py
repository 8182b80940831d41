"""Checkpoints of runs: Hugging Face folders on the trainer's disk, published where the run folder is a URL."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import torch

from perigee.errors import DataLossError, InvalidArgumentError, NotFoundError, PerigeeError
from perigee.files import remove_stale_staging, write_atomically
from services.kit import storage
from services.kit.rope import RopeConfig
from services.trainer.config import TrainerConfig
from services.trainer.hf import write_folder

# What a checkpoint says of itself, beside the model's own files; published last, so that one without it does not count.
META_FILE = "perigee.json"
FIELD = "trainer.run_path"


def identify(folder: Path) -> bytes | None:
    """Returns what tells a version's folder from others of its name: None without one, empty for a base model."""
    meta = folder / META_FILE
    return (meta.read_bytes() if meta.is_file() else b"") if folder.is_dir() else None


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints `folder/<run id>/v<version>`, complete or absent, the newest `keep` of each run and the pinned ones.

    They hold weights only, as the optimizer is reset at each iteration; configuration and tokenizer are those of
    `source`. Those below `url` are what others read; `folder` is then this machine's copy.
    """

    folder: Path
    source: Path
    keep: int
    max_shard_bytes: int
    url: str | None = None

    @classmethod
    def of(cls, config: TrainerConfig) -> Self:
        """Returns those of a trainer, whose model is a local folder by now."""
        place, url = storage.join(config.run_path, "checkpoints"), None
        folder = Path(place)
        if storage.is_url(place):
            url, folder = place, storage.cache_folder() / f"checkpoints-{sha256(place.encode()).hexdigest()[:16]}"
        return cls(folder, Path(config.model), config.keep_checkpoints, config.max_shard_bytes, url)

    def versions(self, run_id: str) -> list[int]:
        """Returns the versions of a run that have a checkpoint, here or published, oldest first."""
        return sorted({*self._local_versions(run_id), *self._published_versions(run_id)}) if run_id else []

    def path_of(self, run_id: str, version: int) -> Path:
        """Returns the folder of a version on this machine."""
        return self.folder / run_name(run_id) / f"v{version:06d}"

    def name_of(self, run_id: str, version: int) -> str:
        """Returns the name of a version for others: its URL, or its folder."""
        path = self.path_of(run_id, version)
        return storage.join(self.url, *path.parts[-2:]) if self.url else str(path)

    def clean(self) -> None:
        """Removes what a killed process left half-written."""
        for run_folder in self.folder.glob("*"):
            remove_stale_staging(run_folder)

    def write(
        self,
        run_id: str,
        version: int,
        tensors: Iterable[tuple[str, torch.Tensor]],
        pinned: bool = False,
        rope: RopeConfig | None = None,
    ) -> int:
        """Writes a version on this machine and removes the run's oldest beyond `keep`; returns its bytes.

        Its config.json says `rope` where the version was trained with another rotary embedding than that of `source`.
        Raises ResourceExhaustedError naming the folder when the disk refuses.
        """
        meta = {META_FILE: {"run_id": run_id, "policy_version": version, "id": uuid.uuid4().hex, "pinned": pinned}}
        target = str(self.path_of(run_id, version))
        size = write_folder(target, self.source, tensors, meta, self.max_shard_bytes, rope)
        for old in self._local_versions(run_id)[: -self.keep]:
            if old != version and not (self._local_meta(run_id, old) or {}).get("pinned"):
                shutil.rmtree(self.path_of(run_id, old))
        return size

    def pin(self, run_id: str, version: int) -> int:
        """Keeps a version that is on this machine however many newer ones there are; returns its bytes."""
        path = self.path_of(run_id, version)
        meta = {**(self._local_meta(run_id, version) or {}), "pinned": True}
        write_atomically(path / META_FILE, f"{json.dumps(meta, indent=2)}\n".encode())
        return sum(file.stat().st_size for file in path.iterdir())

    def publish(self, run_id: str, version: int) -> str:
        """Publishes a version, and what this machine alone has of a run, its pins too; removes those beyond `keep`.

        Returns why it failed, empty when it did not: the copies on this machine are tried again after the next save.
        """
        if self.url is None:
            return ""
        try:
            here, published = {*self._local_versions(run_id)}, {*self._published_versions(run_id)}
            unpinned = {each for each in here & published if self._lacks_pin(run_id, each)}
            for each in sorted((here - published) | unpinned | {version}):
                path, name = self.path_of(run_id, each), self.name_of(run_id, each)
                if self._is_published(run_id, each):
                    storage.publish_file(path / META_FILE, storage.join(name, META_FILE), FIELD)
                else:
                    storage.publish_folder(path, name, FIELD, META_FILE)
            for old in self._published_versions(run_id)[: -self.keep]:
                if not (self._published_meta(run_id, old) or {}).get("pinned"):
                    storage.remove_folder(self.name_of(run_id, old), FIELD, META_FILE)
        except PerigeeError as error:
            return error.message
        return ""

    def find(self, run_id: str, version: int | None) -> int:
        """Returns a version that `fetch` can read: the newest when none is named, the base model as version 0.

        Raises NotFoundError when there is no such checkpoint.
        """
        known = self.versions(run_id)
        if version is None:
            return known[-1] if known else 0
        if version not in known and version != 0:
            place = storage.join(self.url or str(self.folder), run_name(run_id))
            raise NotFoundError(f"{place} holds no checkpoint of version {version}, only {known}")
        return version

    def fetch(self, run_id: str, version: int) -> Path:
        """Returns the folder of a version on this machine, that of the base model for a version 0 without checkpoint.

        A published one is downloaded unless it is here. Raises DataLossError when it is damaged.
        """
        path = self.path_of(run_id, version)
        published = self._published_meta(run_id, version)
        if published is not None:
            with storage.only_process(path):
                if published != self._local_meta(run_id, version) and not self._lacks_pin(run_id, version):
                    storage.download_folder(self.name_of(run_id, version), FIELD, path)
        if version == 0 and not path.is_dir():
            return self.source
        meta = self._local_meta(run_id, version)
        if meta is None or (meta.get("run_id"), meta.get("policy_version")) != (run_id, version):
            raise DataLossError(f"checkpoint {path} is damaged or missing: its {META_FILE} says {meta}")
        return path

    def _local_versions(self, run_id: str) -> list[int]:
        matches = [re.fullmatch(r"v(\d+)", path.name) for path in (self.folder / run_name(run_id)).glob("v*")]
        return sorted(int(match[1]) for match in matches if match)

    def _published_versions(self, run_id: str) -> list[int]:
        if self.url is None:
            return []
        names = storage.list_files(storage.join(self.url, run_name(run_id)), FIELD)
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(rf"v(\d+)/{META_FILE}", name)))

    def _is_published(self, run_id: str, version: int) -> bool:
        """Returns whether the weights that are published are those on this machine."""
        published, here = self._published_meta(run_id, version), self._local_meta(run_id, version)
        return published is not None and here is not None and published.get("id") == here.get("id")

    def _lacks_pin(self, run_id: str, version: int) -> bool:
        """Returns whether a version was pinned on this machine, and what is published of it does not say so."""
        if not (self._local_meta(run_id, version) or {}).get("pinned") or not self._is_published(run_id, version):
            return False
        return not (self._published_meta(run_id, version) or {}).get("pinned")

    def _local_meta(self, run_id: str, version: int) -> Mapping[str, Any] | None:
        path = self.path_of(run_id, version) / META_FILE
        return _parse_meta(str(path), path.read_bytes()) if path.is_file() else None

    def _published_meta(self, run_id: str, version: int) -> Mapping[str, Any] | None:
        if self.url is None:
            return None
        name = storage.join(self.name_of(run_id, version), META_FILE)
        content = storage.read_file(name, FIELD)
        return None if content is None else _parse_meta(name, content)


def run_name(run_id: str) -> str:
    """Returns the folder name of a run: its id may hold any character, a name may not, nor may it begin with a dot."""
    if not run_id:
        raise InvalidArgumentError.for_field("run_id", "is empty")
    return re.sub(r"^\.", "%2E", quote(run_id, safe=""))


def _parse_meta(name: str, content: bytes) -> Mapping[str, Any]:
    try:
        meta = json.loads(content)
    except ValueError as error:
        raise DataLossError(f"{name} is damaged: {error}") from error
    if not isinstance(meta, dict):
        raise DataLossError(f"{name} is damaged: it holds {meta!r}")
    return meta
