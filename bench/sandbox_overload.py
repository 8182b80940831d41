"""What a service does with more than it can take: many calls at once, large requests, compressed ones, busy neighbours.

    python bench/sandbox_overload.py [--calls 2000] [--megabytes 200]

As root. A probe in a process of its own asks for /healthz all the time: the longest answer bounds how long the event
loop was held.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import psutil
from sandbox_service import HOST, Service, sandbox_service

from perigee.errors import PerigeeError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceStub

MIB = 1 << 20
BUSY = b"while True: pass"
BUSY_MS = 6000


def probe(port: int) -> None:
    """Asks for /healthz until standard input ends; prints a line once it has begun, then the longest time that an
    answer took, in milliseconds.
    """
    os.set_blocking(0, False)
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    longest = 0.0
    while sys.stdin.buffer.read(1) is None:
        begin = time.perf_counter()
        connection.request("GET", "/healthz")
        connection.getresponse().read()
        if not longest:
            print("begun", flush=True)
        longest = max(longest, time.perf_counter() - begin)
        time.sleep(0.002)
    print(round(1000 * longest, 1))


@contextlib.asynccontextmanager
async def probed(service: Service, what: str) -> AsyncIterator[None]:
    """Prints how long the service was held at most, and its memory, during the block."""
    command = [sys.executable, __file__, "--probe", str(service.http_port)]
    prober = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: ASYNC220
    assert prober.stdout is not None
    await asyncio.to_thread(prober.stdout.readline)
    process, peak = psutil.Process(service.pid), 0

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, process.memory_info().rss)
            await asyncio.sleep(0.02)

    sampling = asyncio.create_task(watch())
    try:
        yield
    finally:
        await asyncio.sleep(0.5)
        sampling.cancel()
        held, _ = await asyncio.to_thread(prober.communicate)
        print(f"{what}: held {held.decode().strip()} ms at most, memory {peak / MIB:.0f} MiB at most")


async def send_burst(service: Service, calls: int) -> Counter[str]:
    """Sends all calls at once on one channel; returns how many ended with each code."""
    request = pb.ExecuteRequest(language="python", source=b"pass")

    async def call() -> str:
        try:
            return pb.Status.Name((await service.client.execute(request, timeout_s=110.0)).status)
        except PerigeeError as error:
            return error.code.name

    return Counter(await asyncio.gather(*(call() for _ in range(calls))))


async def send_large(service: Service, size: int, compression: grpc.Compression) -> str:
    """Sends one request of `size` bytes; returns how it ended."""
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(service.client.target, options=options, compression=compression) as channel:
        file = pb.File(path="large", content=bytes(size))
        try:
            await SandboxServiceStub(channel).Execute(
                pb.ExecuteRequest(language="python", source=b"pass", files=[file]), timeout=110
            )
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        return "OK"


def post_large(port: int, size: int) -> str:
    """Sends one body of `size` bytes; returns the status."""
    connection = http.client.HTTPConnection(HOST, port, timeout=110)
    body = b'{"language": "python", "source": "pass", "stdin": "' + b"x" * size + b'"}'
    try:
        connection.request("POST", "/v1/execute", body, {"content-type": "application/json"})
    except (BrokenPipeError, ConnectionResetError):
        return "closed"
    return str(connection.getresponse().status)


async def measure_share(service: Service, jobs: int) -> None:
    """Prints what busy jobs get of the cores beside as many busy processes again."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True) for _ in range(jobs)]  # noqa: ASYNC220
    begin = time.perf_counter()
    try:
        limits = pb.Limits(wall_ms=BUSY_MS, cpu_ms=100_000)
        request = pb.ExecuteRequest(language="python", source=BUSY, limits=limits)
        responses = await asyncio.gather(*(service.client.execute(request, timeout_s=60.0) for _ in range(jobs)))
        seconds = time.perf_counter() - begin
        of_others = [sum(psutil.Process(each.pid).cpu_times()[:2]) / seconds for each in others]
    finally:
        for each in others:
            each.kill()
            each.wait()
    of_jobs = [response.cpu_ms / BUSY_MS for response in responses]
    print(f"cores of each job {[round(each, 2) for each in of_jobs]}, of each process beside them", end=" ")
    print([round(each, 2) for each in of_others])


async def main() -> None:
    """Prints all figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--megabytes", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.probe:
        probe(arguments.probe)
        return
    size = arguments.megabytes * 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        async with sandbox_service(Path(folder), "auto", http=True, slots=2) as service:
            async with probed(service, f"{arguments.calls} calls at once"):
                print(json.dumps(await send_burst(service, arguments.calls)))
            for name, compression in (("gRPC", grpc.Compression.NoCompression), ("gzip", grpc.Compression.Gzip)):
                async with probed(service, f"{name}, {arguments.megabytes} MB"):
                    print(await send_large(service, size, compression))
            async with probed(service, f"8 times gzip, {arguments.megabytes} MB"):
                sending = (send_large(service, size, grpc.Compression.Gzip) for _ in range(8))
                print(json.dumps(Counter(await asyncio.gather(*sending))))
            async with probed(service, f"HTTP, {arguments.megabytes} MB"):
                assert service.http_port is not None
                print(await asyncio.to_thread(post_large, service.http_port, size))
            await measure_share(service, 2)


if __name__ == "__main__":
    asyncio.run(main())
