"""The files that cross the wall of a box: parcels go in and out, replies of a function come out.

A parcel is `u32 header length, header (JSON), blobs`; the header lists the blobs' lengths. A reply is `u32 length,
kind, payload`. All integers are big-endian; nothing is escaped.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

_PARCEL_PREFIX = struct.Struct(">I")
_REPLY_PREFIX = struct.Struct(">Ic")
VALUE, NOT_JSON, EXCEPTION, LOADED, COMPILE_ERROR, TOO_LONG = b"v", b"n", b"e", b"l", b"c", b"o"


class Parcel(NamedTuple):
    """A header and the blobs that it tells of."""

    header: dict[str, Any]
    blobs: list[bytes]


class Reply(NamedTuple):
    """One answer of a loaded submission."""

    kind: bytes
    payload: bytes


def encode_parcel(header: dict[str, Any], blobs: Sequence[bytes]) -> bytes:
    """A parcel as the contents of a file."""
    text = json.dumps({**header, "lengths": [len(blob) for blob in blobs]}).encode()
    return b"".join([_PARCEL_PREFIX.pack(len(text)), text, *blobs])


def read_parcel(descriptor: int) -> Parcel:
    """The parcel in a file; raises ValueError when its parts do not fill it."""
    size = os.fstat(descriptor).st_size
    contents = _read(descriptor, size)
    [header_length] = _PARCEL_PREFIX.unpack_from(contents)
    offset = _PARCEL_PREFIX.size + header_length
    header = json.loads(contents[_PARCEL_PREFIX.size : offset])
    blobs = []
    for length in header.pop("lengths"):
        blobs.append(contents[offset : offset + length])
        offset += length
    if offset != size:
        raise ValueError(f"the parcel's parts end at {offset} of {size} bytes")
    return Parcel(header, blobs)


def _read(descriptor: int, size: int) -> bytes:
    """One read gives at most 2 GiB less a page."""
    parts: list[bytes] = []
    offset = 0
    while offset < size and (part := os.pread(descriptor, size - offset, offset)):
        parts.append(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def encode_reply(kind: bytes, payload: bytes) -> bytes:
    """One reply as it is appended to the file of replies."""
    return _REPLY_PREFIX.pack(len(payload), kind) + payload


def read_replies(descriptor: int, count: int, limit: int) -> list[Reply]:
    """The first `count` replies of a file that the submission could have written to; fewer when what follows is not a
    reply.

    A payload longer than `limit` is not read: its reply is of kind TOO_LONG.
    """
    replies: list[Reply] = []
    offset = 0
    while len(replies) < count:
        prefix = os.pread(descriptor, _REPLY_PREFIX.size, offset)
        if len(prefix) < _REPLY_PREFIX.size:
            break
        length, kind = _REPLY_PREFIX.unpack(prefix)
        offset += _REPLY_PREFIX.size
        if length > limit:
            replies.append(Reply(TOO_LONG, b""))
        else:
            payload = os.pread(descriptor, length, offset)
            if len(payload) < length:
                break
            replies.append(Reply(kind, payload))
        offset += length
    return replies
