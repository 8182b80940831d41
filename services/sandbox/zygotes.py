"""The warm interpreters, one per runtime, started when they are first needed; each forks a keeper for every place."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from services.kit.telemetry import get_logger
from services.sandbox.attendants import BOX_PARENT, Attendant, send
from services.sandbox.box.root import OWN_FOLDER
from services.sandbox.boxes import Box
from services.sandbox.interpreter import find_python
from services.sandbox.places import Place
from services.sandbox.runtimes import Runtime

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
        own = [[str(BOX_PARENT / "box"), f"{OWN_FOLDER}/box"], [str(self._init), f"{OWN_FOLDER}/init"]]
        mounts = [*root["mounts"], *own]
        root |= {"folder": str(folder), "mounts": mounts}
        return Attendant(name, sys.executable, "enter", {**options, "root": root, "python": python.path})

    def _import_path(self, runtime: Runtime) -> list[str]:
        if self._isolated:
            return runtime.import_path
        return sorted({str(Path(source).parent) for source, _ in runtime.mounts})

    async def close(self) -> None:
        """Ends all zygotes, and with them their keepers."""
        await asyncio.gather(*(attendant.kill() for attendant in self._attendants.values()))
