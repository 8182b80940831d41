"""Processes of a trainer over several machines."""

from __future__ import annotations

import queue
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from perigee.errors import InvalidArgumentError, UnavailableError
from services.kit.config import ServerConfig
from services.trainer.__main__ import torchrun_arguments
from services.trainer.config import TrainerConfig
from services.trainer.machines import MachineWatch, check_hosts, connect_machines, reached_host


def config(**fields: Any) -> TrainerConfig:
    return TrainerConfig(model="m", run_path="r", data_parallel=4, **fields)


def test_each_machine_starts_its_share_of_the_processes() -> None:
    nodes = config(nodes=2, node_rank=1, master_address="trainer-0", master_port=29501)
    line = " ".join(torchrun_arguments(nodes))
    assert "--nproc-per-node 2 --nnodes 2 --node-rank 1 --master-addr trainer-0 --master-port 29501" in line
    assert "--nproc-per-node 4 --standalone" in " ".join(torchrun_arguments(config()))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"nodes": 3, "master_address": "a"}, "nodes must divide the 4 processes"),
        ({"nodes": 2, "node_rank": 2, "master_address": "a"}, "node_rank must be below nodes"),
        ({"nodes": 2}, "master_address is required"),
    ],
)
def test_nodes_that_cannot_be_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        config(**fields)


def test_a_machine_is_reached_at_its_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    shared = ServerConfig(advertise_host="192.0.2.7")
    assert reached_host(shared, 0) == "192.0.2.7"
    # The address is another machine's, and so machine 1 takes the one from which it reaches machine 0.
    assert reached_host(shared, 1) == "127.0.0.1"
    assert reached_host(ServerConfig(), 1) == "127.0.0.1"
    monkeypatch.setattr("services.trainer.machines.is_own", lambda _: True)
    assert reached_host(shared, 1) == "192.0.2.7"


class Channel:
    """A channel between rank 0 and one other rank, in threads."""

    def __init__(self, *others: Any) -> None:
        self.others = others
        self.sent: queue.Queue[Any] = queue.Queue()

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]

    def broadcast(self, value: Any) -> Any:
        if value is None:
            return self.sent.get(timeout=60)
        # Strangers are first to come; one of them leaves by a reset.
        with socket.create_connection(("127.0.0.1", value[0])) as stranger:
            stranger.sendall(bytes(16))
        stranger = socket.create_connection(("127.0.0.1", value[0]))
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stranger.close()
        self.sent.put(value)
        return value


def test_two_machines_under_one_address_are_refused() -> None:
    others: Any = Channel(("10.0.0.1", ("other", 1)), ("10.0.0.1", ("other", 1)))
    check_hosts(others, "10.0.0.2")
    with pytest.raises(InvalidArgumentError, match=r"weights\.host: 10\.0\.0\.1 stands for two machines"):
        check_hosts(others, "10.0.0.1")


def test_a_machine_0_without_a_port_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    offered: list[object] = []
    channel: Any = SimpleNamespace(broadcast=lambda value: offered.append(value))
    for rank in (0, 2):
        with pytest.raises(UnavailableError, match=r"opens no port for the others at no-such-host\.invalid"):
            connect_machines(channel, rank, 4, 2)
    assert offered == [None, None]


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection of machine 1 with machine 0, and the other end."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    channel: Any = Channel()
    with ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(connect_machines, channel, 0, 4, 2)
        [own] = connect_machines(channel, 2, 4, 2)
        [other] = accepting.result()
    with own, other:
        yield own, other


def test_the_end_of_a_machine_is_noticed(connection: tuple[socket.socket, socket.socket]) -> None:
    lost: queue.Queue[str] = queue.Queue()
    MachineWatch(connection[:1], 30, lost.put)
    connection[1].close()
    assert lost.get(timeout=60) == (
        "machine 127.0.0.1 of the trainer is gone (its process has ended); start all machines again"
    )


def test_an_end_in_good_order_is_no_loss(connection: tuple[socket.socket, socket.socket]) -> None:
    lost: queue.Queue[str] = queue.Queue()
    watch = MachineWatch(connection[:1], 30, lost.put)
    watch.close()
    watch._thread.join(60)
    assert not watch._thread.is_alive()
    assert lost.empty()
    connection[1].settimeout(60)
    assert connection[1].recv(1) == b""
