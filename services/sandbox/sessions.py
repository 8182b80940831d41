"""All open sessions: they are found by their ids, and end when they are idle for too long, or old."""

from __future__ import annotations

import asyncio
import time

from perigee.errors import NotFoundError, ResourceExhaustedError
from services.kit.telemetry import get_logger
from services.sandbox import metrics
from services.sandbox.cells import Cell, CellOutcome
from services.sandbox.finishing import finish
from services.sandbox.jobs import Program
from services.sandbox.places import Place
from services.sandbox.pool import Pool
from services.sandbox.session import Session

log = get_logger(__name__)

_RETRY_S = 5.0


class Sessions:
    """All open sessions, each with a place of its own; idle ones are ended."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._free = list(pool.session_places)
        self._sessions: dict[str, tuple[Session, Place]] = {}
        self._sweeper = asyncio.create_task(self._sweep())

    async def create(self, program: Program, idle_s: float) -> Session:
        """A new session; raises ResourceExhaustedError when there are too many."""
        if not self._free:
            most = self._pool.config.max_sessions
            raise ResourceExhaustedError(f"{most} sessions are open, sandbox.max_sessions", retry_after_s=_RETRY_S)
        place = self._free.pop()
        session = Session(self._pool, program, place, idle_s)
        self._sessions[session.id] = (session, place)
        metrics.SESSIONS.set(len(self._sessions))
        try:
            await session.start()
        except BaseException:
            await self.end(session.id)
            raise
        return session

    def find(self, session_id: str) -> Session:
        """The session of an id; raises NotFoundError when it has ended or never was."""
        entry = self._sessions.get(session_id)
        if entry is None:
            raise NotFoundError(f"session {session_id[:40]!r} is not open: it was closed, was idle too long, or ended")
        return entry[0]

    async def run(self, session_id: str, cell: Cell) -> CellOutcome:
        """Runs a cell; a session that ends in it is forgotten."""
        session = self.find(session_id)
        outcome = await session.run(cell)
        metrics.JOBS.labels("cell", outcome.verdict.name).inc()
        if not outcome.alive:
            await self.end(session_id)
        return outcome

    async def end(self, session_id: str) -> None:
        """Ends a session, if it is there, and frees its place."""
        entry = self._sessions.pop(session_id, None)
        if entry is None:
            return
        await finish(self._end(*entry))

    async def _end(self, session: Session, place: Place) -> None:
        await session.close()
        self._free.append(place)
        metrics.SESSIONS.set(len(self._sessions))

    async def _sweep(self) -> None:
        """Ends sessions that are idle or old."""
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for session, _ in list(self._sessions.values()):
                idle = not session.busy and now - session.used_at > session.idle_s
                if idle or not session.alive or now - session.opened_at > self._pool.config.session_seconds:
                    log.info("session_ends", session=session.id, idle=idle)
                    await self.end(session.id)

    async def close(self) -> None:
        """Ends all sessions."""
        self._sweeper.cancel()
        await asyncio.wait([self._sweeper])
        for session_id in list(self._sessions):
            await self.end(session_id)
