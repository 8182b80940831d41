"""Shared libraries that the loader does not find for the packages of an environment.

    python tools/missing_libraries.py .venv
    podman run --rm -i localhost/perigee/trainer python - /opt/perigee < tools/missing_libraries.py

Asks the loader about every library below `lib/python3.*` and prints `LIBRARY: needed by FILE`, one a line; exits with 1
when there is one. A library that a package of the environment brings is loaded by that package before it is needed.
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
    loader = next(Path("/").glob("lib*/ld-linux*.so.*"))
    missing = {}
    for path in paths:
        listed = subprocess.run([loader, "--list", path], capture_output=True, text=True, check=False).stdout
        for line in listed.splitlines():
            if line.endswith("=> not found") and (name := line.split()[0]) not in known:
                missing[name] = str(path)
    return missing


if __name__ == "__main__":
    found = find_missing(Path(sys.argv[1]))
    print(*(f"{name}: needed by {file}" for name, file in sorted(found.items())), sep="\n")
    raise SystemExit(bool(found))
