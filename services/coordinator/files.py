"""Files of a run's folder: whole or not there, and lines that survive a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from perigee.errors import DataLossError


def write_atomically(path: Path, text: str) -> None:
    """Writes aside, syncs, renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Appends a JSON line and syncs it; what a crash left of a line goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0)
        held = file.read()
        file.truncate(held.rfind(b"\n") + 1)
        file.write(json.dumps(values, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; a last line cut by a crash is left out.

    Raises DataLossError naming any other line that is not JSON.
    """
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8").split("\n")
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts[:-1], start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise DataLossError(f"{path}:{number} is not JSON: {error}") from error
    return lines


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a file of JSON lines atomically."""
    write_atomically(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
