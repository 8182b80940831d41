"""Directory of the weights that are lent: which export of a version is published, and which workers have it whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from perigee.trainer.v1 import trainer_pb2 as pb
from services.coordinator.workers import Worker, WorkerRegistry


class Directory(ABC):
    """Newest export of a run and its holders. What it knows is true as long as the processes live: nothing is kept."""

    @abstractmethod
    def publish(self, run_id: str, version: int, published: pb.PublishWeightsResponse) -> None:
        """Records the trainer's export of a version, in place of the one before; nobody holds it yet if it is new."""

    @abstractmethod
    def find(self, run_id: str, version: int) -> pb.PublishWeightsResponse | None:
        """Returns the export of a version, None when it is not known."""

    @abstractmethod
    def add(self, image_id: str, worker: Worker) -> None:
        """Records that a worker has the whole of an export and lends it, unless a newer one is published."""

    @abstractmethod
    def holders(self, image_id: str) -> list[str]:
        """Returns the addresses of the workers that lend an export and have their leases, in order of arrival."""


class MemoryDirectory(Directory):
    """The directory in the coordinator's own memory."""

    def __init__(self, registry: WorkerRegistry) -> None:
        self.run_id = ""
        self.version: int | None = None
        self.published = pb.PublishWeightsResponse()
        self._registry = registry
        self._holders: list[Worker] = []

    def publish(self, run_id: str, version: int, published: pb.PublishWeightsResponse) -> None:
        if published.image_id != self.published.image_id:
            self._holders = []
        self.run_id, self.version, self.published = run_id, version, published

    def find(self, run_id: str, version: int) -> pb.PublishWeightsResponse | None:
        return self.published if (self.run_id, self.version) == (run_id, version) else None

    def add(self, image_id: str, worker: Worker) -> None:
        if image_id == self.published.image_id and worker not in self._holders:
            self._holders.append(worker)

    def holders(self, image_id: str) -> list[str]:
        return [worker.address for worker in self.workers()] if image_id == self.published.image_id else []

    def workers(self) -> list[Worker]:
        """Returns the workers that lend the newest export and have their leases."""
        self._holders = [worker for worker in self._holders if self._registry.is_live(worker)]
        return list(self._holders)


def plan_sources(trainer: str, holders: Sequence[str], workers: Sequence[str]) -> dict[str, list[str]]:
    """Returns the sources of each worker's pull by address, the first choice first.

    Hosts make up a chain, in which each passes the weights on to one other, so that no uplink carries them twice; the
    hosts before it, the trainer last, are what a worker falls back on. Workers of one host read from the first of them,
    those of the trainer's host from the trainer, or from one of them that has the weights.
    """
    # One that pulls again has lost its engine and its weights.
    holders = [holder for holder in holders if holder not in workers]
    # The first worker of each host.
    chain: list[str] = []
    sources: dict[str, list[str]] = {}
    for address in (*holders, *workers):
        host = _host(address)
        place = next((place for place, node in enumerate(chain) if _host(node) == host), None)
        if host == _host(trainer):
            sources[address] = [trainer, *[holder for holder in holders if _host(holder) == host][:1]]
            continue
        sources[address] = [*reversed(chain if place is None else chain[: place + 1]), trainer]
        if place is None:
            chain.append(address)
    return {worker: sources[worker] for worker in workers}


def _host(address: str) -> str:
    return address.rpartition(":")[0]
