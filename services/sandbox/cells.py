"""The cells of a session: what is run, what became of it, and how the interpreter's replies are read."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.sandbox.attendants import BoxFailedError, receive_packet
from services.sandbox.box.python_session import REPLIED
from services.sandbox.execute import read_output
from services.sandbox.jobs import InputFile, OutputFile, Verdict

_MOST_FORGED = 1000


@dataclass(frozen=True)
class Cell:
    """Code to run in a session."""

    code: bytes
    files: Sequence[InputFile] = ()
    output_files: Sequence[str] = ()
    wall_ms: int | None = None


@dataclass(frozen=True)
class CellOutcome:
    """What became of a cell; `result` is the repr of its last expression."""

    verdict: Verdict
    stdout: bytes = b""
    stderr: bytes = b""
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    result: str | None = None
    error_name: str = ""
    error_value: str = ""
    wall_ms: int = 0
    cpu_ms: int = 0
    peak_bytes: int = 0
    reason: str = ""
    files: Sequence[OutputFile] = ()
    alive: bool = True
    execution_count: int = 0


async def receive_reply(channel: socket.socket, number: int) -> None:
    """Waits until the interpreter tells that it has run a cell; raises BoxFailedError when it ends, or talks nonsense.

    The interpreter is the cells' own, so what comes may be forged: nothing but the number is read of it.
    """
    for _ in range(_MOST_FORGED):
        message = await receive_packet(channel)
        for descriptor in message.descriptors:
            os.close(descriptor)
        if message.data == REPLIED % number:
            return
    raise BoxFailedError("the session's cells have filled its channel")


def read_reply(file: int, most_bytes: int) -> dict[str, Any]:
    """What the interpreter says of a cell; it may have forged it, so everything is checked."""
    content, cut = read_output(file, most_bytes)
    if cut:
        return {"ok": True, "too_long": True}
    try:
        reply = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(reply, dict):
        return {}
    read: dict[str, Any] = {"ok": reply.get("ok") is True}
    for name in ("result", "error_name", "error_value"):
        if isinstance(text := reply.get(name), str):
            read[name] = text.encode(errors="replace").decode()
    return read


def judge_cell(answer: dict[str, Any], output_cut: bool, output_bytes: int) -> tuple[Verdict, str]:
    """The verdict of a cell that ended by itself."""
    if output_cut or answer.get("too_long"):
        return Verdict.OUTPUT_LIMIT, f"output limit of {output_bytes} bytes"
    if answer.get("ok"):
        return Verdict.ACCEPTED, ""
    return Verdict.RUNTIME_ERROR, answer.get("error_name", "") or "the interpreter gave no reply"
