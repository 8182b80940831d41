"""The users as which programs run: numbers without names, which belong to nobody else."""

from __future__ import annotations

import secrets
from pathlib import Path

_RANGE = 4096
_FIRST, _END = 1 << 20, 1 << 31
_FIRST_MAPPED = 60001
_ALL_USERS = 2**32 - 1


def choose_first_uid(uid_map: str | None = None) -> int:
    """The first of a range of users, given /proc/self/uid_map.

    The kernel counts the processes of a user over the whole machine: services beside each other must not share one, or
    a program of the one meets its limit of processes because of the other's. So the range is one of half a million, by
    chance. A user namespace that has only some of the numbers counts for itself.
    """
    text = Path("/proc/self/uid_map").read_text() if uid_map is None else uid_map
    lengths = [int(line.split()[2]) for line in text.splitlines()]
    if lengths != [_ALL_USERS]:
        return _FIRST_MAPPED
    return _FIRST + _RANGE * secrets.randbelow((_END - _FIRST) // _RANGE)
