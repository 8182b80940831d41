"""Keeps an engine running: starts it, restarts it when it dies, and fills it again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from perigee.errors import InternalError, PerigeeError
from services.kit.telemetry import get_logger
from services.rollout.metrics import ENGINE_RESTARTS, ENGINE_START_SECONDS
from services.rollout.worker import HeldWeights, Worker, WorkerStatus

log = get_logger(__name__)


async def supervise(
    worker: Worker, held_weights: Callable[[], HeldWeights | None], on_fatal: Callable[[InternalError], None]
) -> None:
    """Runs until cancelled, and stops the engine then; calls `on_fatal` when the engine cannot be started.

    An engine that died is filled with the last committed weights when they are still in memory.
    """
    settings = worker.config.supervision
    failures = 0
    refill_failed = False
    try:
        while True:
            start = time.monotonic()
            try:
                await worker.engine.start()
            # Whatever keeps an engine from starting is told to people below; another attempt needs the same clean-up.
            except Exception as error:
                failures += 1
                log.error("engine did not start", attempt=failures, exc_info=error)
                await worker.engine.stop()
                if failures >= settings.start_attempts:
                    on_fatal(InternalError(f"The engine did not start in {failures} attempts: {error}"))
                    return
                await asyncio.sleep(settings.retry_seconds)
                continue
            failures = 0
            seconds = time.monotonic() - start
            ENGINE_START_SECONDS.observe(seconds)
            log.info("engine started", seconds=round(seconds, 2), restarts=worker.engine_restarts)
            worker.broken.clear()
            try:
                await worker.refill(None if refill_failed else held_weights())
                refill_failed = False
            except PerigeeError as error:
                log.error("engine not refilled", error=error.message)
                refill_failed = True
            await _wait_end(worker)
            worker.become(WorkerStatus.STARTING)
            worker.engine_restarts += 1
            ENGINE_RESTARTS.inc()
            log.error("engine died", running=worker.running, restarts=worker.engine_restarts)
            await worker.engine.stop()
    finally:
        await worker.engine.stop()


async def _wait_end(worker: Worker) -> None:
    waits = [asyncio.create_task(worker.engine.wait_dead()), asyncio.create_task(worker.broken.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
            with suppress(asyncio.CancelledError):
                await wait
