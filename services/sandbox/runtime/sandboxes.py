"""Sandboxes: the service's end of one, the processes that make them, and the factory that opens them in worker slots.

A zygote (a warm interpreter, one for each runtime) forks a job supervisor for every slot; a launcher, one for each
slot, runs containers. Both kinds of process start when they are first needed.
"""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from perigee.errors import InvalidArgumentError
from services.kit.tasks import finish
from services.kit.telemetry import get_logger
from services.sandbox.agent import CORE_BYTES, ENVIRONMENT, MASKED, OWN_FOLDER
from services.sandbox.agent.archive import Archive, read_archive
from services.sandbox.agent.protocol import Message, RunRequest, RunResult, memory_file
from services.sandbox.agent.unpack import UNPACK_S
from services.sandbox.languages.catalog import Runtime, find_python
from services.sandbox.runtime import metrics
from services.sandbox.runtime.cgroups import CgroupHost
from services.sandbox.runtime.compile_cache import CompileCache
from services.sandbox.runtime.failure import SandboxFailedError
from services.sandbox.runtime.helper_process import AGENT, HelperProcess, receive, send
from services.sandbox.runtime.isolation import Isolation
from services.sandbox.runtime.oci import OciRuntime
from services.sandbox.runtime.worker_slots import WorkerSlot

log = get_logger(__name__)

_ANSWER_S = 30.0
_GRACE_S = 15.0
_IDLE_S = 30.0


class Sandbox:
    """Service's end of a sandbox: runs the processes of one job, one after another."""

    def __init__(self, channel: socket.socket, slot: WorkerSlot, home: str = "") -> None:
        self.channel = channel
        self.slot = slot
        self._home = home
        """Space of the process that waits for a request, and the descriptor on which it receives it."""
        self.broken = False
        """Whether the sandbox must not be used again."""
        self._running = False
        self._reply: asyncio.Future[Message] | None = None

    async def run(self, request: RunRequest, descriptors: list[int]) -> tuple[RunResult, Archive | None]:
        """Runs a process to its end and returns its result and files; cancellation ends it.

        Raises SandboxFailedError when the sandbox breaks, InvalidArgumentError when an archive is refused.
        """
        self.slot.limit(request.limits.memory_bytes, request.limits.processes)
        kills_before = self.slot.oom_kills()
        runs_s = (
            max(1, request.answers) * request.limits.wall_ms / 1000
            + (len(request.unpack) + len(request.pack)) * UNPACK_S
        )
        try:
            async with asyncio.timeout(runs_s + _GRACE_S):
                result, files = await self._run(request, descriptors)
        except SandboxFailedError as error:
            self.broken = True
            if self.slot.oom_kills() == kills_before:
                raise SandboxFailedError(f"{self.slot.name}: {error.message}") from error
            return RunResult("memory", None, 9, peak_bytes=request.limits.memory_bytes), None
        except TimeoutError as error:
            self.broken = True
            raise SandboxFailedError(f"{self.slot.name} overran the limits of its job") from error
        except BaseException:
            self.broken = True
            raise
        if result.refused:
            raise InvalidArgumentError.for_field(f"archives[{result.refused_index}]", result.refused)
        return result, files

    async def _run(self, request: RunRequest, descriptors: list[int]) -> tuple[RunResult, Archive | None]:
        header = request.to_header()
        send(self.channel, header, descriptors)
        self._running = True
        try:
            while True:
                message = await receive(self.channel)
                if message.header["kind"] == "replied":
                    if self._reply is not None and not self._reply.done():
                        self._reply.set_result(message)
                    else:
                        message.close()
                    continue
                fields = {name: value for name, value in message.header.items() if name != "kind"}
                try:
                    files = read_archive(message.descriptors[0]) if message.descriptors else None
                finally:
                    message.close()
                return RunResult(**fields), files
        finally:
            self._running = False
            if self._reply is not None and not self._reply.done():
                self._reply.set_exception(SandboxFailedError("the process has ended before it was reached"))

    def close(self) -> None:
        """Closes the sandbox and removes its folder."""
        self.channel.close()
        if self._home:
            shutil.rmtree(self._home, ignore_errors=True)

    async def end_supervisor(self) -> None:
        """Ends the job supervisor and waits for it: what it still does is charged to its slot."""
        try:
            self.channel.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(_ANSWER_S):
                while True:
                    (await receive(self.channel)).close()
        except (SandboxFailedError, OSError):  # it has ended
            return
        finally:
            self.close()

    def stop(self) -> None:
        """Ends the process that runs now; `run` then returns."""
        if self._running:
            send(self.channel, {"kind": "stop"}, [])

    async def interrupt(self) -> None:
        """Sends SIGINT to the processes that run now; errors as for `ask`."""
        (await self.ask({"kind": "interrupt"}, [], _ANSWER_S)).close()

    async def collect(self, paths: list[str], most_bytes: int, pack: Sequence[str] = ()) -> Archive:
        """Returns files of the process that runs now, those of folders as tars; errors as for `ask`."""
        header = {"kind": "collect", "paths": paths, "pack": list(pack), "bytes": most_bytes}
        message = await self.ask(header, [], _ANSWER_S + len(pack) * UNPACK_S)
        try:
            return read_archive(message.descriptors[0])
        finally:
            message.close()

    async def ask(self, header: dict[str, Any], descriptors: list[int], timeout_s: float) -> Message:
        """Returns the answer about the process that runs now, whose descriptors the caller closes; one at a time.

        Raises SandboxFailedError when the process ends first, or no answer comes in time.
        """
        if not self._running:
            raise SandboxFailedError("no process runs that could be reached")
        send(self.channel, header, descriptors)
        self._reply = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._reply
        except TimeoutError as error:
            raise SandboxFailedError(f"{self.slot.name} does not answer in {timeout_s:g} s") from error
        finally:
            self._reply = None

    async def load(self, header: dict[str, Any], files: bytes) -> None:
        """Hands over an archive with the job's files, which a container has in each of its runs."""
        archive = memory_file(files)
        try:
            send(self.channel, {"kind": "load", **header}, [archive])
        finally:
            os.close(archive)

    def unload(self) -> None:
        """Removes the job's files."""
        send(self.channel, {"kind": "unload"}, [])


def has_ended(sandbox: Sandbox) -> bool:
    """Returns whether the other end is gone."""
    poller = select.poll()
    poller.register(sandbox.channel, 0)  # POLLHUP and POLLERR are always reported
    return bool(poller.poll(0))


class Zygotes:
    """Zygotes by runtime; one that has ended is started again when it is needed."""

    def __init__(self, folder: Path, init: Path | None, uids: Sequence[int], isolated: bool) -> None:
        self._folder = folder
        self._init = init
        self._uids = uids
        self._isolated = isolated
        self._processes: dict[str, HelperProcess] = {}
        self._starting: dict[str, asyncio.Lock] = {}
        self._homes = 0

    async def fork(self, runtime: Runtime, slot: WorkerSlot) -> Sandbox:
        """Forks the job supervisor of a slot; raises SandboxFailedError when the zygote does not start."""
        process = self._processes.get(runtime.name)
        if process is None or not process.running:
            process = await self._start(runtime)
        return self._fork(process, slot)

    def _fork(self, process: HelperProcess, slot: WorkerSlot) -> Sandbox:
        home = "" if self._isolated else self._make_home(slot)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            header = {
                "kind": "fork",
                "uid": slot.uid,
                "groups": len(slot.entries),
                "cgroup_version": slot.cgroup.version if slot.cgroup else 0,
                "home": home,
            }
            send(process.channel, header, [theirs.fileno(), *slot.group_descriptors])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Sandbox(ours, slot, home)

    def _make_home(self, slot: WorkerSlot) -> str:
        self._homes += 1
        home = slot.folder / f"home-{self._homes}"
        home.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(home, slot.uid, slot.uid)
        return str(home)

    async def _start(self, runtime: Runtime) -> HelperProcess:
        async with self._starting.setdefault(runtime.name, asyncio.Lock()):
            process = self._processes.get(runtime.name)
            if process is not None and process.running:
                return process
            if process is not None:
                log.warning("zygote_ended", runtime=runtime.name, output=await process.last_output())
            process = self._make(runtime)
            await process.start()
            self._processes[runtime.name] = process
            return process

    def _make(self, runtime: Runtime) -> HelperProcess:
        python = runtime.python or find_python("", None)
        name = f"the zygote of {runtime.name}"
        options = {
            "isolated": self._isolated,
            "preload": list(runtime.config.preload),
            "path": self._import_path(runtime),
            "environment": runtime.environment,
        }
        if not self._isolated:
            return HelperProcess(name, python.path, "zygote", options)
        folder = self._folder / f"zygote-{runtime.name}"
        folder.mkdir(exist_ok=True)
        root = runtime.root_options(self._uids)
        own = [[str(AGENT), f"{OWN_FOLDER}/agent"], [str(self._init), f"{OWN_FOLDER}/init"]]
        mounts = [*root["mounts"], *own]
        root |= {"folder": str(folder), "mounts": mounts}
        return HelperProcess(name, sys.executable, "root", {**options, "root": root, "python": python.path})

    def _import_path(self, runtime: Runtime) -> list[str]:
        if self._isolated:  # PYTHONPATH names it
            return []
        return sorted({str(path.parent) for path in runtime.packages.paths})

    async def close(self) -> None:
        """Ends all zygotes, and with them their job supervisors."""
        await asyncio.gather(*(process.kill() for process in self._processes.values()))


class Launchers:
    """Launchers of containers by slot."""

    def __init__(self, container: OciRuntime, init: Path, host: CgroupHost) -> None:
        self._container = container
        self._init = init
        self._host = host
        self._processes: dict[str, HelperProcess] = {}
        self._busy: set[str] = set()

    async def open(self, runtime: Runtime, slot: WorkerSlot) -> Sandbox:
        """Returns the sandbox of a slot; raises SandboxFailedError when the launcher does not start."""
        process = self._processes.get(slot.name)
        if process is None or not process.running:
            await self.kill(slot)
            process = self._make(slot)
            self._processes[slot.name] = process
            await process.start()
        self._busy.add(slot.name)
        return Sandbox(process.channel, slot)

    async def wait_until_idle(self, slot: WorkerSlot) -> None:
        """Waits until the launcher of a slot has finished the work of its jobs, the next container included: it is
        charged to the slot, and may end other processes there. Raises SandboxFailedError when it has ended.
        """
        if slot.name not in self._busy:
            return
        channel = self._processes[slot.name].channel
        send(channel, {"kind": "report_idle"}, [])
        try:
            async with asyncio.timeout(_IDLE_S):
                (await receive(channel)).close()
        except TimeoutError as error:
            raise SandboxFailedError(f"the launcher of {slot.name} does not finish within {_IDLE_S:g} s") from error
        self._busy.remove(slot.name)

    def _make(self, slot: WorkerSlot) -> HelperProcess:
        assert slot.cgroup is not None
        folder = slot.folder
        (folder / "roots").mkdir(exist_ok=True)
        options = {
            "uid": slot.uid,
            "folder": str(folder),
            "command": self._container.run_command(folder),
            "delete": self._container.delete_command(folder),
            "state": str(self._container.state_path(folder)),
            "log": str(self._container.log_path(folder)),
            "bundle": self._container.bundle(ENVIRONMENT, MASKED, CORE_BYTES),
            "init": str(self._init),
            "agent": str(AGENT),
            "cgroup_procs": slot.cgroup.procs_paths,
            "cgroup_version": slot.cgroup.version,
            "usage_paths": slot.cgroup.usage_paths,
            "hidden_cgroup_mounts": list(self._host.hybrid),  # v2 mounts beside v1 ones, with which crun refuses to run
        }
        return HelperProcess(f"the launcher of {slot.name}", sys.executable, "launcher", options)

    async def kill(self, slot: WorkerSlot) -> None:
        """Ends the launcher of a slot."""
        self._busy.discard(slot.name)
        if process := self._processes.pop(slot.name, None):
            ended = not process.running
            output = await process.last_output()
            if ended:
                log.warning("launcher_ended", slot=slot.name, output=output)

    async def close(self) -> None:
        """Ends all launchers; their containers are left in the control groups."""
        for process in self._processes.values():
            await process.kill()


class SandboxFactory:
    """Opens sandboxes in slots, by the slot's job supervisor or its launcher; both serve job after job."""

    def __init__(
        self, isolation: Isolation, zygotes: Zygotes, launchers: Launchers | None, compile_cache: CompileCache
    ) -> None:
        self.isolation = isolation
        self.compile_cache = compile_cache
        self._zygotes = zygotes
        self._launchers = launchers
        self._supervised: dict[str, tuple[str, Sandbox]] = {}

    def forks(self, runtime: Runtime) -> bool:
        """Returns whether programs of the runtime are forks of a warm interpreter."""
        return self.isolation.unsafe or (self.isolation.warm and runtime.python is not None)

    def explain_missing(self, runtime: Runtime) -> str | None:
        """Returns why the runtime cannot be used with this isolation; None when it can."""
        if self.forks(runtime) or self._launchers is not None:
            return None
        return f"needs containers ({'; '.join(self.isolation.reasons)})"

    @asynccontextmanager
    async def open(self, runtime: Runtime, slot: WorkerSlot) -> AsyncIterator[Sandbox]:
        """Yields a sandbox in a slot; a slot whose sandbox is broken afterwards is cleared."""
        if not slot.is_empty:
            await self.clear(slot)
            if not slot.is_empty:
                raise SandboxFailedError(f"processes of an earlier job in {slot.name} do not end")
        opening = self._open_supervised(runtime, slot) if self.forks(runtime) else self._open_container(runtime, slot)
        sandbox = await opening
        try:
            yield sandbox
        finally:
            if sandbox.broken:
                sandbox.close()
                await self.clear(slot)
            elif self.forks(runtime) and not self.isolation.unsafe:
                self._supervised[slot.name] = (runtime.name, sandbox)
            elif self.isolation.unsafe:
                sandbox.close()

    async def _open_container(self, runtime: Runtime, slot: WorkerSlot) -> Sandbox:
        if self._launchers is None:
            raise SandboxFailedError(f"{runtime.name} {self.explain_missing(runtime)}")
        try:
            if (supervised := self._supervised.pop(slot.name, None)) is not None:
                await supervised[1].end_supervisor()  # the launcher may end every other process of the slot
            return await self._launchers.open(runtime, slot)
        except BaseException:
            await self.clear(slot)
            raise

    async def _open_supervised(self, runtime: Runtime, slot: WorkerSlot) -> Sandbox:
        name, sandbox = self._supervised.pop(slot.name, ("", None))
        if sandbox is not None and name == runtime.name and not has_ended(sandbox):
            return sandbox
        try:
            if sandbox is not None:
                await sandbox.end_supervisor()
            if self._launchers is not None:
                await self._launchers.wait_until_idle(slot)
        except SandboxFailedError:
            await self.clear(slot)
        except BaseException:
            await self.clear(slot)
            raise
        return await self._zygotes.fork(runtime, slot)

    async def clear(self, slot: WorkerSlot) -> None:
        """Ends every process in the slot, also when the caller is cancelled meanwhile."""
        await finish(self._clear(slot))

    async def _clear(self, slot: WorkerSlot) -> None:
        metrics.CLEARED.inc()
        if (supervised := self._supervised.pop(slot.name, None)) is not None:
            supervised[1].close()
        if self._launchers is not None:
            await self._launchers.kill(slot)
        await slot.kill_all()
