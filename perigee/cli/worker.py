"""`perigee worker`: a rollout worker on this machine that joins the run of a coordinator, here or elsewhere."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perigee.cli.ending import Interrupt
from perigee.cli.recipe import dump_yaml
from perigee.cli.stack import (
    HOST,
    WORKER_PORTS,
    ServiceSpec,
    local_channel,
    pick_ports,
    start_guarded,
    wait_ready,
)
from perigee.cli.train import ENDED, SILENCE_S, STREAM_S
from perigee.cli.view import View
from perigee.coordinator.client import CoordinatorClient
from perigee.coordinator.v1 import coordinator_pb2 as pb
from perigee.errors import NotFoundError, PerigeeError, UnavailableError
from perigee.files import write_atomically
from perigee.rpc import VARIABLES, ChannelOptions
from services.kit.addresses import UNSPECIFIED, is_loopback, join_address
from services.kit.process import ChildProcess

POLL_S = 1.0


def plan_worker(
    coordinator: str,
    status: pb.GetStatusResponse,
    values: Mapping[str, Any],
    folder: Path,
    is_of_run: bool,
    channel: ChannelOptions = ChannelOptions(),
) -> ServiceSpec:
    """Returns the process of a worker; its configuration, written into `folder`, is the rollout section `values`.

    Buffer and trainer are where the coordinator dials them unless `values` say otherwise: on its machine, where those
    are loopback addresses. With `is_of_run` the section is that of a local run, whose own workers have its ports, and
    whose stack has addresses of its own. It speaks TLS with the files of `channel` where the section names none.
    """
    host = coordinator.rpartition(":")[0]
    server = dict(values.get("server") or {})
    for name in ("ca_file", "cert_file", "key_file", "server_name"):
        if (given := getattr(channel, name)) is not None:
            server.setdefault(f"tls_{name}", given)
    if not is_loopback(host):
        server.setdefault("host", "0.0.0.0")
    section = dict(values) | {"server": server}
    for part, port in WORKER_PORTS if is_of_run else ():
        section[part] = {key: value for key, value in (section.get(part) or {}).items() if key != port}
    if is_of_run or not server.get("port"):
        section["server"]["port"] = pick_ports(1)[0]
    name = section.setdefault("worker_id", f"{socket.gethostname()}-{os.getpid()}")
    section["coordinator_address"] = coordinator
    for key, peer in (("buffer_address", status.buffer_address), ("trainer_address", status.trainer_address)):
        if is_of_run or key not in section:
            section[key] = reached_from_here(peer, host)
    config = folder / f"{name}.yaml"
    write_atomically(config, dump_yaml({"rollout": section}).encode(), mode=0o600)
    command = [sys.executable, "-m", "services.rollout", "--config", str(config)]
    bound = section["server"].get("host", HOST)
    address = join_address(HOST if bound in UNSPECIFIED else bound, section["server"]["port"])
    return ServiceSpec(name, "rollout", command, folder / f"{name}.log", address, local_channel(section["server"]))


def export_credentials(channel: ChannelOptions) -> None:
    """Has the services that this process starts, and its own checks of them, use the token of these options."""
    given = {VARIABLES["token"]: channel.token, VARIABLES["token_file"]: channel.token_file}
    for variable in given if any(given.values()) else ():  # both at once are refused
        os.environ.pop(variable, None)
    os.environ.update({variable: value for variable, value in given.items() if value})


def reached_from_here(address: str, coordinator_host: str) -> str:
    """Returns a peer's address; one that is loopback to the coordinator is on the coordinator's machine."""
    host, _, port = address.rpartition(":")
    return join_address(coordinator_host, port) if is_loopback(host) else address


async def work(spec: ServiceSpec, coordinator: str, channel: ChannelOptions, view: View, interrupt: Interrupt) -> None:
    """Runs the worker until it is cancelled, or the coordinator has ended with its run.

    The worker hands back what it has under way. Raises UnavailableError when it ends by itself, or the coordinator
    stays away for SILENCE_S.
    """
    process = await start_guarded(spec.name, spec.command, spec.log_path)
    interrupt.end_at_once = process.kill
    view.note(f"{spec.name} starts (log: {spec.log_path})")
    following = asyncio.create_task(_follow(process, spec, coordinator, channel, view))
    ending = asyncio.create_task(process.wait())
    try:
        await asyncio.wait((following, ending), return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            raise UnavailableError(process.describe_end(ending.result()))
        view.note(following.result())
    finally:
        for task in (following, ending):
            task.cancel()
        await asyncio.gather(following, ending, return_exceptions=True)
        await process.stop()
        view.note(f"{spec.name} has ended")


async def _follow(
    process: ChildProcess, spec: ServiceSpec, coordinator: str, channel: ChannelOptions, view: View
) -> str:
    """Shows when the worker joins and leaves; returns why there is nothing left to join."""
    await wait_ready(process, spec.address, "", spec.channel)
    heard_at, joined, ended = time.monotonic(), False, False
    async with CoordinatorClient(coordinator, channel) as client:
        while True:
            try:
                # To the run's last snapshot: a coordinator that ends with its run has sent it before.
                async for response in client.watch_run(pb.WatchRunRequest(), timeout_s=STREAM_S):
                    heard_at, ended = time.monotonic(), response.run.phase in ENDED
                    if joined != (joined := spec.name in {worker.worker_id for worker in response.run.workers}):
                        view.note(f"{spec.name} {'has joined' if joined else 'is not registered any more'}")
            except NotFoundError:  # it has no run yet
                heard_at, ended = time.monotonic(), False
            except PerigeeError as error:
                if ended:
                    return "the run has ended, and its coordinator with it"
                if time.monotonic() - heard_at > SILENCE_S:
                    raise UnavailableError(f"{error.message} It stayed away for {SILENCE_S:g} s.") from error
            await asyncio.sleep(POLL_S)
