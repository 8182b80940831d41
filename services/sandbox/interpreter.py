"""Finds the Python that runs in boxes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache

from perigee.errors import FailedPreconditionError

_PROBE = "import platform, sys; print(platform.python_version()); print(sys.base_prefix)"
_PROBE_S = 30
_PROBE_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}  # chroot is among the commands of administrators
_OLDEST = (3, 9)


@dataclass(frozen=True)
class Python:
    """An interpreter: its path inside the box, its version, and the folder that it needs there."""

    path: str
    version: str
    prefix: str

    @property
    def minor_version(self) -> tuple[int, int]:
        """Major and minor."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


@lru_cache(maxsize=64)
def find_python(image: str, path: str | None) -> Python:
    """The interpreter at `path`; without one, Debian's where its packages are interchangeable with the service's, else
    the one under the service's own. In an image, its own. Raises FailedPreconditionError when it does not start.
    """
    if path is not None:
        return probe_python(image, path)
    if image:
        return probe_python(image, "/usr/bin/python3")
    own = getattr(sys, "_base_executable", sys.executable)
    if os.access("/usr/bin/python3", os.X_OK):
        debian = probe_python("", "/usr/bin/python3")
        if debian.minor_version == sys.version_info[:2]:
            return debian
    return probe_python("", own)


def probe_python(image: str, path: str) -> Python:
    """Asks an interpreter for its version and prefix; one in an image is asked inside it, which needs root."""
    command = [path, "-I", "-c", _PROBE]
    if image:
        command = ["chroot", image, *command]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_S, check=True, env=_PROBE_ENVIRONMENT
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise FailedPreconditionError(
            f"sandbox.python_path: {path} does not run ({error}); name a Python 3.9 or later"
        ) from error
    version, prefix = result.stdout.split("\n")[:2]
    python = Python(path, version, prefix)
    if python.minor_version < _OLDEST:
        raise FailedPreconditionError(f"sandbox.python_path: {path} is Python {version}; name a Python 3.9 or later")
    return python
