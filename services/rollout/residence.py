"""Residence of an engine: what it does while its worker is away and others have the devices.

`keep` gives nothing back. `sleep` gives back the memory of weights and KV cache within the process, in which requests
in flight wait. `restart` ends the process, which gives all of its memory back for certain (k1.5 section 2.6.3), and
starts another one from the fork server.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from perigee.rollout.v1 import rollout_pb2 as pb
from services.rollout.engine import Engine
from services.weights.manifest import WeightImage


class Residence(ABC):
    """A way to leave and to come back. An engine that fails in either is unusable."""

    @abstractmethod
    async def leave(self, engine: Engine) -> None:
        """Gives memory back."""

    @abstractmethod
    async def come_back(self, engine: Engine, image: WeightImage, *, keep_prefixes: bool = False) -> None:
        """Takes the memory again, with these weights, and keeps cached prefixes where it shall and has any."""


class Keep(Residence):
    """The engine stays as it is."""

    async def leave(self, engine: Engine) -> None:
        """Does nothing: requests in flight go on."""

    async def come_back(self, engine: Engine, image: WeightImage, *, keep_prefixes: bool = False) -> None:
        """Loads the weights as at any other time."""
        await engine.update_weights(image, keep_prefixes=keep_prefixes)


class Sleep(Residence):
    """The engine stays, without weights and KV cache."""

    async def leave(self, engine: Engine) -> None:
        """Freezes the requests in flight."""
        await engine.sleep()

    async def come_back(self, engine: Engine, image: WeightImage, *, keep_prefixes: bool = False) -> None:
        """Goes on with the requests in flight."""
        await engine.wake_up(image)


class Restart(Residence):
    """The engine ends; requests in flight fail."""

    async def leave(self, engine: Engine) -> None:
        """Ends the process."""
        await engine.stop()

    async def come_back(self, engine: Engine, image: WeightImage, *, keep_prefixes: bool = False) -> None:
        """Starts another one; ends the first where it is still there."""
        await engine.stop()
        await engine.start()
        await engine.update_weights(image)


RESIDENCES: Mapping[int, Residence] = {
    pb.RESIDENCE_UNSPECIFIED: Keep(),
    pb.RESIDENCE_KEEP: Keep(),
    pb.RESIDENCE_SLEEP: Sleep(),
    pb.RESIDENCE_RESTART: Restart(),
}
