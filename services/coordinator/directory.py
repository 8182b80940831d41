"""Directory of the weights that are lent: which export of a version is published, and which workers have it whole."""

from __future__ import annotations

from collections.abc import Sequence

from perigee.trainer.v1 import trainer_pb2 as pb
from services.coordinator.workers import Worker, WorkerRegistry


class Directory:
    """Holders of the newest export of one run. What it knows is true as long as the processes live: nothing is kept."""

    def __init__(self, registry: WorkerRegistry) -> None:
        self._registry = registry
        self._version: int | None = None
        self._published = pb.PublishWeightsResponse()
        self._holders: list[Worker] = []

    def publish(self, version: int, published: pb.PublishWeightsResponse) -> None:
        """Records the trainer's export of a version; nobody holds it yet if it is a new one."""
        if published.image_id != self._published.image_id:
            self._holders = []
        self._version, self._published = version, published

    def find(self, version: int) -> pb.PublishWeightsResponse | None:
        """Returns the export of a version, None when it is not known."""
        return self._published if self._version == version else None

    def add(self, image_id: str, worker: Worker) -> None:
        """Records that a worker has the whole of an export and lends it."""
        if image_id == self._published.image_id and worker not in self._holders:
            self._holders.append(worker)

    def holders(self) -> list[str]:
        """Returns the addresses of the workers that lend the export and have their leases, in order of arrival."""
        self._holders = [worker for worker in self._holders if self._registry.is_live(worker)]
        return [worker.address for worker in self._holders]


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
