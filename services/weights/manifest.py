"""Weight images: the full weights of one policy version in shared memory, described by a manifest.

An image is one safetensors file (a shard) after another; the manifest names them, their places and checksums.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from perigee.errors import DataLossError, FieldViolation, InvalidArgumentError
from perigee.weights.v1 import weights_pb2 as pb
from services.weights.safetensors import ALIGNMENT, DTYPE_NAMES, NamedTensor, cut_into_shards, encode_file
from services.weights.shared_memory import SharedBuffer, create_shared_file, discard_shared_file, explain_full_memory

MAX_SHARDS = 16384
CHECKSUM_DIGITS = 32
HASH_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, eq=False)
class WeightImage:
    """One policy version in shared memory; whoever made it closes it.

    The shared file may be longer than the manifest's `total_bytes`.
    """

    manifest: pb.Manifest
    buffer: SharedBuffer

    @property
    def path(self) -> Path:
        """Returns the file in shared memory."""
        return self.buffer.path

    def close(self) -> None:
        """Removes the image; memory that a write still reads is released when the write has ended."""
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
        shards = list(_write_shards(descriptor, directory, cut_into_shards(_checked(tensors), max_shard_bytes)))
        if not shards:
            raise InvalidArgumentError.for_field("tensors", "an image needs at least one tensor")
        for index, shard in enumerate(shards):
            shard.name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        manifest = pb.Manifest(
            run_id=run_id,
            policy_version=policy_version,
            total_bytes=os.fstat(descriptor).st_size,
            shards=shards,
        )
        return WeightImage(manifest, SharedBuffer(path, descriptor))
    except BaseException:
        discard_shared_file(path, descriptor)
        raise


def _checked(tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
    """Yields the tensors; raises InvalidArgumentError for a name given twice, or a type that safetensors lacks."""
    names: set[str] = set()
    for name, tensor in tensors:
        if name in names:
            raise InvalidArgumentError.for_field("tensors", f"{name} is given twice")
        if tensor.dtype not in DTYPE_NAMES:
            reason = f"{name} has type {tensor.dtype}, which safetensors cannot hold"
            raise InvalidArgumentError.for_field("tensors", reason)
        names.add(name)
        yield name, tensor


def _write_shards(descriptor: int, directory: str, shards: Iterable[list[NamedTensor]]) -> Iterator[pb.Shard]:
    """Writes shards one after another; yields each without its name."""
    offset = 0
    for tensors in shards:
        hasher = xxhash.xxh3_128()
        size = 0
        with explain_full_memory(directory, sum(tensor.nbytes for _, tensor in tensors)):
            for piece in encode_file(tensors):
                size += len(piece)
                _write_hashed(descriptor, piece, hasher)
            padding = -size % ALIGNMENT
            _write_hashed(descriptor, memoryview(bytes(padding)), xxhash.xxh3_128())
        yield pb.Shard(offset=offset, bytes=size, checksum=hasher.hexdigest())
        offset += size + padding


def _write_hashed(descriptor: int, data: memoryview, hasher: xxhash.xxh3_128) -> None:
    # In chunks that stay in the cache between the checksum and the copy.
    for begin in range(0, len(data), HASH_CHUNK_BYTES):
        chunk = data[begin : begin + HASH_CHUNK_BYTES]
        hasher.update(chunk)
        while chunk:
            chunk = chunk[os.write(descriptor, chunk) :]


def check_manifest(manifest: pb.Manifest) -> None:
    """Raises InvalidArgumentError naming each field that cannot describe an image.

    Shards must be non-empty, in order, disjoint and inside the image.
    """
    violations = []
    if not manifest.run_id:
        violations.append(FieldViolation("manifest.run_id", "is required"))
    if not 1 <= len(manifest.shards) <= MAX_SHARDS:
        violations.append(FieldViolation("manifest.shards", f"must be 1 to {MAX_SHARDS}, got {len(manifest.shards)}"))
    end = 0
    for index, shard in enumerate(manifest.shards):
        field = f"manifest.shards[{index}]"
        if not shard.name:
            violations.append(FieldViolation(f"{field}.name", "is required"))
        if shard.offset < end:
            violations.append(FieldViolation(f"{field}.offset", f"overlaps the shard before, which ends at {end}"))
        if shard.bytes == 0:
            violations.append(FieldViolation(f"{field}.bytes", "must be at least 1"))
        end = shard.offset + shard.bytes
        if end > manifest.total_bytes:
            past = f"ends at {end}, past total_bytes {manifest.total_bytes}"
            violations.append(FieldViolation(f"{field}.bytes", past))
        if len(shard.checksum) != CHECKSUM_DIGITS or not set(shard.checksum) <= set(string.hexdigits.lower()):
            violations.append(FieldViolation(f"{field}.checksum", "must be 32 lower-case hexadecimal digits"))
    if violations:
        raise InvalidArgumentError.for_fields(violations)


def verify_shards(image: memoryview, manifest: pb.Manifest) -> None:
    """Compares every shard of the image's bytes with its checksum; takes a core, so call it in a thread.

    Raises DataLossError naming the first shard that differs.
    """
    for shard in manifest.shards:
        with image[shard.offset : shard.offset + shard.bytes] as data:
            found = xxhash.xxh3_128_hexdigest(data)
        if found != shard.checksum:
            raise DataLossError(
                f"shard {shard.name} of policy version {manifest.policy_version} arrived damaged: "
                f"checksum {found}, expected {shard.checksum}; push again"
            )
