"""An open box: runs the orders of one job, one after another, and hands back what the box tells.

The warm interpreters, one per runtime, started when they are first needed; each forks a keeper for every place.

The launchers of containers, one per place, started when they are first needed.

A slot: where one job runs at a time, in a place for the program and one beside it for whoever judges it."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.kit.telemetry import get_logger
from services.sandbox.agent.archive import Parcel, read_parcel
from services.sandbox.agent.protocol import ENVIRONMENT, Order, Outcome, memory_file
from services.sandbox.agent.root import OWN_FOLDER
from services.sandbox.languages.catalog import Runtime, find_python
from services.sandbox.runtime import metrics
from services.sandbox.runtime.cgroups import CgroupHost
from services.sandbox.runtime.helper_process import (
    AGENT,
    Attendant,
    BoxFailedError,
    finish,
    receive,
    receive_at_once,
    send,
)
from services.sandbox.runtime.isolation import Isolation
from services.sandbox.runtime.oci import OciRuntime
from services.sandbox.runtime.worker_slots import Place

_ANSWER_S = 30.0
_GRACE_S = 15.0


@dataclass(frozen=True)
class Ended:
    """How a process ended, and the files that were collected after it."""

    outcome: Outcome
    files: Parcel | None = None


class Box:
    """The service's end of a box; whoever opened it closes it."""

    def __init__(self, channel: socket.socket, place: Place, home: str = "") -> None:
        self.channel = channel
        self.place = place
        self._home = home
        self._prepared: tuple[int, int] | None = None
        """Space of a program that waits for its order, and the descriptor by which it takes it."""
        self.broken = False
        """Whether the box must not be used again."""
        self._running = False
        self._collected: asyncio.Future[Parcel] | None = None

    async def run(self, order: Order, descriptors: list[int]) -> Ended:
        """Runs a process to its end. Being cancelled ends it; raises BoxFailedError when the box breaks."""
        self.place.limit(order.limits.memory_bytes, order.limits.processes)
        kills_before = self.place.oom_kills()
        runs_s = max(1, order.answers) * order.limits.wall_ms / 1000
        try:
            async with asyncio.timeout(runs_s + _GRACE_S):
                return await self._run(order, descriptors)
        except BoxFailedError as error:
            self.broken = True
            if self.place.oom_kills() == kills_before:
                raise BoxFailedError(f"{self.place.name}: {error.message}") from error
            return Ended(Outcome("memory", None, 9, peak_bytes=order.limits.memory_bytes))
        except TimeoutError as error:
            self.broken = True
            raise BoxFailedError(f"{self.place.name} overran the limits of its job") from error
        except BaseException:
            self.broken = True
            raise

    async def _run(self, order: Order, descriptors: list[int]) -> Ended:
        header = order.to_header()
        prepared = self._take_prepared(order)
        if prepared is not None:  # the keeper hears of it at the same time, and only watches
            with socket.socket(fileno=prepared) as program:
                send(program, header, descriptors)
            header["begun"] = True
        send(self.channel, header, descriptors)
        self._running = True
        try:
            while True:
                message = await receive(self.channel)
                if message.header["kind"] == "collected":
                    self._hand_over(message.descriptors)
                    continue
                if message.header["kind"] == "prepared":  # of the program that runs already
                    message.close()
                    continue
                fields = {name: value for name, value in message.header.items() if name != "kind"}
                try:
                    files = read_parcel(message.descriptors[0]) if message.descriptors else None
                finally:
                    message.close()
                return Ended(Outcome(**fields), files)
        finally:
            self._running = False
            if self._collected is not None and not self._collected.done():
                self._collected.set_exception(BoxFailedError("the process has ended before its files were collected"))

    def _take_prepared(self, order: Order) -> int | None:
        """The descriptor of a program that was prepared for such an order; the caller closes it."""
        while (message := receive_at_once(self.channel)) is not None:
            self._drop_prepared()
            self._prepared = (message.header["space_bytes"], message.descriptors[0])
        if self._prepared is None:
            return None
        space_bytes, descriptor = self._prepared
        fits = space_bytes == order.limits.file_bytes and not order.answers and not order.brings_files
        if not fits:
            self._drop_prepared()
            return None
        self._prepared = None
        return descriptor

    def _drop_prepared(self) -> None:
        if self._prepared is not None:
            os.close(self._prepared[1])
            self._prepared = None

    def _hand_over(self, descriptors: list[int]) -> None:
        parcel = read_parcel(descriptors[0])
        os.close(descriptors[0])
        if self._collected is not None and not self._collected.done():
            self._collected.set_result(parcel)

    def close(self) -> None:
        """Lets go of a box that ends with its job."""
        self._drop_prepared()
        self.channel.close()
        if self._home:
            shutil.rmtree(self._home, ignore_errors=True)

    async def dismiss(self) -> None:
        """Has the keeper end, and waits until it has: what it still does is charged to its place."""
        try:
            self._drop_prepared()
            self.channel.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(_ANSWER_S):
                while True:
                    (await receive(self.channel)).close()
        except (BoxFailedError, OSError):  # it has ended
            return
        finally:
            self.close()

    def stop(self) -> None:
        """Ends the process that runs now; its outcome follows."""
        if self._running:
            send(self.channel, {"kind": "stop"}, [])

    def interrupt(self) -> None:
        """Sends SIGINT to the process that runs now."""
        send(self.channel, {"kind": "interrupt"}, [])

    async def collect(self, paths: list[str], most_bytes: int) -> Parcel:
        """Files of the process that runs now; raises BoxFailedError when it ends before they are there."""
        if not self._running:
            raise BoxFailedError("no process runs whose files could be collected")
        send(self.channel, {"kind": "collect", "paths": paths, "bytes": most_bytes}, [])
        self._collected = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await self._collected
        except TimeoutError as error:
            raise BoxFailedError(f"the files of {self.place.name} are not handed over") from error
        finally:
            self._collected = None

    async def begin(self, header: dict[str, Any], files: bytes) -> None:
        """Lays down a parcel with the files of a job; for boxes that keep them from run to run."""
        parcel = memory_file(files)
        try:
            send(self.channel, {"kind": "begin", **header}, [parcel])
        finally:
            os.close(parcel)

    def end(self) -> None:
        """Has the files of the job taken away before the next job's come."""
        send(self.channel, {"kind": "end"}, [])


def has_ended(box: Box) -> bool:
    """Whether a box that waits for its job is gone already."""
    poller = select.poll()
    poller.register(box.channel, 0)  # POLLHUP and POLLERR are always told
    return bool(poller.poll(0))


log = get_logger(__name__)


class Zygotes:
    """Forks keepers; a zygote that has ended is started again for the next one."""

    def __init__(self, folder: Path, init: Path | None, uids: Sequence[int], isolated: bool) -> None:
        self._folder = folder
        self._init = init
        self._uids = uids
        self._isolated = isolated
        self._attendants: dict[str, Attendant] = {}
        self._starting: dict[str, asyncio.Lock] = {}
        self._homes = 0

    async def fork(self, runtime: Runtime, place: Place) -> Box:
        """The keeper of a place; raises BoxFailedError when the zygote does not start."""
        attendant = self._attendants.get(runtime.name)
        if attendant is None or not attendant.running:
            attendant = await self._start(runtime)
        return self._fork(attendant, place)

    def _fork(self, attendant: Attendant, place: Place) -> Box:
        home = "" if self._isolated else self._make_home(place)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            header = {
                "kind": "keeper",
                "uid": place.uid,
                "groups": len(place.entries),
                "cgroup_version": place.cgroup.version if place.cgroup else 0,
                "home": home,
            }
            send(attendant.channel, header, [theirs.fileno(), *place.group_descriptors])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Box(ours, place, home)

    def _make_home(self, place: Place) -> str:
        self._homes += 1
        home = place.folder / f"home-{self._homes}"
        home.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(home, place.uid, place.uid)
        return str(home)

    async def _start(self, runtime: Runtime) -> Attendant:
        async with self._starting.setdefault(runtime.name, asyncio.Lock()):
            attendant = self._attendants.get(runtime.name)
            if attendant is not None and attendant.running:
                return attendant
            if attendant is not None:
                log.warning("zygote_ended", runtime=runtime.name, words=await attendant.last_words())
            attendant = self._make(runtime)
            await attendant.start()
            self._attendants[runtime.name] = attendant
            return attendant

    def _make(self, runtime: Runtime) -> Attendant:
        python = runtime.python or find_python("", None)
        name = f"the zygote of {runtime.name}"
        options = {
            "isolated": self._isolated,
            "preload": list(runtime.config.preload),
            "path": self._import_path(runtime),
            "environment": runtime.environment,
        }
        if not self._isolated:
            return Attendant(name, python.path, "zygote", options)
        folder = self._folder / f"zygote-{runtime.name}"
        folder.mkdir(exist_ok=True)
        root = runtime.root_options(self._uids)
        own = [[str(AGENT), f"{OWN_FOLDER}/agent"], [str(self._init), f"{OWN_FOLDER}/init"]]
        mounts = [*root["mounts"], *own]
        root |= {"folder": str(folder), "mounts": mounts}
        return Attendant(name, sys.executable, "root", {**options, "root": root, "python": python.path})

    def _import_path(self, runtime: Runtime) -> list[str]:
        if self._isolated:
            return runtime.import_path
        return sorted({str(Path(source).parent) for source, _ in runtime.mounts})

    async def close(self) -> None:
        """Ends all zygotes, and with them their keepers."""
        await asyncio.gather(*(attendant.kill() for attendant in self._attendants.values()))


_REST_S = 30.0


class Launchers:
    """Opens boxes that are containers."""

    def __init__(self, container: OciRuntime, init: Path, host: CgroupHost) -> None:
        self._container = container
        self._init = init
        self._host = host
        self._attendants: dict[str, Attendant] = {}
        self._restless: set[str] = set()

    async def open(self, runtime: Runtime, place: Place) -> Box:
        """The box of a place; raises BoxFailedError when the launcher does not start."""
        attendant = self._attendants.get(place.name)
        if attendant is None or not attendant.running:
            await self.kill(place)
            attendant = self._make(place)
            self._attendants[place.name] = attendant
            await attendant.start()
        self._restless.add(place.name)
        return Box(attendant.channel, place)

    async def rest(self, place: Place) -> None:
        """Waits until the launcher of a place has done all that its jobs gave it to do, the next container included:
        it is charged to the place, and may end what else is there. Raises BoxFailedError when it has ended.
        """
        if place.name not in self._restless:
            return
        channel = self._attendants[place.name].channel
        send(channel, {"kind": "rest"}, [])
        try:
            async with asyncio.timeout(_REST_S):
                (await receive(channel)).close()
        except TimeoutError as error:
            raise BoxFailedError(f"the launcher of {place.name} does not come to rest") from error
        self._restless.remove(place.name)

    def _make(self, place: Place) -> Attendant:
        assert place.cgroup is not None
        folder = place.folder
        (folder / "roots").mkdir(exist_ok=True)
        options = {
            "uid": place.uid,
            "folder": str(folder),
            "command": self._container.run_command(folder),
            "state": str(self._container.state_path(folder)),
            "log": str(self._container.log_path(folder)),
            "bundle": self._container.bundle(ENVIRONMENT),
            "init": str(self._init),
            "agent": str(AGENT),
            "cgroup_procs": place.cgroup.procs_paths,
            "cgroup_version": place.cgroup.version,
            "usage_paths": place.cgroup.usage_paths,
            "hidden_cgroup_mounts": list(self._container.hidden_mounts(self._host)),
        }
        return Attendant(f"the launcher of {place.name}", sys.executable, "launcher", options)

    async def kill(self, place: Place) -> None:
        """Ends the launcher of a place."""
        self._restless.discard(place.name)
        if attendant := self._attendants.pop(place.name, None):
            ended = not attendant.running
            words = await attendant.last_words()
            if ended:
                log.warning("launcher_ended", place=place.name, words=words)

    async def close(self) -> None:
        """Ends all launchers; what they started is left in their control groups."""
        for attendant in self._attendants.values():
            await attendant.kill()


class Opener:
    """Opens boxes in places: by the keeper of the place, who serves one job after another, or by its launcher."""

    def __init__(self, isolation: Isolation, zygotes: Zygotes, launchers: Launchers | None) -> None:
        self.isolation = isolation
        self._zygotes = zygotes
        self._launchers = launchers
        self._keepers: dict[str, tuple[str, Box]] = {}

    def forks(self, runtime: Runtime) -> bool:
        """Whether programs of the runtime are forks of a keeper."""
        return self.isolation.unsafe or (self.isolation.warm and runtime.python is not None)

    def explain_missing(self, runtime: Runtime) -> str | None:
        """Why the runtime cannot be used with this isolation; None when it can."""
        if self.forks(runtime) or self._launchers is not None:
            return None
        return f"needs containers ({'; '.join(self.isolation.reasons)})"

    @asynccontextmanager
    async def open(self, runtime: Runtime, place: Place) -> AsyncIterator[Box]:
        """A box in a place for as long as the block lasts; one that is broken afterwards leaves the place empty."""
        if not place.is_empty:
            await self.clear(place)
            if not place.is_empty:
                raise BoxFailedError(f"processes of an earlier job in {place.name} do not end")
        opening = self._take_keeper(runtime, place) if self.forks(runtime) else self._open_container(runtime, place)
        box = await opening
        try:
            yield box
        finally:
            if box.broken:
                box.close()
                await self.clear(place)
            elif self.forks(runtime) and not self.isolation.unsafe:
                self._keepers[place.name] = (runtime.name, box)
            elif self.isolation.unsafe:
                box.close()

    async def _open_container(self, runtime: Runtime, place: Place) -> Box:
        if self._launchers is None:
            raise BoxFailedError(f"{runtime.name} {self.explain_missing(runtime)}")
        try:
            if (keeper := self._keepers.pop(place.name, None)) is not None:
                await keeper[1].dismiss()  # its launcher may end everything else in the place's control group
            return await self._launchers.open(runtime, place)
        except BaseException:
            await self.clear(place)
            raise

    async def _take_keeper(self, runtime: Runtime, place: Place) -> Box:
        name, box = self._keepers.pop(place.name, ("", None))
        if box is not None and name == runtime.name and not has_ended(box):
            return box
        try:
            if box is not None:
                await box.dismiss()
            if self._launchers is not None:
                await self._launchers.rest(place)
        except BoxFailedError:
            await self.clear(place)
        except BaseException:
            await self.clear(place)
            raise
        return await self._zygotes.fork(runtime, place)

    async def clear(self, place: Place) -> None:
        """Ends everything in the place, also where the caller is cancelled meanwhile."""
        await finish(self._clear(place))

    async def _clear(self, place: Place) -> None:
        metrics.CLEARED.inc()
        if (keeper := self._keepers.pop(place.name, None)) is not None:
            keeper[1].close()
        if self._launchers is not None:
            await self._launchers.kill(place)
        await place.empty()
