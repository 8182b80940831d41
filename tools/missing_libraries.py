"""Shared libraries that the loader does not find for the packages of an environment.

    python tools/missing_libraries.py .venv
    podman run --rm -i localhost/perigee/trainer python - /opt/perigee < tools/missing_libraries.py

Runs `ldd` over every library below `lib/python3.*` and prints `LIBRARY: needed by FILE`, one a line; exits with 1 when
there is one. A library that a package of the environment brings is loaded by that package before it is needed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Numba takes OpenMP for its threads where this is not there.
OPTIONAL = {"libtbb.so.12"}


def find_missing(environment: Path) -> dict[str, str]:
    """Returns the libraries that neither the system nor the environment has, each with a file that needs it."""
    paths = [path for path in environment.glob("lib/python3.*/**/*.so*") if path.is_file()]
    known = OPTIONAL | {path.name for path in environment.glob("lib/**/*.so*")}
    output = subprocess.run(["ldd", *map(str, paths)], capture_output=True, text=True, check=False).stdout
    missing, file = {}, ""
    for line in output.splitlines():
        if not line.startswith("\t"):
            file = line.rstrip(":")
        elif line.endswith("=> not found") and (name := line.split()[0]) not in known:
            missing[name] = file
    return missing


if __name__ == "__main__":
    found = find_missing(Path(sys.argv[1]))
    print(*(f"{name}: needed by {file}" for name, file in sorted(found.items())), sep="\n")
    raise SystemExit(bool(found))
