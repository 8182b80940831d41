"""Room for the descriptors of all places: those of their control groups, their boxes, and the files of their jobs."""

from __future__ import annotations

import resource

from perigee.errors import FailedPreconditionError

_OWN = 512
_PER_PLACE = 24


def make_room(places: int, calls: int) -> None:
    """Raises this process's limit of open files as far as the places need, and the calls where it may be; raises
    FailedPreconditionError when it is too low for the places: the service would run, and fail once all are busy.
    """
    needed = _OWN + _PER_PLACE * places
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed + calls
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise FailedPreconditionError(
            f"sandbox.slots and max_sessions need {needed} open files, and the limit is {hard}: raise it (ulimit -n, "
            "LimitNOFILE) or set fewer"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
