"""CPU seconds that a million tokens cost on their way from a rollout worker to the buffer and on to the trainer.

Measures packed bytes, the contract's form, against the same messages with `repeated` fields, in turns on one buffer
service with a Valkey server of its own. CPU time of every process counts: the client's, the service's and Valkey's.

    python -m bench.token_hops [--trajectories 64] [--tokens 16384] [--chunk 512] [--rounds 3] [--out figures.json]

Ends with exit status 1 when a million tokens, in chunks of 512, take more than 0.35 s over both hops.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import psutil
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from pydantic import SecretStr

from bench.machine import describe_machine
from perigee.buffer.client import BufferClient
from perigee.buffer.packing import pack_logprobs, pack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from services.buffer import model, requests
from services.buffer.config import BufferConfig, LocalServerConfig
from services.buffer.local_server import local_server
from services.buffer.nodes import Nodes
from services.buffer.scripts import ScriptRunner
from services.buffer.service import lifespan
from services.kit.server import App, serving

CHUNK_TOKENS = 512
VOCABULARY = 150_000
MAX_CPU_SECONDS = 0.35
PACKAGE = "perigee.bench.v1"
# Begins the line by which the server process tells its address; log lines may come before it.
ADDRESS = "address:"
SERVICE = f"{PACKAGE}.RepeatedBuffer"


def repeated_messages() -> dict[str, Any]:
    """Returns the buffer's messages with `repeated` fields in place of packed bytes, by name."""
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    file.name, file.package = "bench/repeated.proto", PACKAGE
    file.ClearField("service")
    for message in file.message_type:
        for member in message.field:
            if member.type_name:
                member.type_name = member.type_name.replace("perigee.buffer.v1", PACKAGE)
            if member.name in ("token_ids", "prompt_token_ids", "logprobs"):
                member.label = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
                is_float = member.name == "logprobs"
                kind = descriptor_pb2.FieldDescriptorProto
                member.type = kind.TYPE_FLOAT if is_float else kind.TYPE_UINT32
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = ("Chunk", "VersionSpan", "AppendChunksRequest", "ReadTrajectoriesResponse")
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in names}


REPEATED = repeated_messages()


class RepeatedBuffer:
    """The two calls that carry tokens, with `repeated` fields, on the buffer's own model."""

    def __init__(self, scripts: ScriptRunner, config: BufferConfig) -> None:
        self._scripts = scripts
        self._config = config

    async def append(self, request: Any, context: Any) -> pb.AppendChunksResponse:
        """Appends chunks."""
        chunks = [
            pb.Chunk(
                trajectory_id=chunk.trajectory_id,
                epoch=chunk.epoch,
                offset=chunk.offset,
                token_ids=np.asarray(chunk.token_ids, dtype="<u4").tobytes(),
                logprobs=np.asarray(chunk.logprobs, dtype="<f4").tobytes(),
                versions=[
                    pb.VersionSpan(policy_version=span.policy_version, tokens=span.tokens) for span in chunk.versions
                ],
                end_reason=chunk.end_reason,
            )
            for chunk in request.chunks
        ]
        requests.check_chunks(chunks, self._config.limits)
        return pb.AppendChunksResponse(outcomes=await model.append_chunks(self._scripts, request.run_id, chunks))

    async def read(self, request: pb.ReadTrajectoriesRequest, context: Any) -> AsyncIterator[Any]:
        """Streams trajectories."""
        pieces = model.read_trajectories(self._scripts, request, self._config.read_piece_tokens, self._config.offload)
        async for piece in pieces:
            yield REPEATED["ReadTrajectoriesResponse"](
                trajectory_id=piece.trajectory_id,
                offset=piece.offset,
                token_ids=np.frombuffer(piece.token_ids, dtype="<u4").tolist(),
                logprobs=np.frombuffer(piece.logprobs, dtype="<f4").tolist(),
                versions=[
                    REPEATED["VersionSpan"](policy_version=span.policy_version, tokens=span.tokens)
                    for span in piece.versions
                ],
                last=piece.last,
            )


async def serve(folder: Path) -> None:
    """Serves both forms on one Valkey server, prints the address, and ends with standard input."""
    async with local_server(folder, LocalServerConfig()) as url:
        config = BufferConfig(redis_url=SecretStr(url))

        @asynccontextmanager
        async def both(app: App[BufferConfig]) -> AsyncIterator[None]:
            nodes = Nodes(url, connections=32, timeout_s=30)
            scripts = ScriptRunner(nodes, durability=config.durability, durability_timeout_s=10)
            async with lifespan(app):
                app.add(SERVICE, _add_handlers, RepeatedBuffer(scripts, config))
                yield
            await nodes.close()

        async with serving(config, both) as app:
            print(ADDRESS, app.address, flush=True)
            await asyncio.to_thread(sys.stdin.read)


def _add_handlers(servicer: RepeatedBuffer, server: grpc.aio.Server) -> None:
    append = grpc.unary_unary_rpc_method_handler(
        servicer.append, REPEATED["AppendChunksRequest"].FromString, pb.AppendChunksResponse.SerializeToString
    )
    read = grpc.unary_stream_rpc_method_handler(
        servicer.read,
        pb.ReadTrajectoriesRequest.FromString,
        REPEATED["ReadTrajectoriesResponse"].SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {"AppendChunks": append, "ReadTrajectories": read}),)
    )


Arrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
ChunkFields = dict[str, Any]


class Form(ABC):
    """One form of the token fields, at the client."""

    def __init__(self, client: BufferClient) -> None:
        self.client = client

    @abstractmethod
    async def append(self, run_id: str, chunks: Sequence[ChunkFields]) -> pb.AppendChunksResponse:
        """Appends chunks whose tokens are lists, as the engine gives them."""

    @abstractmethod
    async def read(self, run_id: str, ids: Sequence[str]) -> list[Arrays]:
        """Reads trajectories as the trainer's arrays."""


class PackedForm(Form):
    """Packed bytes."""

    async def append(self, run_id: str, chunks: Sequence[ChunkFields]) -> pb.AppendChunksResponse:
        packed = [
            pb.Chunk(
                **{
                    **fields,
                    "token_ids": pack_token_ids(fields["token_ids"]),
                    "logprobs": pack_logprobs(fields["logprobs"]),
                    "versions": [pb.VersionSpan(policy_version=1, tokens=len(fields["token_ids"]))],
                }
            )
            for fields in chunks
        ]
        return await self.client.append_chunks(pb.AppendChunksRequest(run_id=run_id, chunks=packed))

    async def read(self, run_id: str, ids: Sequence[str]) -> list[Arrays]:
        return [
            (
                np.frombuffer(stored.token_ids, dtype="<u4").astype(np.int64),
                np.frombuffer(stored.logprobs, dtype="<f4"),
            )
            async for stored in self.client.read_trajectories(run_id, ids, with_logprobs=True)
        ]


class RepeatedForm(Form):
    """`repeated` fields."""

    def __init__(self, client: BufferClient) -> None:
        super().__init__(client)
        self._append = client.channel.unary_unary(
            f"/{SERVICE}/AppendChunks",
            REPEATED["AppendChunksRequest"].SerializeToString,
            pb.AppendChunksResponse.FromString,
        )
        self._read = client.channel.unary_stream(
            f"/{SERVICE}/ReadTrajectories",
            pb.ReadTrajectoriesRequest.SerializeToString,
            REPEATED["ReadTrajectoriesResponse"].FromString,
        )

    async def append(self, run_id: str, chunks: Sequence[ChunkFields]) -> pb.AppendChunksResponse:
        messages = [
            REPEATED["Chunk"](
                **fields, versions=[REPEATED["VersionSpan"](policy_version=1, tokens=len(fields["token_ids"]))]
            )
            for fields in chunks
        ]
        response: pb.AppendChunksResponse = await self._append(
            REPEATED["AppendChunksRequest"](run_id=run_id, chunks=messages)
        )
        return response

    async def read(self, run_id: str, ids: Sequence[str]) -> list[Arrays]:
        arrays, pieces = [], []
        async for piece in self._read(
            pb.ReadTrajectoriesRequest(run_id=run_id, trajectory_ids=ids, with_logprobs=True)
        ):
            pieces.append(piece)
            if piece.last:
                tokens_T = np.concatenate([np.array(piece.token_ids, dtype=np.int64) for piece in pieces])
                logprobs_T = np.concatenate([np.array(piece.logprobs, dtype=np.float32) for piece in pieces])
                arrays.append((tokens_T, logprobs_T))
                pieces = []
        return arrays


@dataclass
class Cost:
    """CPU seconds of each process for a million tokens, one value per round."""

    client: list[float] = field(default_factory=list)
    service: list[float] = field(default_factory=list)
    valkey: list[float] = field(default_factory=list)


class Measurement:
    """Costs by form and hop; a process is read before and after each hop."""

    def __init__(self, service: psutil.Process, tokens: int) -> None:
        self._service = service
        (self._valkey,) = service.children()
        self._tokens = tokens
        self.costs: dict[str, Cost] = {}

    async def hop(self, name: str, work: Awaitable[Any]) -> Any:
        """Runs a hop and adds what it cost."""
        before = self._read()
        result = await work
        cost = self.costs.setdefault(name, Cost())
        seconds = [(after - start) / self._tokens * 1e6 for start, after in zip(before, self._read(), strict=True)]
        for values, value in zip((cost.client, cost.service, cost.valkey), seconds, strict=True):
            values.append(value)
        return result

    def _read(self) -> tuple[float, float, float]:
        times = [process.cpu_times() for process in (self._service, self._valkey)]
        service, valkey = (float(cpu.user + cpu.system) for cpu in times)
        return time.process_time(), service, valkey


async def create(client: BufferClient, run_id: str, ids: Sequence[str]) -> None:
    """Creates a run with one group of these trajectories, leased."""
    await client.create_run(pb.CreateRunRequest(run_id=run_id, config_digest="bench"))
    group = pb.NewGroup(group_id="g", prompt_id="p", prompt_token_ids=pack_token_ids([1]), trajectory_ids=ids)
    await client.create_groups(pb.CreateGroupsRequest(run_id=run_id, groups=[group]))
    await client.lease_trajectories(pb.LeaseTrajectoriesRequest(run_id=run_id, worker_id="w", trajectory_ids=ids))


async def append_all(
    form: Form, run_id: str, ids: Sequence[str], tokens: Sequence[int], logprobs: Any, chunk: int = CHUNK_TOKENS
) -> None:
    """Appends the same response to every trajectory, a chunk of each in one call."""
    for offset in range(0, len(tokens), chunk):
        last = offset + chunk >= len(tokens)
        chunks: list[ChunkFields] = [
            {
                "trajectory_id": trajectory_id,
                "epoch": 1,
                "offset": offset,
                "token_ids": tokens[offset : offset + chunk],
                "logprobs": logprobs[offset : offset + chunk],
                "end_reason": pb.END_REASON_STOP if last else pb.END_REASON_UNSPECIFIED,
            }
            for trajectory_id in ids
        ]
        response = await form.append(run_id, chunks)
        assert set(response.outcomes) == {pb.APPEND_OUTCOME_APPENDED}


async def measure(trajectories: int, length: int, chunk: int, rounds: int) -> dict[str, Cost]:
    """Runs both forms in turns; returns the costs by `form hop`."""
    generator = random.Random(0)
    tokens = [generator.randrange(VOCABULARY) for _ in range(length)]
    logprobs = [-generator.random() for _ in range(length)]
    ids = [f"t{index}" for index in range(trajectories)]
    with tempfile.TemporaryDirectory() as folder:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.token_hops", "--serve", folder),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = ""
            while not address.startswith(ADDRESS):
                address = (await process.stdout.readline()).decode()
            address = address.removeprefix(ADDRESS).strip()
            measurement = Measurement(psutil.Process(process.pid), trajectories * length)
            async with BufferClient.connect(address) as client:
                forms: dict[str, Form] = {"packed": PackedForm(client), "repeated": RepeatedForm(client)}
                for number in range(rounds):
                    for name, form in forms.items():
                        run_id = f"{name}-{number}"
                        await create(client, run_id, ids)
                        appending = append_all(form, run_id, ids, tokens, logprobs, chunk)
                        await measurement.hop(f"{name} append", appending)
                        arrays = await measurement.hop(f"{name} read", form.read(run_id, ids))
                        assert all(tokens_T.tolist() == tokens for tokens_T, _ in arrays)
                        consumed = pb.CommitIterationRequest(run_id=run_id, iteration=1, consumed_group_ids=["g"])
                        await client.commit_iteration(consumed)
            return measurement.costs
        finally:
            process.stdin.close()
            await process.wait()


def summarize(costs: dict[str, Cost]) -> dict[str, dict[str, float]]:
    """Returns the median CPU seconds of each hop by process, and the sum over both hops of each form."""
    table = {
        name: {part: round(statistics.median(values), 4) for part, values in vars(cost).items()}
        for name, cost in costs.items()
    }
    for form in ("packed", "repeated"):
        hops = [table[f"{form} {hop}"] for hop in ("append", "read")]
        table[form] = {part: round(sum(hop[part] for hop in hops), 4) for part in hops[0]}
    for row in table.values():
        row["total"] = round(sum(row.values()), 4)
    return table


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trajectories", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--chunk", type=int, default=CHUNK_TOKENS, help="tokens that are appended at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve))
        return
    costs = asyncio.run(measure(arguments.trajectories, arguments.tokens, arguments.chunk, arguments.rounds))
    figures = {"machine": describe_machine(), "cpu_seconds_per_million_tokens": summarize(costs)}
    text = json.dumps(figures, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    total = figures["cpu_seconds_per_million_tokens"]["packed"]["total"]  # type: ignore[index]
    if arguments.chunk == CHUNK_TOKENS and total > MAX_CPU_SECONDS:
        sys.exit(f"{total} s of CPU per million tokens, {MAX_CPU_SECONDS} at most")


if __name__ == "__main__":
    main()
