"""End of a command: its exit code, one line on standard error that says what to do, and the signals that end it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from perigee.errors import DataLossError, FailedPreconditionError, InvalidArgumentError, PerigeeError

DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def reporting_errors(debug: bool, failure_code: int = 1) -> Iterator[None]:
    """Ends the program with one line on standard error when the block raises.

    The exit code is 2 when the command was called wrongly, `failure_code` when a service failed, and 1 when a state of
    things here is in the way or a package is missing. With `debug` errors show their tracebacks.
    """
    if debug:
        yield
        return
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's own words for a refused connection
    try:
        yield
        return
    except PerigeeError as error:
        print(f"perigee: {error.message}", file=sys.stderr)
        here = isinstance(error, FailedPreconditionError | DataLossError)
        code = 2 if isinstance(error, InvalidArgumentError) else 1 if here else failure_code
    except OSError as error:
        print(f"perigee: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        code = 1
    except ModuleNotFoundError as error:
        print(f"perigee: {missing_package(error)}", file=sys.stderr)
        code = 1
    raise typer.Exit(code)


def missing_package(error: ModuleNotFoundError) -> str:
    """Returns one sentence that says what to install; raises the error again when a module of ours is at fault."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "perigee"):
        raise error
    if package in ("services", "grpc_health"):  # perigee-services brings both
        return "this command needs the services, which are not installed: pip install perigee-services"
    return f"this command needs {package}, which is not installed: pip install 'perigee[cli,curation]' perigee-services"


class Interrupt:
    """Counts the signals that asked the program to end; the first one cancels `task`."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.number: signal.Signals | None = None
        # Called at every signal after the first.
        self.end_at_once: Callable[[], None] = lambda: None
        self._task = task

    def receive(self, number: signal.Signals) -> None:
        """Handles one signal."""
        if self.number is None:
            self.number = number
            self._task.cancel()
        else:
            self.end_at_once()


def run_interruptible(work: Callable[[Interrupt], Coroutine[Any, Any, int]]) -> int:
    """Runs `work` to its end and returns its exit code, or 128 + n when signal n asked it to end."""
    return asyncio.run(_run(work))


async def _run(work: Callable[[Interrupt], Coroutine[Any, Any, int]]) -> int:
    task = asyncio.current_task()
    assert task is not None
    interrupt = Interrupt(task)
    loop = asyncio.get_running_loop()
    # Only the main thread receives signals. A hangup that `nohup` has ignored stays so.
    signals = list(SIGNALS) if threading.current_thread() is threading.main_thread() else []
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signals = [number for number in signals if number != signal.SIGHUP]
    for number in signals:
        loop.add_signal_handler(number, interrupt.receive, number)
    try:
        return await work(interrupt)
    except asyncio.CancelledError:
        if interrupt.number is None:
            raise
        return 128 + interrupt.number
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
