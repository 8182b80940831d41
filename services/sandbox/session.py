"""A stateful interpreter: a session keeps its variables, files and memory from cell to cell."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import secrets
import socket
import time
from collections.abc import Sequence
from typing import Any

from perigee.errors import InvalidArgumentError, NotFoundError
from services.kit.telemetry import get_logger
from services.sandbox.attendants import BoxFailedError, send
from services.sandbox.box.limits import BoxLimits
from services.sandbox.box.payload import encode_parcel
from services.sandbox.cells import Cell, CellOutcome, judge_cell, read_reply, receive_reply
from services.sandbox.execute import read_output
from services.sandbox.jobs import OutputFile, Program, Verdict
from services.sandbox.places import Place
from services.sandbox.pool import Pool
from services.sandbox.programs import LoadedProgram, explain, open_program, opened, unpack_files

log = get_logger(__name__)

_INTERRUPT_S = 1.0
"""How long an interrupted cell may take to end before its session is ended."""
_TICK_S = 0.1
_FAREWELL_S = 5.0


class Session:
    """One interpreter in a box of its own."""

    def __init__(self, pool: Pool, program: Program, place: Place, idle_s: float) -> None:
        self.id = secrets.token_hex(16)
        self.idle_s = idle_s
        self.used_at = self.opened_at = time.monotonic()
        self._pool = pool
        self._program = program
        self._place = place
        self._turn = asyncio.Lock()
        self._cells: set[asyncio.Task[CellOutcome]] = set()
        self._running: asyncio.Task[Any] | None = None
        self._ready: asyncio.Future[LoadedProgram] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()
        self._end_reason = ""
        self._count = 0
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._task = asyncio.create_task(self._live())

    @property
    def busy(self) -> bool:
        """Whether a cell runs or waits."""
        return bool(self._cells)

    @property
    def alive(self) -> bool:
        """Whether it takes cells."""
        return not self._task.done() and not self._ended.is_set()

    async def start(self) -> None:
        """Waits until the interpreter is there; raises BoxFailedError when it does not start."""
        waited: list[asyncio.Future[Any]] = [self._ready, self._task]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done():
            await self._task

    async def _live(self) -> None:
        """Runs the interpreter until it ends."""
        program = self._program
        try:
            async with open_program(self._pool.opener, program, self._place) as loaded:
                await loaded.load()
                parcel = loaded.parcel({}, [])
                with opened(b"", b"", b"", parcel) as (stdin, stdout, stderr, job):
                    running = asyncio.create_task(
                        loaded.run_mode(
                            "session",
                            [stdin, stdout, stderr, self._theirs.fileno(), job],
                            limits=self._life_limits(),
                        )
                    )
                    try:
                        await asyncio.sleep(0)  # the order has been sent, and with it the socket
                        self._theirs.close()
                        self._ready.set_result(loaded)
                        outcome = await running
                    finally:
                        running.cancel()
                        await asyncio.gather(running, return_exceptions=True)
                self._end_reason = explain(outcome, program.limits) or "the interpreter has ended"
                if outcome.stop == "memory":
                    self._end_reason = f"memory limit of {program.limits.memory_bytes} bytes"
        except BoxFailedError as error:
            self._end_reason = error.message
            raise
        finally:
            self._theirs.close()
            self._ended.set()

    def _life_limits(self) -> BoxLimits:
        """A session's own limits: a cell's times are watched here, cell by cell."""
        most_ms = self._pool.config.session_seconds * 1000
        return dataclasses.replace(self._program.limits, wall_ms=most_ms, cpu_ms=most_ms)

    async def run(self, cell: Cell) -> CellOutcome:
        """Runs a cell when those before it have ended. Being cancelled interrupts it and leaves the session open.

        Raises InvalidArgumentError when the cell asks for more time than the session has, NotFoundError when the
        session ends before the cell's turn comes.
        """
        most_ms = self._program.limits.wall_ms
        if cell.wall_ms is not None and cell.wall_ms > most_ms:
            raise InvalidArgumentError.of("wall_ms", f"is {cell.wall_ms}, at most the session's {most_ms} is allowed")
        task = asyncio.create_task(self._run_in_turn(cell))
        self._cells.add(task)
        task.add_done_callback(self._cells.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task is self._running and self.alive:
                with contextlib.suppress(BoxFailedError):  # the session has ended, and with it the cell
                    (await self._ready).box.interrupt()  # the cell then ends by itself, or by its limit
            else:
                task.cancel()
            raise

    async def _run_in_turn(self, cell: Cell) -> CellOutcome:
        async with self._turn:
            if not self.alive:
                raise NotFoundError(f"session {self.id!r} ended before the cell's turn came")
            self._running = asyncio.current_task()
            try:
                return await self._run(cell)
            finally:
                self.used_at = time.monotonic()
                self._running = None

    async def _run(self, cell: Cell) -> CellOutcome:
        loaded = await self._ready
        self._count += 1
        header = {
            "number": self._count,
            "paths": [file.path for file in cell.files],
            "executable": [file.executable for file in cell.files],
        }
        parcel = encode_parcel(header, [cell.code, *(file.content for file in cell.files)])
        limits = self._program.limits
        with opened(parcel, b"", b"", b"") as (job, stdout, stderr, reply):
            started, cpu_ns = time.monotonic(), self._cpu_ns()
            verdict, reason = Verdict.ACCEPTED, ""
            try:
                send(self._ours, {"kind": "cell"}, [job, stdout, stderr, reply])
                wall_ms = limits.wall_ms if cell.wall_ms is None else cell.wall_ms
                verdict, reason = await self._await_reply(loaded, wall_ms, cpu_ns)
            except BoxFailedError as error:
                verdict, reason = await self._explain_end(error)
            wall_ms = math.ceil((time.monotonic() - started) * 1000)
            files: Sequence[OutputFile] = ()
            if self.alive and cell.output_files:
                most = self._pool.config.max_output_file_bytes
                try:
                    files = unpack_files(await loaded.box.collect(list(cell.output_files), most))
                except BoxFailedError as error:
                    verdict, reason = await self._explain_end(error)
                    if self.alive:  # and does not answer
                        await self.close()
                        verdict = Verdict.INFRA_ERROR
            (out, out_cut), (err, err_cut) = (read_output(file, limits.output_bytes) for file in (stdout, stderr))
            answer = read_reply(reply, limits.output_bytes)
        if verdict is Verdict.ACCEPTED:
            verdict, reason = judge_cell(answer, out_cut or err_cut, limits.output_bytes)
        return CellOutcome(
            verdict=verdict,
            stdout=out,
            stderr=err,
            stdout_truncated=out_cut,
            stderr_truncated=err_cut,
            result=answer.get("result"),
            error_name=answer.get("error_name", ""),
            error_value=answer.get("error_value", ""),
            wall_ms=wall_ms,
            cpu_ms=math.ceil((self._cpu_ns() - cpu_ns) / 1e6),
            peak_bytes=self._peak_bytes(),
            reason=reason,
            files=files,
            alive=self.alive,
            execution_count=self._count,
        )

    async def _await_reply(self, loaded: LoadedProgram, wall_ms: int, cpu_ns: int) -> tuple[Verdict, str]:
        """Waits for the cell's end; one that passes a limit is interrupted, and its session ended if that is no use."""
        limits = self._program.limits
        receiving = asyncio.create_task(receive_reply(self._ours, self._count))
        ending = asyncio.create_task(self._ended.wait())
        deadline = time.monotonic() + wall_ms / 1000
        try:
            while True:
                left_s = deadline - time.monotonic()
                timeout_s = max(0.0, min(left_s, _TICK_S))
                await asyncio.wait([receiving, ending], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                if receiving.done():
                    await receiving
                    return Verdict.ACCEPTED, ""
                if ending.done():
                    raise BoxFailedError("the session has ended")
                if time.monotonic() >= deadline:
                    reason = f"wall-clock limit of {wall_ms} ms"
                elif self._cpu_ns() - cpu_ns >= limits.cpu_ms * 1_000_000:
                    reason = f"CPU limit of {limits.cpu_ms} ms"
                else:
                    continue
                loaded.box.interrupt()
                await asyncio.wait([receiving], timeout=_INTERRUPT_S)
                if not receiving.done():
                    await self.close()
                    return (
                        Verdict.TIME_LIMIT,
                        f"{reason}; the cell did not heed the interrupt and its session was ended",
                    )
                await receiving
                return Verdict.TIME_LIMIT, reason
        finally:
            for task in (receiving, ending):
                task.cancel()
            await asyncio.gather(receiving, ending, return_exceptions=True)

    async def _explain_end(self, error: BoxFailedError) -> tuple[Verdict, str]:
        """Why the session has ended during a cell; `error` is what was seen of it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await self._ended.wait()
        failed = self._task.done() and not self._task.cancelled() and self._task.exception() is not None
        if failed:
            return Verdict.INFRA_ERROR, self._end_reason
        verdict = Verdict.MEMORY_LIMIT if self._end_reason.startswith("memory") else Verdict.RUNTIME_ERROR
        return verdict, self._end_reason or error.message

    def _cpu_ns(self) -> int:
        return 0 if self._place.usage is None else self._place.usage.cpu_ns()

    def _peak_bytes(self) -> int:
        return 0 if self._place.usage is None else self._place.usage.peak_bytes()

    async def close(self) -> None:
        """Ends the interpreter and waits until it is gone."""
        self._ended.set()
        self._task.cancel()
        # cells that wait are told when their turn comes: after this one, where it is a cell that ends the session
        running = [] if self._running in (None, asyncio.current_task()) else [self._running]
        await asyncio.wait([self._task, *running])
        self._ours.close()
        if not self._task.cancelled() and (error := self._task.exception()) is not None:
            log.warning("session_failed", session=self.id, error=str(error))
