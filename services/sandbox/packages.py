"""Python packages for programs: distributions of the service's own environment, mounted read-only into the root."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES_FOLDER = "/opt/perigee/packages"


def find_packages(names: Iterable[str]) -> tuple[tuple[str, str], ...] | str:
    """Pairs of a host path and where it is mounted, for the distributions and all that they require; a sentence when
    one is not installed.
    """
    mounts: dict[str, str] = {}
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            return f"the Python package {name} is not installed beside the service"
        for path in _top_paths(distribution):
            mounts[str(path)] = f"{PACKAGES_FOLDER}/{path.name}"
        waiting += _requirements(distribution)
    return tuple(sorted(mounts.items()))


def _top_paths(distribution: metadata.Distribution) -> Iterator[Path]:
    """The files and folders that a distribution has directly below site-packages."""
    names = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    for name in sorted(names):
        path = Path(str(distribution.locate_file(name)))
        if not name.endswith(".dist-info") and path.exists():
            yield path


def _requirements(distribution: metadata.Distribution) -> Iterator[str]:
    """The distributions that it needs here, extras aside."""
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name
