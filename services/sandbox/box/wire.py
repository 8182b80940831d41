"""Frames on the socket between the service and an agent.

A frame is `u32 total, u32 header length, header (JSON object), blobs`; the header's `blobs` lists the blobs' lengths.
All integers are big-endian. Blobs carry sources, inputs and outputs as they are, so nothing is escaped or decoded on
the way.
"""

from __future__ import annotations

import json
import struct
from typing import Any, NamedTuple

PREFIX = struct.Struct(">II")
MAX_FRAME_BYTES = 256 * 1024 * 1024


class Frame(NamedTuple):
    """A header and the bytes that go with it."""

    header: dict[str, Any]
    blobs: list[bytes]


def encode(header: dict[str, Any], blobs: list[bytes]) -> bytes:
    """The frame as bytes."""
    header_bytes = json.dumps({**header, "blobs": [len(blob) for blob in blobs]}).encode()
    total = len(header_bytes) + sum(map(len, blobs))
    return b"".join([PREFIX.pack(total, len(header_bytes)), header_bytes, *blobs])


def decode_prefix(prefix: bytes) -> tuple[int, int]:
    """(bytes that follow, bytes of the header); raises ValueError when the lengths cannot be right."""
    total, header_length = PREFIX.unpack(prefix)
    if header_length > total or total > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {total} bytes with a header of {header_length}")
    return total, header_length


def decode_body(body: bytes, header_length: int) -> Frame:
    """The frame whose body follows its prefix; raises ValueError when the blobs do not fill it."""
    header = json.loads(body[:header_length])
    blobs, offset = [], header_length
    for length in header.pop("blobs"):
        blobs.append(body[offset : offset + length])
        offset += length
    if offset != len(body):
        raise ValueError(f"blobs end at {offset} of {len(body)} bytes")
    return Frame(header, blobs)


def read_frame(descriptor_read: Any) -> Frame:
    """One frame through `descriptor_read(count) -> bytes`, which returns all `count` bytes or raises EOFError."""
    total, header_length = decode_prefix(descriptor_read(PREFIX.size))
    return decode_body(descriptor_read(total), header_length)
