"""Sessions: stateful interpreters that keep variables, files and memory from cell to cell.

A session runs in a worker slot of its own, and ends when it is idle for too long, or old.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import math
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from perigee.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.kit.tasks import finish
from services.kit.telemetry import get_logger
from services.sandbox.agent.archive import encode_archive
from services.sandbox.agent.cells import BEGAN, REPLIED
from services.sandbox.agent.protocol import Limits
from services.sandbox.agent.unpack import UNPACK_S
from services.sandbox.runtime import metrics
from services.sandbox.runtime.failure import SandboxFailedError
from services.sandbox.runtime.helper_process import receive_packet, send
from services.sandbox.runtime.jobs import Program
from services.sandbox.runtime.pool import Pool
from services.sandbox.runtime.programs import LoadedProgram, explain, open_program, opened, read_output, unpack_files
from services.sandbox.runtime.worker_slots import WorkerSlot

_MOST_FORGED = 1000
_PIECE_BYTES = 1 << 16


async def await_message(channel: socket.socket, expected: bytes) -> None:
    """Waits for a message of the interpreter, such as that a cell has ended.

    Cells share the interpreter and may forge messages: others are passed over. Raises SandboxFailedError when the
    interpreter ends.
    """
    for _ in range(_MOST_FORGED):
        message = await receive_packet(channel)
        for descriptor in message.descriptors:
            os.close(descriptor)
        if message.data == expected:
            return
    raise SandboxFailedError("the cells of the session sent more than 1,000 forged messages")


def read_reply(file: int, most_bytes: int) -> dict[str, Any]:
    """Reads the interpreter's reply to a cell, and checks all of it: the cell may have forged it."""
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
    for name in ("result", "error_name", "error_value", "traceback"):
        if isinstance(text := reply.get(name), str):
            read[name] = text.encode(errors="replace").decode()
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        read["displays"] = [read_display(display) for display in reply.get("displays", ())]
    return read


def read_display(display: dict[str, Any]) -> pb.Display:
    """Reads what a cell displayed; raises AttributeError, KeyError, TypeError or ValueError for what a cell forged."""
    contents = [
        pb.DisplayContent(
            mime_type=mime_type, content=base64.b64decode(text) if is_base64 else text.encode(errors="replace")
        )
        for mime_type, text, is_base64 in display["contents"]
    ]
    return pb.Display(contents=contents, is_result=display["is_result"])


OnOutput = Callable[[str, bytes], None]
"""Takes the name of a stream and what a cell has printed to it."""


class OutputReporter:
    """Reports what the files of a cell's output hold and has not been reported, up to a limit."""

    def __init__(self, on_output: OnOutput | None, files: Mapping[str, int], most_bytes: int) -> None:
        self._on_output = on_output
        self._files = files
        self._left = dict.fromkeys(files, most_bytes)
        self._most_bytes = most_bytes

    def __call__(self) -> None:
        """Reports."""
        if self._on_output is None:
            return
        for name, file in self._files.items():
            if piece := os.pread(file, min(self._left[name], _PIECE_BYTES), self._most_bytes - self._left[name]):
                self._left[name] -= len(piece)
                self._on_output(name, piece)


def cell_status(answer: dict[str, Any], output_cut: bool, output_bytes: int) -> tuple[pb.Status.ValueType, str]:
    """Returns status and reason of a cell that ended by itself."""
    if output_cut or answer.get("too_long"):
        return pb.STATUS_OUTPUT_LIMIT, f"output limit of {output_bytes} bytes"
    if answer.get("ok"):
        return pb.STATUS_OK, ""
    return pb.STATUS_RUNTIME_ERROR, answer.get("error_name", "") or "the interpreter gave no reply"


log = get_logger(__name__)

_INTERRUPT_S = 1.0
"""Time that an interrupted cell has before its session is ended."""
_TICK_S = 0.1
_END_S = 5.0
_MOST_CONTEXTS = 16


class Session:
    """One interpreter in a sandbox of its own."""

    def __init__(self, pool: Pool, program: Program, slot: WorkerSlot, idle_s: float) -> None:
        self.id = secrets.token_hex(16)
        self.idle_s = idle_s
        self.used_at = time.monotonic()
        self.ends_at = self.used_at + pool.config.session_seconds
        self.limits = program.limits
        self._pool = pool
        self._program = program
        self._slot = slot
        self._lock = asyncio.Lock()
        self._cells: set[asyncio.Task[pb.RunCellResponse]] = set()
        self._running: asyncio.Task[Any] | None = None
        self._begun = self._interrupted = False  # of the running cell
        self._interrupting = asyncio.Lock()
        self._ready: asyncio.Future[LoadedProgram] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()
        self._end_reason = ""
        self._number = 0
        self._counts: Counter[str] = Counter()
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._task = asyncio.create_task(self._run_interpreter())

    @property
    def busy(self) -> bool:
        """Whether it starts, or a cell runs or waits."""
        return not self._ready.done() or bool(self._cells)

    @property
    def alive(self) -> bool:
        """Whether it accepts cells."""
        return not self._task.done() and not self._ended.is_set()

    async def start(self) -> None:
        """Waits until the interpreter runs; raises SandboxFailedError when it does not start, or is ended before."""
        waited: list[asyncio.Future[Any]] = [self._ready, self._task]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if self._task.cancelled():
            raise SandboxFailedError("the session was ended while it started")
        if not self._ready.done():
            await self._task
        self.used_at = time.monotonic()

    async def _run_interpreter(self) -> None:
        """Runs the interpreter until it ends."""
        program = self._program
        try:
            async with open_program(self._pool.factory, program, self._slot) as loaded:
                await loaded.load()
                archive = loaded.archive({"kernel": program.runtime.config.kernel}, [])
                with opened(b"", b"", b"", archive) as (stdin, stdout, stderr, job):
                    running = asyncio.create_task(
                        loaded.run_mode(
                            "session",
                            [stdin, stdout, stderr, self._theirs.fileno(), job],
                            limits=self._session_limits(),
                        )
                    )
                    try:
                        await asyncio.sleep(0)  # the request has been sent, and the socket with it
                        self._theirs.close()
                        self._ready.set_result(loaded)
                        result = await running
                    finally:
                        running.cancel()
                        await asyncio.gather(running, return_exceptions=True)
                self._end_reason = explain(result, program.limits) or "the interpreter has ended"
                if result.stop == "memory":
                    self._end_reason = f"memory limit of {program.limits.memory_bytes} bytes"
        except SandboxFailedError as error:
            self._end_reason = error.message
            raise
        finally:
            self._theirs.close()
            self._ended.set()

    def _session_limits(self) -> Limits:
        """Limits of the whole session; the times of a cell are watched here, cell by cell."""
        most_ms = self._pool.config.session_seconds * 1000
        limits = self._program.limits
        # the session's own process is one more
        return dataclasses.replace(limits, wall_ms=most_ms, cpu_ms=most_ms, processes=limits.processes + 1)

    async def run(self, cell: pb.RunCellRequest, on_output: OnOutput | None = None) -> pb.RunCellResponse:
        """Runs a cell after those before it; cancellation interrupts it and leaves the session open.

        `on_output` gets pieces of what it prints, in time; the response has all of it.
        Raises InvalidArgumentError when the cell asks for more time than the session has, NotFoundError when the
        session ends before the cell begins.
        """
        most_ms = self._program.limits.wall_ms
        if cell.wall_ms > most_ms:
            raise InvalidArgumentError.for_field(
                "wall_ms", f"is {cell.wall_ms}, at most the session's {most_ms} is allowed"
            )
        if cell.context not in self._counts and len(self._counts) >= _MOST_CONTEXTS:
            raise InvalidArgumentError.for_field(
                "context", f"is a further one, at most {_MOST_CONTEXTS} are kept in a session"
            )
        task = asyncio.create_task(self._run_next(cell, on_output))
        self._cells.add(task)
        task.add_done_callback(self._cells.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task is self._running and self.alive:
                await self.interrupt()
            else:
                task.cancel()
            raise

    async def interrupt(self) -> None:
        """Interrupts the running cell, as soon as it has begun; it then ends by itself or by its limit."""
        self._interrupted = True
        async with self._interrupting:
            if self._begun:
                try:
                    await (await self._ready).sandbox.interrupt()
                except SandboxFailedError as error:  # the session ends, and with it the cell, or the cell by its limit
                    log.warning("cell_not_interrupted", session=self.id, reason=error.message)

    async def restart(self, context: str) -> None:
        """Starts an interpreter anew once the running cell, which is interrupted, and those that wait have ended.

        Raises NotFoundError when the session ends before.
        """
        await self.interrupt()
        async with self._lock:
            if not self.alive:
                raise NotFoundError(f"session {self.id!r} ended before its interpreter was started anew")
            send(self._ours, {"kind": "restart", "context": context}, [])
            del self._counts[context]

    async def _run_next(self, cell: pb.RunCellRequest, on_output: OnOutput | None) -> pb.RunCellResponse:
        async with self._lock:
            if not self.alive:
                raise NotFoundError(
                    f"session {self.id!r} ended before the cell began: {self._end_reason or 'it was closed'}"
                )
            self._running = asyncio.current_task()
            self._begun = self._interrupted = False
            try:
                return await self._run(cell, on_output)
            finally:
                self.used_at = time.monotonic()
                self._running = None

    async def _run(self, cell: pb.RunCellRequest, on_output: OnOutput | None) -> pb.RunCellResponse:
        loaded = await self._ready
        if (needed := sum(len(file.content) for file in cell.files)) > self._program.limits.file_bytes:
            most = self._program.limits.file_bytes
            raise InvalidArgumentError.for_field("files", f"take {needed} bytes, the session has room for {most}")
        self._number += 1
        self._counts[cell.context] += 1
        header = {
            "number": self._number,
            "environment": dict(cell.env),
            "paths": [file.path for file in cell.files],
            "executable": [file.executable for file in cell.files],
            "append": [file.path for file in cell.files if file.append],
        }
        archive = encode_archive(header, [cell.code, *(file.content for file in cell.files)])
        limits = self._program.limits
        with opened(archive, b"", b"", b"") as (job, stdout, stderr, reply):
            started, cpu_ns = time.monotonic(), self._cpu_ns()
            status, reason = pb.STATUS_OK, ""
            report = OutputReporter(on_output, {"stdout": stdout, "stderr": stderr}, limits.output_bytes)
            try:
                for index, sent in enumerate(cell.archives):
                    await self._unpack(loaded, f"archives[{index}]", sent)
                started, cpu_ns = time.monotonic(), self._cpu_ns()
                send(self._ours, {"kind": "cell", "context": cell.context}, [job, stdout, stderr, reply])
                wall_ms = cell.wall_ms or limits.wall_ms
                status, reason = await self._await_reply(wall_ms, cpu_ns, report)
            except SandboxFailedError as error:
                status, reason = await self._explain_end(error)
            wall_ms = math.ceil((time.monotonic() - started) * 1000)
            files: Sequence[pb.OutputFile] = ()
            if self.alive and (cell.output_files or cell.output_folders):
                most = self._pool.config.max_output_file_bytes
                wanted, folders = list(cell.output_files), list(cell.output_folders)
                try:
                    files = unpack_files(await loaded.sandbox.collect(wanted, most, folders))
                except SandboxFailedError as error:
                    status, reason = await self._explain_end(error)
                    if self.alive:  # but does not answer
                        await self.close()
                        status = pb.STATUS_INFRA_ERROR
            (out, out_cut), (err, err_cut) = (read_output(file, limits.output_bytes) for file in (stdout, stderr))
            answer = read_reply(reply, limits.output_bytes)
        if status == pb.STATUS_OK:
            status, reason = cell_status(answer, out_cut or err_cut, limits.output_bytes)
        metrics.JOBS.labels("cell", pb.Status.Name(status).removeprefix("STATUS_")).inc()
        return pb.RunCellResponse(
            status=status,
            stdout=out,
            stderr=err,
            stdout_truncated=out_cut,
            stderr_truncated=err_cut,
            result=answer.get("result"),
            error_name=answer.get("error_name", ""),
            error_value=answer.get("error_value", ""),
            wall_ms=wall_ms,
            cpu_ms=math.ceil((self._cpu_ns() - cpu_ns) / 1e6),
            peak_memory_bytes=self._peak_bytes(),
            reason=reason,
            files=files,
            alive=self.alive,
            execution_count=self._counts[cell.context],
            displays=answer.get("displays"),
            error_traceback=answer.get("traceback", ""),
        )

    async def _unpack(self, loaded: LoadedProgram, field: str, archive: pb.Archive) -> None:
        """Unpacks an archive into the working folder; raises InvalidArgumentError when it is refused."""
        header = {
            "kind": "unpack",
            "folder": archive.folder,
            "strip": archive.strip_folders,
            "file": archive.file,
            "files": self._program.limits.files,
        }
        with opened(*([] if archive.file else [archive.content])) as content:
            message = await loaded.sandbox.ask(header, content, 2 * UNPACK_S)
        message.close()
        if message.header["reason"]:
            raise InvalidArgumentError.for_field(field, message.header["reason"])

    async def _await_reply(
        self, wall_ms: int, cpu_ns: int, report: Callable[[], None]
    ) -> tuple[pb.Status.ValueType, str]:
        """Waits for the end of a cell; one that passes a limit is interrupted, and its session ended if that fails."""
        limits = self._program.limits
        receiving = asyncio.create_task(self._await_end())
        ending = asyncio.create_task(self._ended.wait())
        deadline = time.monotonic() + wall_ms / 1000
        try:
            while True:
                left_s = deadline - time.monotonic()
                timeout_s = max(0.0, min(left_s, _TICK_S))
                await asyncio.wait([receiving, ending], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                report()
                if receiving.done():
                    await receiving
                    return pb.STATUS_OK, ""
                if ending.done():
                    raise SandboxFailedError("the session has ended")
                if time.monotonic() >= deadline:
                    reason = f"wall-clock limit of {wall_ms} ms"
                elif self._cpu_ns() - cpu_ns >= limits.cpu_ms * 1_000_000:
                    reason = f"CPU limit of {limits.cpu_ms} ms"
                else:
                    continue
                await self.interrupt()
                await asyncio.wait([receiving], timeout=_INTERRUPT_S)
                if not receiving.done():
                    await self.close()
                    return (
                        pb.STATUS_TIME_LIMIT,
                        f"{reason}; the cell ignored the interrupt and its session was ended",
                    )
                await receiving
                return pb.STATUS_TIME_LIMIT, reason
        finally:
            for task in (receiving, ending):
                task.cancel()
            await asyncio.gather(receiving, ending, return_exceptions=True)
            async with self._interrupting:  # a signal on its way is not the next cell's
                self._begun = False

    async def _await_end(self) -> None:
        """Waits until the interpreter has begun and ended the running cell; hands on what interrupted it before."""
        await await_message(self._ours, BEGAN % self._number)
        self._begun = True
        if self._interrupted:
            await self.interrupt()
        await await_message(self._ours, REPLIED % self._number)

    async def _explain_end(self, error: SandboxFailedError) -> tuple[pb.Status.ValueType, str]:
        """Returns status and reason of a cell during which the session ended; `error` is what was seen of the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                await self._ended.wait()
        failed = self._task.done() and not self._task.cancelled() and self._task.exception() is not None
        if failed:
            return pb.STATUS_INFRA_ERROR, self._end_reason
        status = pb.STATUS_MEMORY_LIMIT if self._end_reason.startswith("memory") else pb.STATUS_RUNTIME_ERROR
        return status, self._end_reason or error.message

    def _cpu_ns(self) -> int:
        return 0 if self._slot.usage is None else self._slot.usage.cpu_ns()

    def _peak_bytes(self) -> int:
        return 0 if self._slot.usage is None else self._slot.usage.peak_bytes()

    async def close(self) -> None:
        """Ends the interpreter and waits until it is gone."""
        self._ended.set()
        self._task.cancel()
        # waiting cells fail once they get the lock: after this one, when a cell ends the session
        running = [] if self._running in (None, asyncio.current_task()) else [self._running]
        await asyncio.wait([self._task, *running])
        self._ours.close()
        if not self._task.cancelled() and (error := self._task.exception()) is not None:
            log.warning("session_failed", session=self.id, error=str(error))


_RETRY_S = 5.0


class Sessions:
    """All open sessions, each in a slot of its own; idle ones are ended."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._free = list(pool.session_slots)
        self._sessions: dict[str, tuple[Session, WorkerSlot]] = {}
        self._sweeper = asyncio.create_task(self._sweep())

    async def create(self, program: Program, idle_s: float) -> Session:
        """Starts a session; raises ResourceExhaustedError when there are too many."""
        if not self._free:
            most = self._pool.config.max_sessions
            raise ResourceExhaustedError(f"{most} sessions are open, sandbox.max_sessions", retry_after_s=_RETRY_S)
        slot = self._free.pop()
        session = Session(self._pool, program, slot, idle_s)
        self._sessions[session.id] = (session, slot)
        metrics.SESSIONS.set(len(self._sessions))
        try:
            await session.start()
        except BaseException:
            await self.end(session.id)
            raise
        return session

    def find(self, session_id: str) -> Session:
        """Returns the session of an id; raises NotFoundError when it has ended or never existed."""
        entry = self._sessions.get(session_id)
        if entry is None:
            raise NotFoundError(f"session {session_id[:40]!r} is not open: it was closed, was idle too long, or ended")
        return entry[0]

    async def run(self, cell: pb.RunCellRequest, on_output: OnOutput | None = None) -> pb.RunCellResponse:
        """Runs a cell; a session that ends in it is removed."""
        session = self.find(cell.session_id)
        result = await session.run(cell, on_output)
        if not result.alive:
            await self.end(cell.session_id)
        return result

    async def end(self, session_id: str) -> None:
        """Ends a session if it is open, and frees its slot."""
        entry = self._sessions.pop(session_id, None)
        if entry is None:
            return
        await finish(self._end(*entry))

    async def _end(self, session: Session, slot: WorkerSlot) -> None:
        await session.close()
        self._free.append(slot)
        metrics.SESSIONS.set(len(self._sessions))

    async def _sweep(self) -> None:
        """Ends sessions that are idle or old."""
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for session, _ in list(self._sessions.values()):
                idle = not session.busy and now - session.used_at > session.idle_s
                if idle or not session.alive or now > session.ends_at:
                    log.info("session_ends", session=session.id, idle=idle)
                    await self.end(session.id)

    async def close(self) -> None:
        """Ends all sessions."""
        self._sweeper.cancel()
        await asyncio.wait([self._sweeper])
        for session_id in list(self._sessions):
            await self.end(session_id)
