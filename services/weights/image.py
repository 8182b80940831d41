"""Weight images: the full weights of one policy version as safetensors shards, one after another in shared memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import xxhash

from perigee.errors import InvalidArgumentError
from services.weights.buffer import SharedBuffer, create_shared_file, discard_shared_file, room_errors
from services.weights.manifest import Manifest, Shard

# Shards, and the data inside them, begin at multiples of this, so that mapped tensors are aligned.
ALIGNMENT = 64
HEADER_LENGTH_BYTES = 8
HASH_CHUNK_BYTES = 8 << 20

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

NamedTensor = tuple[str, torch.Tensor]


class WeightImage:
    """One policy version in shared memory: shard i is `bytes` long at `offset` of the file `path`.

    The file may be longer than `total_bytes`. Whoever made the image closes it.
    """

    def __init__(self, manifest: Manifest, buffer: SharedBuffer) -> None:
        self.manifest = manifest
        self.buffer = buffer

    @property
    def run_id(self) -> str:
        """The run that the weights belong to."""
        return self.manifest.run_id

    @property
    def policy_version(self) -> int:
        """The policy version that the weights are."""
        return self.manifest.policy_version

    @property
    def path(self) -> Path:
        """The file in shared memory."""
        return self.buffer.path

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The safetensors files inside the image."""
        return self.manifest.shards

    @property
    def total_bytes(self) -> int:
        """Length of the image in bytes."""
        return self.manifest.total_bytes

    def close(self) -> None:
        """Removes the image; memory that a write still reads is let go of when the write has ended."""
        self.buffer.close()


def export_image(
    run_id: str,
    policy_version: int,
    tensors: Iterable[NamedTensor],
    max_shard_bytes: int,
    directory: str = "/dev/shm",
) -> WeightImage:
    """Packs tensors under their Hugging Face names into an image; blocking, one copy, at most a shard held at once.

    `tensors` is consumed once, so it may gather them one at a time.

    Raises InvalidArgumentError for no tensors, a name given twice or a type without a safetensors name, and
    ResourceExhaustedError when shared memory is full.
    """
    path, descriptor = create_shared_file(directory)
    try:
        shards = list(_write_shards(descriptor, directory, _cut_into_shards(tensors, max_shard_bytes)))
        if not shards:
            raise InvalidArgumentError.of("tensors", "an image needs at least one tensor")
        total_bytes = os.fstat(descriptor).st_size
        named = tuple(
            Shard(f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors", offset, size, checksum)
            for index, (offset, size, checksum) in enumerate(shards)
        )
        return WeightImage(Manifest(run_id, policy_version, total_bytes, named), SharedBuffer(path, descriptor))
    except BaseException:
        discard_shared_file(path, descriptor)
        raise


def _cut_into_shards(tensors: Iterable[NamedTensor], max_shard_bytes: int) -> Iterator[list[NamedTensor]]:
    shard: list[NamedTensor] = []
    shard_bytes = 0
    names: set[str] = set()
    for name, tensor in tensors:
        if name in names:
            raise InvalidArgumentError.of("tensors", f"{name} is given twice")
        if tensor.dtype not in DTYPE_NAMES:
            raise InvalidArgumentError.of("tensors", f"{name} has type {tensor.dtype}, which safetensors cannot hold")
        names.add(name)
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, shard_bytes = [], 0
        shard.append((name, tensor))
        shard_bytes += tensor.nbytes
    if shard:
        yield shard


def _write_shards(
    descriptor: int, directory: str, shards: Iterable[list[NamedTensor]]
) -> Iterator[tuple[int, int, str]]:
    """Writes each shard and yields its offset, bytes and checksum."""
    offset = 0
    for shard in shards:
        hasher = xxhash.xxh3_128()
        header = _build_header(shard)
        size = len(header)
        with room_errors(directory, sum(tensor.nbytes for _, tensor in shard)):
            _write_hashed(descriptor, memoryview(header), hasher)
            for _, tensor in shard:
                size += tensor.nbytes
                _write_hashed(descriptor, _to_bytes(tensor), hasher)
            padding = -size % ALIGNMENT
            _write_hashed(descriptor, memoryview(bytes(padding)), xxhash.xxh3_128())
        yield offset, size, hasher.hexdigest()
        offset += size + padding


def _build_header(shard: list[NamedTensor]) -> bytes:
    """A safetensors header: its length as 8 bytes little-endian, then JSON padded with spaces."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in shard:
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(HEADER_LENGTH_BYTES + len(text)) % ALIGNMENT)
    return len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text


def _to_bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an ndarray is a buffer


def _write_hashed(descriptor: int, data: memoryview, hasher: xxhash.xxh3_128) -> None:
    # In chunks that stay in the cache between the checksum and the copy.
    for begin in range(0, len(data), HASH_CHUNK_BYTES):
        chunk = data[begin : begin + HASH_CHUNK_BYTES]
        hasher.update(chunk)
        while chunk:
            chunk = chunk[os.write(descriptor, chunk) :]
