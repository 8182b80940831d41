"""The launchers of containers, one per place, started when they are first needed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from services.kit.telemetry import get_logger
from services.sandbox.attendants import BOX_PARENT, ENVIRONMENT, Attendant, BoxFailedError, receive, send
from services.sandbox.boxes import Box
from services.sandbox.cgroups import CgroupHost
from services.sandbox.oci.base import OciRuntime
from services.sandbox.places import Place
from services.sandbox.runtimes import Runtime

log = get_logger(__name__)

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
            "agent": str(BOX_PARENT / "box"),
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
