"""The manifest of a weight image: its shards, where they lie, their checksums; to and from protobuf; verification."""

from __future__ import annotations

import string
from dataclasses import dataclass

import xxhash

from perigee.errors import DataLossError, FieldViolation, InvalidArgumentError
from perigee.weights.v1 import weights_pb2 as pb

MAX_SHARDS = 16384
CHECKSUM_DIGITS = 32


@dataclass(frozen=True)
class Shard:
    """One complete safetensors file at `offset` of the image; `checksum` is its xxh3-128 in hexadecimal."""

    name: str
    offset: int
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What a receiver must know to accept one policy version of a run."""

    run_id: str
    policy_version: int
    total_bytes: int
    shards: tuple[Shard, ...]


def manifest_to_proto(manifest: Manifest) -> pb.Manifest:
    """The manifest as a message."""
    return pb.Manifest(
        run_id=manifest.run_id,
        policy_version=manifest.policy_version,
        total_bytes=manifest.total_bytes,
        shards=[pb.Shard(name=s.name, offset=s.offset, bytes=s.bytes, checksum=s.checksum) for s in manifest.shards],
    )


def manifest_from_proto(message: pb.Manifest) -> Manifest:
    """The message as a manifest.

    Raises InvalidArgumentError naming each field that cannot describe an image: shards must be non-empty, in
    order, disjoint and inside the image.
    """
    manifest = Manifest(
        run_id=message.run_id,
        policy_version=message.policy_version,
        total_bytes=message.total_bytes,
        shards=tuple(Shard(s.name, s.offset, s.bytes, s.checksum) for s in message.shards),
    )
    violations = find_violations(manifest)
    if violations:
        first = violations[0]
        raise InvalidArgumentError(f"{first.field}: {first.description}", violations=violations)
    return manifest


def find_violations(manifest: Manifest) -> list[FieldViolation]:
    """What is wrong with the manifest, field by field; empty when nothing is."""
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
    return violations


def verify_shards(image: memoryview, manifest: Manifest) -> None:
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
