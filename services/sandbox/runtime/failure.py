"""Failures that are not the program's."""

from __future__ import annotations

from perigee.errors import FailedPreconditionError, UnavailableError


class SandboxFailedError(UnavailableError):
    """Failure of the sandbox and not of the program: the job may be tried again."""


class UnjudgeableError(FailedPreconditionError):
    """Fault of a problem's own tests, checker or interactor: trying again does not help."""
