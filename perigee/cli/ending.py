"""How a command ends: its exit code, or one line on standard error that says what to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

from perigee.errors import DataLossError, FailedPreconditionError, InvalidArgumentError, PerigeeError


def end(command: Callable[[], int], debug: bool, failure_code: int = 1) -> None:
    """Runs a command and ends the program: 2 when it was called wrongly, `failure_code` when a service failed, 1 when
    a state of things here is in the way.

    With `debug` errors show their tracebacks.
    """
    if debug:
        raise typer.Exit(command())
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a refused connection is told in our words
    try:
        code = command()
    except PerigeeError as error:
        print(f"perigee: {error.message}", file=sys.stderr)
        here = isinstance(error, FailedPreconditionError | DataLossError)
        code = 2 if isinstance(error, InvalidArgumentError) else 1 if here else failure_code
    except OSError as error:
        print(f"perigee: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        code = 1
    raise typer.Exit(code)
