"""The directory of lent weights in etcd, where others see it, and where a coordinator that starts again finds it.

    PREFIX/exports/RUN/VERSION         the trainer's export, as JSON
    PREFIX/holders/IMAGE/WORKER        the address of a worker that lends the whole of it

The entries of one coordinator are under one lease of etcd, which it renews: they outlive it by `lease_seconds`. What
it knows itself comes first, so that a run goes on while etcd cannot be reached.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from aetcd import rpc
from google.protobuf.json_format import MessageToJson, Parse, ParseError

from perigee.errors import PerigeeError, UnavailableError, first_error
from perigee.reload import Reloaded
from perigee.rpc import ChannelOptions, ServiceClient
from perigee.trainer.v1 import trainer_pb2 as pb
from services.coordinator.config import DirectoryConfig
from services.coordinator.directory import Directory, MemoryDirectory
from services.coordinator.workers import EMPTY, Worker, WorkerRegistry
from services.kit.telemetry import get_logger

log = get_logger(__name__)

CALL_S = 5.0
RETRY_S = 2.0
RENEWALS_PER_LEASE = 3


class EtcdClient(ServiceClient):
    """The calls of etcd's API that a directory needs, over stubs of aetcd, whose own client has no TLS."""

    service_name = "etcd"

    def __init__(self, config: DirectoryConfig) -> None:
        options = ChannelOptions(
            ca_file=config.ca_file,
            cert_file=config.cert_file,
            key_file=config.key_file,
            server_name=config.server_name,
        )
        super().__init__(config.etcd or "", options)
        self._authentication, self._keys = rpc.AuthStub(self.channel), rpc.KVStub(self.channel)
        self._leases, self._watches = rpc.LeaseStub(self.channel), rpc.WatchStub(self.channel)

    async def log_in(self, user: str, password: str) -> None:
        """Has further calls carry a user's token, for as long as etcd knows it."""
        request = rpc.AuthenticateRequest(name=user, password=password)
        response = await self._unary(self._authentication.Authenticate, request, CALL_S)
        self._metadata = Reloaded((), lambda: (("token", response.token),))

    async def grant(self, seconds: int) -> int:
        """Returns the id of a new lease."""
        response = await self._unary(self._leases.LeaseGrant, rpc.LeaseGrantRequest(TTL=seconds), CALL_S)
        return int(response.ID)

    async def renew(self, lease: int) -> None:
        """Renews a lease; raises UnavailableError when it has ended."""
        requests: Any = [rpc.LeaseKeepAliveRequest(ID=lease)]
        responses = [response async for response in self._stream(self._leases.LeaseKeepAlive, requests, CALL_S)]
        if not responses or responses[-1].TTL <= 0:
            raise UnavailableError("the lease in etcd has ended")

    async def put(self, key: str, value: str, lease: int) -> None:
        """Writes a key, which ends with the lease."""
        request = rpc.PutRequest(key=key.encode(), value=value.encode(), lease=lease)
        await self._unary(self._keys.Put, request, CALL_S)

    async def delete(self, key: str) -> None:
        """Deletes a key, which need not be there."""
        await self._unary(self._keys.DeleteRange, rpc.DeleteRangeRequest(key=key.encode()), CALL_S)

    async def read(self, prefix: str) -> tuple[list[Any], int]:
        """Returns the entries whose keys begin with a prefix, and the revision that they are of."""
        request = rpc.RangeRequest(key=prefix.encode(), range_end=_end_of(prefix))
        response = await self._unary(self._keys.Range, request, CALL_S)
        return list(response.kvs), int(response.header.revision)

    async def watch(self, prefix: str, revision: int) -> AsyncIterator[Any]:
        """Yields the changes of such entries from a revision on; raises UnavailableError when etcd ends the watch."""
        create = rpc.WatchCreateRequest(key=prefix.encode(), range_end=_end_of(prefix), start_revision=revision)

        async def ask() -> AsyncIterator[Any]:
            yield rpc.WatchRequest(create_request=create)
            await asyncio.Event().wait()

        requests: Any = ask()
        async for response in self._stream(self._watches.Watch, requests, None):
            if response.canceled:
                raise UnavailableError(f"etcd ended the watch: {response.cancel_reason or 'compacted'}")
            for event in response.events:
                yield event


class EtcdDirectory(Directory):
    """The directory in the coordinator's memory and in etcd. `run` is awaited beside the calls."""

    def __init__(self, registry: WorkerRegistry, config: DirectoryConfig) -> None:
        self._registry = registry
        self._config = config
        self._prefix = f"{config.prefix.rstrip('/')}/"
        self._own = MemoryDirectory(registry)
        # What others wrote, a coordinator before this one for instance: key after the prefix -> value.
        self._foreign: dict[str, str] = {}
        self._leases: set[int] = set()
        self._changed = asyncio.Event()

    def publish(self, run_id: str, version: int, published: pb.PublishWeightsResponse) -> None:
        self._own.publish(run_id, version, published)
        self._changed.set()

    def find(self, run_id: str, version: int) -> pb.PublishWeightsResponse | None:
        if (known := self._own.find(run_id, version)) is not None:
            return known
        # Of use before the first of its own only: a version that is trained once more after a crash is another one.
        key = f"exports/{run_id}/{version}"
        if self._own.version is not None or (value := self._foreign.get(key)) is None:
            return None
        try:
            return Parse(value, pb.PublishWeightsResponse(), ignore_unknown_fields=True)
        except ParseError as error:
            log.warning("entry in etcd is none of a directory", key=self._prefix + key, error=str(error))
            return None

    def add(self, image_id: str, worker: Worker) -> None:
        self._own.add(image_id, worker)
        self._changed.set()

    def holders(self, image_id: str) -> list[str]:
        registered = {worker.worker_id: worker for worker in self._registry.all()}
        found = dict.fromkeys(self._own.holders(image_id))
        for key, address in self._foreign.items():
            if key.startswith(place := f"holders/{image_id}/"):
                worker = registered.get(key.removeprefix(place))
                # One that has started again holds nothing.
                if worker is None or worker.status != EMPTY:
                    found[address] = None
        return list(found)

    async def run(self) -> None:
        """Keeps etcd's entries and this directory the same until cancelled, past failures of etcd."""
        while True:
            try:
                async with EtcdClient(self._config) as client:
                    await self._follow(client)
            except PerigeeError as error:
                log.warning("etcd does not have the directory", error=error.message)
            await asyncio.sleep(RETRY_S)

    async def _follow(self, client: EtcdClient) -> None:
        if self._config.user is not None and self._config.password is not None:
            await client.log_in(self._config.user, self._config.password.get_secret_value())
        lease = await client.grant(self._config.lease_seconds)
        self._leases.add(lease)
        entries, revision = await client.read(self._prefix)
        self._foreign.clear()
        for entry in entries:
            self._store(entry, is_there=True)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch(client, revision + 1))
                tasks.create_task(self._renew(client, lease))
                tasks.create_task(self._write(client, lease))
        except BaseExceptionGroup as group:
            raise first_error(group) from group

    async def _watch(self, client: EtcdClient, revision: int) -> None:
        async for event in client.watch(self._prefix, revision):
            self._store(event.kv, is_there=event.type == event.PUT)

    def _store(self, entry: Any, is_there: bool) -> None:
        # Others may write anything there.
        key = entry.key.decode("utf-8", "replace").removeprefix(self._prefix)
        if is_there and entry.lease not in self._leases:
            self._foreign[key] = entry.value.decode("utf-8", "replace")
        else:
            self._foreign.pop(key, None)

    async def _renew(self, client: EtcdClient, lease: int) -> None:
        while True:
            await asyncio.sleep(self._config.lease_seconds / RENEWALS_PER_LEASE)
            await client.renew(lease)

    async def _write(self, client: EtcdClient, lease: int) -> None:
        """Writes what changes: exports, holders, and workers that leave."""
        written: dict[str, str] = {}
        with self._registry.watch(self._changed.set):
            while True:
                self._changed.clear()
                entries = self._entries()
                for key in written.keys() - entries.keys():
                    await client.delete(self._prefix + key)
                for key, value in entries.items():
                    if written.get(key) != value:
                        await client.put(self._prefix + key, value, lease)
                written = entries
                await self._changed.wait()

    def _entries(self) -> dict[str, str]:
        """Returns what this coordinator has in etcd: key after the prefix -> value."""
        own = self._own
        if own.version is None:
            return {}
        export = {f"exports/{own.run_id}/{own.version}": MessageToJson(own.published, indent=None)}
        return export | {f"holders/{own.published.image_id}/{w.worker_id}": w.address for w in own.workers()}


def _end_of(prefix: str) -> bytes:
    """Returns the end of the range of keys that begin with a prefix, whose last character is a slash."""
    return prefix[:-1].encode() + b"0"
