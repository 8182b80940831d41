"""`perigee sandbox serve`: the service in the foreground, in place of this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

PORT = 50056
HTTP_PORT = 8056


def serve_command(port: int, http_port: int, slots: int | None, overrides: Sequence[str]) -> list[str]:
    """The service's command; overrides come last, so that they win."""
    settings = [f"server.port={port}", f"http.port={http_port}"]
    settings += [f"slots={slots}"] if slots is not None else []
    command = [sys.executable, "-m", "services.sandbox"]
    for setting in (*settings, *overrides):
        command += ["--set", setting]
    return command


def serve(command: list[str]) -> None:
    """Becomes the service: its exit code is this process's, and signals reach it without a go-between."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)
