"""Guard process above each service of the local stack: when it ends, nothing of the service is left.

    python guard.py PARENT_PID GRACE_SECONDS LOG_FILE COMMAND...

The guard is the subreaper of everything that the service starts (engine processes, the Redis server, torchrun's
ranks), so none of them can escape to init. It ends the service, and then whatever is left of it, when the service dies,
on SIGTERM, and when its own parent dies in any way, SIGKILL included. It needs the standard library alone and imports
nothing of Perigee, so it starts in milliseconds. Linux only: it uses prctl.

Exit code: the service's, or 128 + the signal that ended it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# A service that got SIGTERM has this long before SIGKILL, and the guard itself this much longer.
GRACE_S = 40.0
GUARD_MARGIN_S = 6.0
# What is left of a service after its main process gets this long between SIGTERM and SIGKILL.
REMAINS_GRACE_S = 3.0
WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def launcher(log_path: Path) -> list[str]:
    """Returns the command line to put before a command that is to run below a guard of this process."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(GRACE_S), str(log_path)]


def main(arguments: list[str]) -> int:
    """Runs the command to its end and returns its exit code."""
    parent_pid, grace_s, log_path, command = int(arguments[0]), float(arguments[1]), arguments[2], arguments[3:]
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent_pid:  # the parent died before prctl took effect
        return 128 + signal.SIGTERM
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    guard_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard_pid:
            os._exit(128 + signal.SIGTERM)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"OSError: {command[0]} cannot be started: {error}\n".encode())
            os._exit(127)
    code, was_killed = wait_for(pid, grace_s)
    if was_killed:
        os.write(log, f"guard: still running {grace_s:g} s after SIGTERM; killed\n".encode())
    end_remains()
    return code


def wait_for(pid: int, grace_s: float) -> tuple[int, bool]:
    """Waits for the service; a signal to the guard becomes SIGTERM to the service, and SIGKILL `grace_s` later.

    Returns the exit code, and whether the service had to be killed.
    """
    deadline: float | None = None
    was_killed = False
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            kill(pid, signal.SIGKILL)
            deadline, was_killed = None, True
            continue
        received = signal.sigwaitinfo(WATCHED) if left is None else signal.sigtimedwait(WATCHED, left)
        if received is None:
            continue
        if received.si_signo != signal.SIGCHLD:
            if deadline is None:
                kill(pid, signal.SIGTERM)
                deadline = time.monotonic() + grace_s
            continue
        code = reap(pid)
        if code is not None:
            return code, was_killed


def reap(pid: int) -> int | None:
    """Reaps all that ended; returns the exit code of `pid` when it is among them."""
    code = None
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if ended == 0:
            return code
        if ended == pid:
            value = os.waitstatus_to_exitcode(status)
            code = 128 - value if value < 0 else value


def end_remains() -> None:
    """Ends every process that the service left: SIGTERM, then SIGKILL until none is there."""
    for pid in descendants():
        kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + REMAINS_GRACE_S
    while descendants():
        if time.monotonic() > deadline:
            for pid in descendants():
                kill(pid, signal.SIGKILL)
        signal.sigtimedwait(WATCHED, 0.05)
        reap(0)


def descendants() -> list[int]:
    """Returns the ids of all living processes below this one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):  # ended while we looked
            continue
        state, parent = stat.rpartition(b")")[2].split()[:2]
        if state not in (b"Z", b"X"):
            parents[int(entry.name)] = int(parent)
    found: list[int] = []
    layer = [os.getpid()]
    while layer:
        layer = [pid for pid, parent in parents.items() if parent in layer]
        found += layer
    return found


def kill(pid: int, number: int) -> None:
    """Sends a signal, unless the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
