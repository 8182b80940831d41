"""Seconds until N receivers on hosts of their own have the weights, over links of limited bandwidth.

    python bench/weights_relay.py [--receivers 4] [--mib 64,256] [--mbit 200] [--modes star,chain,killed] [--rounds 1]
    python bench/weights_relay.py --modes local --mib 1024

Every node has a network namespace and a link that is limited both ways. Figures are multiples of size / bandwidth:
`star` has each receiver pull from the source, `chain` from the one before it, `killed` is a chain whose second
receiver is killed at half time. `local` is one receiver on the machine of the source, without a limit, beside a raw
socket that carries the same bytes, in turn, best of three each: `file` where it sees the source's shared memory, and
`loopback` where it does not; with what each process holds. Every piece is verified, and the whole image again at the
end. All but `local` need root and tc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
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
from services.weights.shared_memory import PREFIX

TOKEN = "bench-token-of-the-weights-relay"
PORT = 7000
HUB = "perigee-hub"
RAW_RECEIVER = """
import socket, sys
size = int(sys.argv[1])
data = memoryview(bytearray(size))
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
connection, _ = server.accept()
received = 0
while received < size:
    received += connection.recv_into(data[received:], min(1 << 20, size - received))
connection.sendall(b"x")
"""
# Names of one image, so that it can be pulled several times.
IMAGES = ("first", "second", "third")
# Nodes with folders of their own do not see one another's shared memory, as on other machines.
FOLDERS = Path("/dev/shm/perigee-relay")


class NodeConfig(ServiceConfig):
    """A node of the bench."""

    section = "node"


async def run_node(host: str, port: int, mib: int, folder: str) -> None:
    """Lends random weights, or pulls them when it is told from where on standard input."""
    torch.set_num_threads(1)
    weights = WeightsConfig(host=host, progress_timeout_s=3, shared_memory_dir=folder)
    receiver = WeightReceiver(weights, _accept, connect=lambda a: WeightSourceClient(a, ChannelOptions(token=TOKEN)))
    source, store = WeightSource(600), PieceStore(weights)

    @asynccontextmanager
    async def lifespan(app: App[NodeConfig]) -> AsyncIterator[None]:
        await receiver.start()
        served = source if mib else receiver.source
        add_WeightSourceServiceServicer_to_server(served, app.server)
        yield

    config = NodeConfig.model_validate({"server": {"host": host, "port": port, "token": TOKEN}})
    async with serving(config, lifespan):
        empty = count_own_bytes()
        digest = publish(source, store, mib) if mib else ""
        print(json.dumps({"digest": digest} | describe_memory(folder, empty)), flush=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            image_id, sources = json.loads(line)
            response = await receiver.Pull(pb.PullRequest(image_id=image_id, sources=sources), None)
            assert receiver.current is not None
            with receiver.current.buffer.view() as view:
                digest = xxhash.xxh3_128_hexdigest(view[: response.bytes])
            answer = {"digest": digest, "seconds": response.transfer_seconds, "sources": list(response.sources)}
            print(json.dumps(answer | describe_memory(folder, empty)), flush=True)
    # Closing Mooncake's engines takes seconds.
    os._exit(0)


def publish(source: WeightSource, store: PieceStore, mib: int) -> str:
    """Lends random weights under every name; returns their digest."""
    tensor = torch.randint(0, 256, (mib, 1 << 20), dtype=torch.uint8)
    exports = [store.fill(lambda: [TensorSlice("weights", tuple(tensor.shape), (0, 0), tensor)])]
    manifest, holdings = join_exports("bench", 1, exports)
    for image_id in IMAGES:
        source.lend(image_id, LentImage(manifest, holdings))
    return xxhash.xxh3_128_hexdigest(tensor.numpy())


def count_own_bytes() -> int:
    """Returns the bytes that are in memory for this process alone."""
    own: int = psutil.Process().memory_full_info().uss
    return own


def describe_memory(folder: str, empty: int) -> dict[str, int]:
    """Returns the bytes of this process's images, and what it has besides and did not have when it was empty."""
    shared = sum(path.stat().st_size for path in Path(folder).glob(f"{PREFIX}{os.getpid()}-*"))
    return {"images": shared, "besides": count_own_bytes() - empty - shared}


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


async def start_node(
    address: str, mib: int, folder: Path, prefix: Sequence[str] = ()
) -> tuple[asyncio.subprocess.Process, dict[str, Any]]:
    """Starts a node, with a command before it; returns it with its first answer, the digest of what it lends."""
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        *prefix, sys.executable, __file__, "--node", address, "--mib", str(mib), "--folder", str(folder),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return process, await read_answer(process)


def ask(process: asyncio.subprocess.Process, image_id: str, sources: Sequence[str]) -> None:
    """Has a node pull an image."""
    assert process.stdin is not None
    process.stdin.write(json.dumps([image_id, sources]).encode() + b"\n")


async def read_answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """Returns the next answer of a node, an empty one when it has died; log lines are passed over."""
    assert process.stdout is not None
    while line := await process.stdout.readline():
        with contextlib.suppress(json.JSONDecodeError):
            answer: dict[str, Any] = json.loads(line)
            if "digest" in answer:
                return answer
    return {}


async def measure(mode: str, receivers: int, mib: int, mbit: int, rounds: int) -> None:
    """Prints a line for each round, and the median."""
    ideal = mib * (1 << 20) * 8 / (mbit * 1e6)
    addresses = [f"10.77.0.{n + 1}:{PORT}" for n in range(receivers + 1)]
    plan = plan_sources(addresses[0], [], addresses[1:])
    sources = [addresses[:1] if mode == "star" else plan[address] for address in addresses[1:]]
    ratios: list[float] = []
    for number in range(rounds):
        # Nodes serve for several rounds, in the later ones of which buffers are there, unless one is killed.
        if number == 0 or mode == "killed":
            nodes = await asyncio.gather(
                *(
                    start_node(address, 0 if n else mib, FOLDERS / str(n), ("ip", "netns", "exec", f"perigee-node-{n}"))
                    for n, address in enumerate(addresses)
                )
            )
        processes = [process for process, _ in nodes]
        begin = time.monotonic()
        for process, each in zip(processes[1:], sources, strict=True):
            ask(process, IMAGES[number % len(IMAGES)], each)
        answers = [asyncio.create_task(read_answer(process)) for process in processes[1:]]
        if mode == "killed":
            await asyncio.sleep(ideal / 2)
            processes[2].send_signal(signal.SIGKILL)
        found = [answer for task in answers if (answer := await task)]
        seconds = time.monotonic() - begin
        ratios.append(seconds / ideal)
        whole = all(answer["digest"] == nodes[0][1]["digest"] for answer in found)
        print(
            f"{mode} 1->{receivers}, {mib} MiB, {mbit} Mbit/s: {seconds:.2f} s, {seconds / ideal:.2f} x size / "
            f"bandwidth; each {[round(answer['seconds'], 2) for answer in found]}; {len(found)} whole: {whole}; "
            f"fall-backs {sum(len(answer['sources']) - 1 for answer in found)}",
            flush=True,
        )
        if mode == "killed" or number == rounds - 1:
            await stop_nodes(processes)
    print(f"{mode} 1->{receivers}, {mib} MiB: median {statistics.median(ratios):.2f}", flush=True)


async def stop_nodes(processes: Sequence[asyncio.subprocess.Process]) -> None:
    """Kills nodes, as closing Mooncake's engines would take seconds, and removes what they leave."""
    for process in processes:
        if process.returncode is None:
            process.kill()
        await process.wait()
    shutil.rmtree(FOLDERS, ignore_errors=True)


async def measure_local(mib: int) -> None:
    """Prints the seconds of pulls and of a raw socket on one machine, and what source and receiver hold."""
    addresses = [f"127.0.0.1:{PORT + n}" for n in range(3)]
    (lender, lent), (near, _), (far, _) = [
        await start_node(address, 0 if n else mib, FOLDERS / ("far" if n == 2 else "near"))
        for n, address in enumerate(addresses)
    ]
    seconds: dict[str, list[float]] = {"file": [], "loopback": [], "raw socket": []}
    answers: dict[str, dict[str, Any]] = {"source": lent}
    for image_id in IMAGES:
        for name, process in (("file", near), ("loopback", far)):
            ask(process, image_id, addresses[:1])
            answers[name] = await read_answer(process)
            assert answers[name]["digest"] == lent["digest"]
            seconds[name].append(answers[name]["seconds"])
        seconds["raw socket"].append(await asyncio.to_thread(time_raw_socket, mib << 20))
    for name, measured in seconds.items():
        print(f"local {name}, {mib} MiB: {min(measured):.2f} s, {min(seconds['raw socket']) / min(measured):.2f} x")
    for name, answer in answers.items():
        images, besides = answer["images"] / (mib << 20), answer["besides"] / (1 << 20)
        print(f"local {name} holds {images:.2f} images in shared memory and {besides:.0f} MiB besides")
    await stop_nodes([lender, near, far])


def time_raw_socket(size: int) -> float:
    """Returns the seconds in which another process receives bytes over loopback into memory of its own."""
    child = subprocess.Popen([sys.executable, "-c", RAW_RECEIVER, str(size)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    data = memoryview(bytearray(size))
    with socket.create_connection(("127.0.0.1", int(child.stdout.readline()))) as connection:
        begin = time.monotonic()
        connection.sendall(data)
        connection.recv(1)
        seconds = time.monotonic() - begin
    child.wait()
    return seconds


async def run(arguments: argparse.Namespace) -> None:
    """Measures every mode for every size and number of receivers."""
    counts = [int(count) for count in arguments.receivers.split(",")]
    sizes = [int(size) for size in arguments.mib.split(",")]
    modes = arguments.modes.split(",")
    if "local" in modes:
        modes.remove("local")
        for mib in sizes:
            await measure_local(mib)
    if not modes:
        return
    make_network(max(counts) + 1, arguments.mbit)
    try:
        for mib in sizes:
            for mode in modes:
                for count in counts if mode != "killed" else counts[-1:]:
                    await measure(mode, count, mib, arguments.mbit, arguments.rounds)
    finally:
        remove_network(max(counts) + 1)


def main() -> None:
    """Runs as a node or as the driver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--receivers", default="4")
    parser.add_argument("--mib", default="64,256")
    parser.add_argument("--mbit", type=int, default=200)
    parser.add_argument("--modes", default="star,chain,killed")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--node", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    host, _, port = arguments.node.rpartition(":")
    if host:
        asyncio.run(run_node(host, int(port), int(arguments.mib), arguments.folder))
    else:
        asyncio.run(run(arguments))


if __name__ == "__main__":
    main()
