"""Leftovers of a service on the machine: control groups, processes and folders, claimed while it runs and removed
after.

A running service holds a lock on each of its folders. A lock ends with its process, however that ends, and holds across
containers, in which process ids mean nothing.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from perigee.errors import InternalError
from services.kit.telemetry import get_logger
from services.sandbox.runtime.cgroups import find_groups, group_folders, remove_group, remove_strays, weigh_instances
from services.sandbox.runtime.isolation import Machine


def claim(folder: Path) -> int:
    """Makes a folder and locks it; the returned descriptor holds the lock until it is closed."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _open(folder)
        except (FileNotFoundError, FileExistsError):  # removed as a leftover before it was locked
            if folder.is_file():
                raise
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(descriptor, folder):
            return descriptor
        os.close(descriptor)


@contextmanager
def held_if_abandoned(folder: Path) -> Iterator[bool]:
    """Yields whether no running service has claimed a folder; if so, none can before the block ends."""
    try:
        descriptor = _open(folder)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield _is_at(descriptor, folder)
    finally:
        os.close(descriptor)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


log = get_logger(__name__)


def clear_leftovers(machine: Machine, state: Path) -> None:
    """Removes the processes, control groups and folders of services that were killed."""
    if machine.root and machine.cgroups is not None:
        _clear(find_groups(machine.cgroups), remove_group)
    _clear(state.glob("*-*/") if state.exists() else [], _remove_folder)


def _clear(folders: Iterable[Path], remove: Callable[[Path], None]) -> None:
    for folder in folders:
        with held_if_abandoned(folder) as abandoned:
            if not abandoned:
                continue
            log.warning("clearing_leftovers", folder=str(folder))
            try:
                remove(folder)
            except InternalError as error:  # its processes are in another container, out of reach
                log.warning("leftovers_not_removed", folder=str(folder), reason=error.message)


@asynccontextmanager
async def own_folders(machine: Machine, state: Path, with_groups: bool) -> AsyncIterator[Path]:
    """Yields the folder of the running service; it and the service's control groups are removed at the end."""
    folder = state / machine.instance
    groups = group_folders(machine.cgroups, machine.instance) if with_groups and machine.cgroups is not None else []
    claims = [claim(each) for each in (folder, *groups)]
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        await asyncio.to_thread(_remove, folder, groups)
        if groups and machine.cgroups is not None:
            weigh_instances(machine.cgroups)
        for descriptor in claims:
            os.close(descriptor)


def _remove(folder: Path, groups: Sequence[Path]) -> None:
    for group in groups:
        remove_group(group)
    _remove_folder(folder)


def _remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    remove_strays(folder.name)
