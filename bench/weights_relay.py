"""Seconds until N receivers on hosts of their own have the weights, over links of limited bandwidth.

    .venv/bin/python bench/weights_relay.py [--receivers 1,2,4] [--mib 256] [--mbit 200] [--modes star,chain,killed]

Every node has a network namespace and a link that is limited both ways. Figures are multiples of size / bandwidth:
`star` has each receiver pull from the source, `chain` from the one before it, `killed` is a chain whose second
receiver is killed at half time. Every piece is verified, and the whole image again at the end. Needs root and tc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
import xxhash

from perigee.rpc import ChannelOptions
from perigee.weights.client import WeightSourceClient
from perigee.weights.v1 import weights_pb2 as pb
from perigee.weights.v1.weights_pb2_grpc import add_WeightSourceServiceServicer_to_server
from services.coordinator.directory import plan_sources
from services.kit.config import ServiceConfig
from services.kit.server import App, serving
from services.weights.config import WeightsConfig
from services.weights.lend import LentImage, WeightSource
from services.weights.manifest import WeightImage
from services.weights.pieces import PieceStore, TensorSlice, join_exports
from services.weights.receive import WeightReceiver

TOKEN = "bench-token-of-the-weights-relay"
PORT = 7000
HUB = "perigee-hub"


class NodeConfig(ServiceConfig):
    """A node of the bench."""

    section = "node"


async def run_node(host: str, mib: int) -> None:
    """Lends random weights, or pulls them when it is told from where on standard input."""
    torch.set_num_threads(1)
    weights = WeightsConfig(host=host, progress_timeout_s=3)
    receiver = WeightReceiver(weights, _accept, connect=lambda a: WeightSourceClient(a, ChannelOptions(token=TOKEN)))
    source, store = WeightSource(600), PieceStore(weights)

    @asynccontextmanager
    async def lifespan(app: App[NodeConfig]) -> AsyncIterator[None]:
        await receiver.start()
        served = source if mib else receiver.source
        add_WeightSourceServiceServicer_to_server(served, app.server)
        yield

    config = NodeConfig.model_validate({"server": {"host": host, "port": PORT, "token": TOKEN}})
    async with serving(config, lifespan):
        digest = ""
        if mib:
            tensor = torch.randint(0, 256, (mib, 1 << 20), dtype=torch.uint8)
            digest = xxhash.xxh3_128_hexdigest(tensor.numpy())
            exports = [store.fill(lambda: [TensorSlice("weights", tuple(tensor.shape), (0, 0), tensor)])]
            manifest, holdings = join_exports("bench", 1, exports)
            source.lend("image", LentImage(manifest, holdings))
        print(json.dumps({"digest": digest}), flush=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            response = await receiver.Pull(pb.PullRequest(image_id="image", sources=json.loads(line)), None)
            assert receiver.current is not None
            with receiver.current.buffer.view() as view:
                digest = xxhash.xxh3_128_hexdigest(view[: response.bytes])
            seconds = response.transfer_seconds
            print(json.dumps({"digest": digest, "seconds": seconds, "sources": list(response.sources)}), flush=True)
    # Closing Mooncake's engines takes seconds.
    os._exit(0)


async def _accept(_: WeightImage) -> None:
    """There is no engine to load."""


def shell(command: str, check: bool = True) -> None:
    """Runs a command of several words."""
    subprocess.run(command.split(), check=check, capture_output=True)


def remove_network(nodes: int) -> None:
    """Removes the namespaces, and with them links and limits."""
    for name in [HUB, *(f"perigee-node-{n}" for n in range(nodes))]:
        shell(f"ip netns del {name}", check=False)


def make_network(nodes: int, mbit: int) -> None:
    """Makes a namespace for each node and a bridge between them."""
    remove_network(nodes)
    shell(f"ip netns add {HUB}")
    shell(f"ip -n {HUB} link add br0 type bridge")
    shell(f"ip -n {HUB} link set br0 up")
    for n in range(nodes):
        name = f"perigee-node-{n}"
        shell(f"ip netns add {name}")
        shell(f"ip link add pn{n} netns {name} type veth peer name ph{n} netns {HUB}")
        shell(f"ip -n {name} addr add 10.77.0.{n + 1}/24 dev pn{n}")
        for space, device in ((name, "lo"), (name, f"pn{n}"), (HUB, f"ph{n}")):
            shell(f"ip -n {space} link set {device} up")
        shell(f"ip -n {HUB} link set ph{n} master br0")
        for space, device in ((name, f"pn{n}"), (HUB, f"ph{n}")):
            limit = f"root tbf rate {mbit}mbit burst 256kb latency 100ms"
            shell(f"ip netns exec {space} tc qdisc add dev {device} {limit}")


async def start_node(number: int, mib: int) -> tuple[asyncio.subprocess.Process, str]:
    """Starts a node in its namespace; returns it with the digest of what it lends."""
    command = ["ip", "netns", "exec", f"perigee-node-{number}", sys.executable, __file__]
    process = await asyncio.create_subprocess_exec(
        *command, "--node", f"10.77.0.{number + 1}", "--mib", str(mib),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return process, (await read_answer(process))["digest"]


async def read_answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """Returns the next answer of a node, an empty one when it has died; log lines are passed over."""
    assert process.stdout is not None
    while line := await process.stdout.readline():
        with contextlib.suppress(json.JSONDecodeError):
            answer: dict[str, Any] = json.loads(line)
            if "digest" in answer:
                return answer
    return {}


async def measure(mode: str, receivers: int, mib: int, mbit: int) -> None:
    """Prints one line."""
    ideal = mib * (1 << 20) * 8 / (mbit * 1e6)
    nodes = await asyncio.gather(*(start_node(n, 0 if n else mib) for n in range(receivers + 1)))
    addresses = [f"10.77.0.{n + 1}:{PORT}" for n in range(receivers + 1)]
    plan = plan_sources(addresses[0], [], addresses[1:])
    begin = time.monotonic()
    for (process, _), address in zip(nodes[1:], addresses[1:], strict=True):
        assert process.stdin is not None
        sources = addresses[:1] if mode == "star" else plan[address]
        process.stdin.write(json.dumps(sources).encode() + b"\n")
    answers = [asyncio.create_task(read_answer(process)) for process, _ in nodes[1:]]
    if mode == "killed":
        await asyncio.sleep(ideal / 2)
        nodes[2][0].send_signal(signal.SIGKILL)
    found = [answer for task in answers if (answer := await task)]
    seconds = time.monotonic() - begin
    whole = all(answer["digest"] == nodes[0][1] for answer in found)
    print(
        f"{mode} 1->{receivers}, {mib} MiB, {mbit} Mbit/s: {seconds:.2f} s, {seconds / ideal:.2f} x size / bandwidth; "
        f"each {[round(answer['seconds'], 2) for answer in found]}; {len(found)} whole: {whole}; "
        f"fall-backs {sum(len(answer['sources']) - 1 for answer in found)}",
        flush=True,
    )
    for process, _ in nodes:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def run(arguments: argparse.Namespace) -> None:
    """Measures every mode for every number of receivers."""
    counts = [int(count) for count in arguments.receivers.split(",")]
    make_network(max(counts) + 1, arguments.mbit)
    try:
        for mode in arguments.modes.split(","):
            for count in counts if mode != "killed" else counts[-1:]:
                await measure(mode, count, arguments.mib, arguments.mbit)
    finally:
        remove_network(max(counts) + 1)


def main() -> None:
    """Runs as a node or as the driver."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--receivers", default="1,2,4")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--mbit", type=int, default=200)
    parser.add_argument("--modes", default="star,chain,killed")
    parser.add_argument("--node", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asyncio.run(run_node(arguments.node, arguments.mib) if arguments.node else run(arguments))


if __name__ == "__main__":
    main()
