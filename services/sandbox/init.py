"""The init in front of a container's job: compiled once per service from `box/init.c`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from perigee.errors import FailedPreconditionError

_SOURCE = Path(__file__).parent / "box" / "init.c"
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_S = 60


def find_init_problem(path: str | None) -> str | None:
    """What is missing to have an init; None when nothing."""
    if path is not None:
        return None if os.access(path, os.X_OK) else f"sandbox.init_path: {path} is not an executable"
    return None if _find_compiler() else "install gcc and libc6-dev, or name a compiled init with sandbox.init_path"


def make_init(path: str | None, folder: Path) -> Path:
    """The init's executable, statically linked so that it runs in every image; raises FailedPreconditionError when it
    does not compile.
    """
    if path is not None:
        return Path(path)
    compiler = _find_compiler()
    assert compiler is not None
    target = folder / "init"
    command = [compiler, "-static", "-Os", "-s", "-Wl,-e,begin", "-o", str(target), str(_SOURCE)]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        words = (getattr(error, "stderr", None) or str(error)).strip()
        raise FailedPreconditionError(f"the init of containers does not compile: {words}") from error
    target.chmod(0o755)
    return target


def _find_compiler() -> str | None:
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)
