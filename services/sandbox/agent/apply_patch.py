"""Program that applies patches to the folder `repository` beside it, in a sandbox where nothing of the repository runs.

Standard input has patches (base64) and patterns of protected files, standard output what failed. The submission's patch
is applied to the repository as its author saw it, without the test patch. What it does to protected files, those that
the test patch touches among them, is undone.
"""

from __future__ import annotations

import base64
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT, BASE, TESTED = "repository", "base", "tested"
_COMMANDS = (
    [["git", "apply", "--whitespace=nowarn", "-"]],
    [
        ["patch", "--batch", "--fuzz=5", "--strip=1", "--no-backup-if-mismatch", "--dry-run"],
        ["patch", "--batch", "--fuzz=5", "--strip=1", "--no-backup-if-mismatch"],
    ],
)
# outside of any git repository: the configuration of one names programs that git would run (filters, fsmonitor)
_ENVIRONMENT = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_DIR": "/dev/null"}
_OWN_OF_GIT = re.compile(rb"(?:^|[\s/'\"])\.git(?:[\s/'\"]|$)", re.IGNORECASE)
NO_COMMAND = "neither git nor patch is installed"
File = tuple[bytes, int]
"""Content and mode, or the target of a link and -1."""


def find_files(root: Path) -> Iterator[Path]:
    """Yields all files and links below a folder."""
    for base, folders, names in os.walk(root):
        yield from (Path(base, name) for name in names)
        yield from (path for name in folders if (path := Path(base, name)).is_symlink())


def apply_patch(patch: bytes, root: Path) -> str:
    """Applies a patch as a whole or not at all; returns why it does not apply."""
    if not patch.strip():
        return ""
    reasons = []
    for commands in _COMMANDS:
        if shutil.which(commands[0][0]) is None:
            continue
        for command in commands:
            environment = {**os.environ, **_ENVIRONMENT}
            ended = subprocess.run(command, cwd=root, input=patch, capture_output=True, env=environment, check=False)
            if ended.returncode:
                reasons.append((ended.stderr or ended.stdout).decode(errors="replace").strip())
                break
            if "--dry-run" in command and _OWN_OF_GIT.search(ended.stdout):  # which git refuses, and `patch` does not
                reasons.append("it changes .git, which is git's own")
                break
        else:
            return ""
    return reasons[0] if reasons else NO_COMMAND


def snapshot(root: Path) -> dict[Path, tuple[int, int]]:
    """Returns what tells whether a file was written anew."""
    return {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in find_files(root)}


def save(root: Path, patterns: Sequence[str]) -> dict[str, File]:
    """Returns the protected files and links by path: those of which path or name match a pattern, and what Python would
    import in the place of one.
    """
    stems = [pattern.removesuffix(".py") for pattern in patterns if pattern.endswith(".py")]
    stems += [f"*/{stem}" for stem in stems if "/" not in stem]
    patterns = [*patterns, *(f"{stem}{end}" for stem in stems for end in ("/*", ".*.so", ".so"))]
    paths = {str(path.relative_to(root)): path for path in find_files(root)}
    return {
        name: _read(path)
        for name, path in paths.items()
        if any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns for text in (name, path.name))
    }


def _read(path: Path) -> File:
    if path.is_symlink():
        return os.fsencode(path.readlink()), -1
    return path.read_bytes(), path.stat().st_mode & 0o777


def restore(root: Path, patterns: Sequence[str], saved: dict[str, File]) -> None:
    """Removes protected files that were not there, and writes those that were, through no link."""
    for name in save(root, patterns):
        (root / name).unlink()
    for name, (content, mode) in saved.items():
        path = root / name
        for above in [*reversed(path.relative_to(root).parents)][1:]:
            make_folder(root / above)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if mode < 0:
            path.symlink_to(os.fsdecode(content))
        else:
            path.write_bytes(content)
            path.chmod(mode)


def make_folder(path: Path) -> None:
    """Makes a folder where a patch has put a link or a file, or nothing."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        path.mkdir()


def apply_all(root: Path, test_patch: bytes, patch: bytes, protected: Sequence[str]) -> dict[str, Any]:
    """Applies the submission's patch, and the test patch over it.

    Returns why one does not apply, and what the test patch touched.
    """
    tested, touched = root, list[str]()
    if test_patch.strip():
        tested = root.with_name(TESTED)
        shutil.copytree(root, tested, symlinks=True, copy_function=os.link)  # a patch writes files anew
        before = snapshot(tested)
        if reason := apply_patch(test_patch, tested):
            return {"test_patch": reason}
        after = snapshot(tested)
        changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
        touched = [str(path.relative_to(tested)).replace("[", "[[]") for path in changed]
    saved = save(tested, [*protected, *touched])
    if reason := apply_patch(patch, root):
        return {"patch": reason}
    restore(root, [*protected, *touched], saved)
    return {"touched": touched}


def main() -> None:
    """Applies the patches; where there is a base beside the repository, gives it the base's protected files instead."""
    job = json.load(sys.stdin)
    root, base = Path(ROOT), Path(BASE)
    root.mkdir(exist_ok=True)
    if base.is_dir():
        restore(root, job["protected"], save(base, job["protected"]))
        json.dump({}, sys.stdout)
        return
    test_patch, patch = base64.b64decode(job["test_patch"]), base64.b64decode(job["patch"])
    json.dump(apply_all(root, test_patch, patch, job["protected"]), sys.stdout)


if __name__ == "__main__":
    main()
