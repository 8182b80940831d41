"""Long trajectories in files: moved there from Redis, read in ranges, deleted once nothing refers to them.

A file's name is in Redis before there is a file, the file is whole before a trajectory refers to it, and the tokens
leave Redis in the change that makes it refer to the file. So whatever is killed when, the tokens are in one of the two,
and the sweep finds every file that nothing refers to. A file holds tokens that follow each other in a trajectory, their
log-probabilities and their expert choices, each packed and one after the other; a trajectory refers to its files in
order, as text: `name:stop,name:stop` names the file of the tokens up to each response offset.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from prometheus_client import Counter

from perigee.buffer.packing import ITEM_BYTES
from perigee.errors import AbortedError, DataLossError, FailedPreconditionError, NotFoundError, PerigeeError
from services.buffer.config import OffloadConfig
from services.buffer.scripts import Arguments, Durability, ScriptRunner, load_script
from services.kit.storage import StagedFile, delete_file, join, list_files, read_ranges
from services.kit.tasks import finish, keeping_cancellation
from services.kit.telemetry import get_logger

log = get_logger(__name__)

BEGIN_MOVE = load_script("begin_move")
FINISH_MOVE = load_script("finish_move")
TAKE_FILES = load_script("take_files")
FORGET_FILES = load_script("forget_files")
ADOPT_FILES = load_script("adopt_files")
READ_TOKENS = load_script("read_tokens")

FIELD = "buffer.offload.location"
# Bytes that a move reads from Redis at once.
BLOCK_BYTES = 1 << 20
# Pause after storage or Redis failed.
RETRY_S = 2.0
# Files of which one script call takes care: bounds the time that it occupies the server.
FILES_PER_CALL = 512

FILES = Counter("perigee_buffer_files_total", "Files of trajectories written, deleted, and not written.", ["event"])
FILE_BYTES = Counter("perigee_buffer_file_bytes_total", "Bytes of trajectories moved to files.")


@dataclass(frozen=True)
class TokenFile:
    """File of the tokens from `first` up to `stop` of a trajectory."""

    name: str
    first: int
    stop: int

    def find_ranges(
        self, first: int, stop: int, *, with_logprobs: bool, expert_bytes: int
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Returns offsets and sizes of tokens, log-probabilities and expert choices of tokens, in bytes of the file."""
        items, begin, size = (self.stop - self.first) * ITEM_BYTES, first - self.first, stop - first
        return (
            (begin * ITEM_BYTES, size * ITEM_BYTES),
            (items + begin * ITEM_BYTES, size * ITEM_BYTES if with_logprobs else 0),
            (2 * items + begin * expert_bytes, size * expert_bytes),
        )


def unpack_files(files: str) -> list[TokenFile]:
    """Returns the files that a trajectory refers to, in order."""
    found: list[TokenFile] = []
    for each in files.split(",") if files else ():
        name, _, stop = each.rpartition(":")
        found.append(TokenFile(name, found[-1].stop if found else 0, int(stop)))
    return found


def folder_of(location: str, run_id: str) -> str:
    """Returns the folder of a run: its id as far as names of files allow, and what tells it from others."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", run_id)[:64]
    return join(location, f"{readable}-{hashlib.sha256(run_id.encode()).hexdigest()[:16]}")


def read_file_ranges(config: OffloadConfig, run_id: str, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Returns ranges of a file, given as offsets and sizes.

    Raises DataLossError when the file is not there or too short, FailedPreconditionError without a location.
    """
    if config.location is None:
        raise FailedPreconditionError(f"{FIELD} is not set, and trajectories of run {run_id!r} are in files there")
    path = join(folder_of(config.location, run_id), name)
    found = read_ranges(path, FIELD, [each for each in ranges if each[1]])
    if found is None or [len(part) for part in found] != [size for _, size in ranges if size]:
        raise DataLossError(
            f"{FIELD}: {path} {'does not exist' if found is None else 'is too short'}, and holds tokens of run "
            f"{run_id!r}: bring the folder back as it was when redis was saved"
        )
    parts = iter(found)
    return [next(parts) if size else b"" for _, size in ranges]


class Mover:
    """Moves tokens of long trajectories of the runs that `note` names, and deletes files that nothing refers to."""

    def __init__(self, scripts: ScriptRunner, config: OffloadConfig) -> None:
        assert config.location is not None
        self._scripts = scripts
        self._config = config
        self._location = config.location
        # Runs with something to do: a run is in it once, however often it is named.
        self._due: set[str] = set()
        self._wake = asyncio.Event()

    def note(self, run_id: str) -> None:
        """Has a run looked at soon."""
        self._due.add(run_id)
        self._wake.set()

    async def run(self) -> None:
        """Moves and sweeps until cancelled; what fails is logged and tried again."""
        swept_at = -float("inf")
        while True:
            is_sweep = time.monotonic() - swept_at >= self._config.sweep_s
            if is_sweep:
                swept_at = time.monotonic()
                self._due |= await self._find_runs()
            due, self._due = self._due, set()
            failed = {run_id for run_id in due if not await self._try(run_id, with_unknown=is_sweep)}
            self._due |= failed
            if failed:
                await asyncio.sleep(RETRY_S)
            elif not self._due:
                self._wake.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(swept_at + self._config.sweep_s - time.monotonic()):
                        await self._wake.wait()

    async def _try(self, run_id: str, *, with_unknown: bool) -> bool:
        """Moves and sweeps the files of a run; returns False where that failed and is to be tried again."""
        with keeping_cancellation():  # of storage that fails when it comes, `finish` raises the failure
            try:
                await self.move_all(run_id)
                await self.sweep(run_id, with_unknown=with_unknown)
            except NotFoundError:
                log.info("the run is gone from redis: its folder is left as it is", run=run_id)
            except PerigeeError as error:
                FILES.labels("failed").inc()
                log.warning("files of trajectories", run=run_id, reason=error.message)
                return False
            return True

    async def move_all(self, run_id: str) -> None:
        """Moves the trajectories of a run that wait for it, one after the other."""
        while True:
            name = uuid.uuid4().hex
            # The name is on disk before the file: a file that nobody knows would stay until the next sweep.
            _, *taken = await self._scripts.run(
                BEGIN_MOVE, run_id, name, self._config.abandoned_s, durability=Durability.SEGMENT
            )
            if not taken:
                return
            trajectory_id, first, stop, expert_bytes = taken[0].decode(), *map(int, taken[1:])
            try:
                await self._move(run_id, trajectory_id, TokenFile(name, first, stop), expert_bytes)
            except AbortedError:
                continue  # the tokens were consumed or moved meanwhile: the name is swept
            except PerigeeError:
                with suppress(PerigeeError):  # then it waits until the move is taken for abandoned
                    await self._scripts.run(FINISH_MOVE, run_id, name, trajectory_id, first, "", 0)
                raise

    async def sweep(self, run_id: str, *, with_unknown: bool = False) -> None:
        """Deletes the files of a run that nothing refers to and whose time is over.

        With `with_unknown`, the run's folder is listed for files that Redis does not know, whose time begins then.
        """
        folder = folder_of(self._location, run_id)
        if with_unknown:
            names = await finish(asyncio.to_thread(list_files, folder, FIELD))
            # A staging file has the name of the file that it was to be.
            names = sorted({name.removeprefix(".").removesuffix(".part") for name in names})
            for start in range(0, len(names), FILES_PER_CALL):
                some = names[start : start + FILES_PER_CALL]
                await self._scripts.run(ADOPT_FILES, run_id, self._config.abandoned_s, *some)
        taken = FILES_PER_CALL
        while taken == FILES_PER_CALL:
            # Waits for the disk: a commit that redis may yet forget deletes nothing.
            _, names = await self._scripts.run(TAKE_FILES, run_id, FILES_PER_CALL, durability=Durability.COMMIT)
            taken = len(names)
            for name in names:
                await finish(asyncio.to_thread(delete_file, join(folder, name.decode()), FIELD))
            if names:
                await self._scripts.run(FORGET_FILES, run_id, *names)
                FILES.labels("deleted").inc(taken)

    async def _find_runs(self) -> set[str]:
        try:
            return await self._scripts.list_runs()
        except PerigeeError as error:
            log.warning("runs cannot be listed", reason=error.message)
            return set()

    async def _move(self, run_id: str, trajectory_id: str, moved: TokenFile, expert_bytes: int) -> None:
        """Writes a file of a trajectory's tokens and has the trajectory refer to it."""
        path = join(folder_of(self._location, run_id), moved.name)
        file = await finish(asyncio.to_thread(StagedFile, path, FIELD))
        try:
            async with aclosing(self._read(run_id, trajectory_id, moved, expert_bytes)) as blocks:
                async for block in blocks:
                    await finish(asyncio.to_thread(file.write, block))
            await finish(asyncio.to_thread(file.publish))
        finally:
            await finish(asyncio.to_thread(file.discard))
        _, done = await self._scripts.run(
            FINISH_MOVE, run_id, moved.name, trajectory_id, moved.first, moved.stop, self._config.min_tokens
        )
        FILES.labels("written" if done else "abandoned").inc()
        FILE_BYTES.inc((moved.stop - moved.first) * (2 * ITEM_BYTES + expert_bytes) if done else 0)

    async def _read(
        self, run_id: str, trajectory_id: str, moved: TokenFile, expert_bytes: int
    ) -> AsyncGenerator[bytes, None]:
        """Yields what a file holds; raises AbortedError when the tokens are consumed or moved meanwhile."""
        for part in (0, 1, 2):
            step = BLOCK_BYTES // max(1, expert_bytes if part == 2 else ITEM_BYTES)
            for first in range(moved.first, moved.stop if part < 2 or expert_bytes else moved.first, step):
                stop = min(first + step, moved.stop)
                span: Arguments = [trajectory_id, first, stop, expert_bytes if part == 2 else 0]
                _, *parts = await self._scripts.run(READ_TOKENS, run_id, int(part == 1), *span)
                if len(parts[part]) != (stop - first) * (expert_bytes if part == 2 else ITEM_BYTES):
                    raise AbortedError(
                        f"trajectory {trajectory_id!r} was consumed, or moved by another, while it was moved"
                    )
                yield parts[part]
