"""File system and commands of an E2B sandbox, from inside: the source of this module runs in a context of the session.

Functions return what becomes JSON; paths are as E2B's clients write them, relative ones below the working folder.
"""

from __future__ import annotations

import datetime
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

_BASE = Path.cwd()
_HOME = Path("/home/user")


def _inside(path: str) -> Path:
    given = Path(path).expanduser()
    return _BASE / (given.relative_to(_HOME) if given.is_relative_to(_HOME) else given)


def describe(path: Path) -> dict[str, Any]:
    """Returns E2B's entry of a path; raises FileNotFoundError."""
    status = path.lstat()
    changed = datetime.datetime.fromtimestamp(status.st_mtime, datetime.timezone.utc)  # noqa: UP017
    entry = {
        "name": path.name,
        "type": "FILE_TYPE_DIRECTORY" if path.is_dir() else "FILE_TYPE_FILE",
        "path": str(_HOME / path.relative_to(_BASE) if path.is_relative_to(_BASE) else path),
        "size": str(status.st_size),
        "mode": stat.S_IMODE(status.st_mode),
        "permissions": stat.filemode(status.st_mode),
        "owner": "user",
        "group": "user",
        "modifiedTime": changed.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
    }
    return {**entry, "isSymlink": True, "symlinkTarget": str(path.readlink())} if path.is_symlink() else entry


def stat_path(path: str) -> dict[str, Any]:
    """Returns the entry of a path."""
    return {"entry": describe(_inside(path))}


def list_dir(path: str, depth: int = 1) -> dict[str, Any]:
    """Returns the entries of a folder, and of those in it to a depth."""
    entries = []
    for inner in sorted(_inside(path).iterdir()):
        entries.append(describe(inner))
        if depth > 1 and inner.is_dir() and not inner.is_symlink():
            entries += list_dir(str(inner), depth - 1)["entries"]
    return {"entries": entries}


def make_dir(path: str) -> dict[str, Any]:
    """Makes a folder and those above it; raises FileExistsError."""
    _inside(path).mkdir(parents=True)
    return stat_path(path)


def move(source: str, destination: str) -> dict[str, Any]:
    """Renames a file or a folder."""
    _inside(destination).parent.mkdir(parents=True, exist_ok=True)
    _inside(source).rename(_inside(destination))
    return stat_path(destination)


def remove(path: str) -> dict[str, Any]:
    """Removes a file, or a folder with all that is in it."""
    found = _inside(path)
    if found.is_dir() and not found.is_symlink():
        shutil.rmtree(found)
    else:
        found.unlink(missing_ok=True)
    return {}


def run(command: list[str], environment: dict[str, str], folder: str) -> int:
    """Runs a command; returns its exit code, that of a shell where a signal ended it."""
    variables = {**os.environ, **environment}
    code = subprocess.run(command, env=variables, cwd=_inside(folder), stdin=subprocess.DEVNULL).returncode
    return code if code >= 0 else 128 - code
