"""The folder of a curation: what it was asked for, what each stage found, and the results."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perigee.errors import InvalidArgumentError
from perigee.files import write_atomically


class CurationFolder:
    """Files of one curation. Going on with it needs the same prompts, settings and policy version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._head_path = path / "curation.json"
        self._head: dict[str, Any] = {}

    def open(self, head: Mapping[str, Any], *, restart: bool) -> bool:
        """Begins a curation, or goes on with the one that is there; True when it goes on.

        Raises InvalidArgumentError when the folder holds something else, or a curation with another head.
        """
        if restart and self._head_path.exists():
            shutil.rmtree(self.path / "stages", ignore_errors=True)
            self._head_path.unlink()
        if not self._head_path.exists():
            if self.path.is_dir() and any(self.path.iterdir()) and not restart:
                raise InvalidArgumentError.of(str(self.path), "holds other files; name an empty folder")
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_head(dict(head))
            return False
        self._head = json.loads(self._head_path.read_text())
        for name, value in head.items():
            self._check(name, value)
        return True

    def pin(self, name: str, value: Any) -> None:
        """Remembers what is known only later; raises InvalidArgumentError when it was something else before."""
        if name in self._head:
            self._check(name, value)
        else:
            self._write_head(self._head | {name: value})

    def stage_path(self, number: int, name: str) -> Path:
        """Where a stage's findings are kept."""
        return self.path / "stages" / f"{number}-{name}.jsonl"

    def _check(self, name: str, value: Any) -> None:
        held = self._head.get(name)
        if held == value:
            return
        if isinstance(held, dict) and isinstance(value, dict):
            name, held, value = next(
                (key, held.get(key), value.get(key)) for key in held | value if held.get(key) != value.get(key)
            )
        raise InvalidArgumentError.of(
            str(self.path),
            f"holds a curation with another {name}: {held!r}, now {value!r}; name another folder, or --restart",
        )

    def _write_head(self, head: dict[str, Any]) -> None:
        self._head = head
        write_atomically(self._head_path, json.dumps(head, indent=2).encode() + b"\n")


def describe_model(path: Path) -> str:
    """Tells models apart by their configuration, tokenizer and the sizes of their weight files."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ("config.json", "tokenizer.json"):
        digest.update((path / name).read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return f"{path.name} ({digest.hexdigest()})"
