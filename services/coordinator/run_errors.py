"""Errors that end a run."""

from __future__ import annotations

from perigee.errors import UnavailableError


class PeerLostError(UnavailableError):
    """A peer stayed away for as long as the configuration allows: the run fails rather than waiting anew."""


def single_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside nested groups: the one that made the others."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
