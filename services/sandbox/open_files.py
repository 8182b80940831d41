"""Room for the descriptors of all places: those of their control groups, their boxes, and the files of their jobs."""

from __future__ import annotations

import resource

from perigee.errors import FailedPreconditionError

_OWN = 512
_PER_PLACE = 24


def make_room(places: int) -> None:
    """Raises this process's limit of open files as far as the places need; raises FailedPreconditionError when it may
    not be raised so far: the service would run, and fail once all its places are busy.
    """
    needed = _OWN + _PER_PLACE * places
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise FailedPreconditionError(
            f"sandbox.slots and max_sessions need {needed} open files, and the limit is {hard}: raise it (ulimit -n, "
            "LimitNOFILE) or set fewer"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
