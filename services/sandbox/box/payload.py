"""The two files that cross the wall of a box: the job that goes in, and the replies of a function that come out.

A job is `u32 header length, header (JSON), blobs`; the header lists the blobs' lengths. A reply is `u32 length, kind,
payload`. All integers are big-endian; nothing is escaped.
"""

from __future__ import annotations

import json
import os
import struct
from typing import Any, NamedTuple

_JOB_PREFIX = struct.Struct(">I")
_REPLY_PREFIX = struct.Struct(">Ic")
VALUE, NOT_JSON, EXCEPTION, LOADED, COMPILE_ERROR, TOO_LONG = b"v", b"n", b"e", b"l", b"c", b"o"


class Job(NamedTuple):
    """What a program's process reads: arguments and function name in the header; the source; an input per run."""

    header: dict[str, Any]
    source: bytes
    inputs: list[bytes]


class Reply(NamedTuple):
    """One answer of a loaded submission."""

    kind: bytes
    payload: bytes


def encode_job(job: Job) -> bytes:
    """The job as the contents of a file."""
    blobs = [job.source, *job.inputs]
    header = json.dumps({**job.header, "lengths": [len(blob) for blob in blobs]}).encode()
    return b"".join([_JOB_PREFIX.pack(len(header)), header, *blobs])


def read_job(descriptor: int) -> Job:
    """The job in a file; raises ValueError when its parts do not fill it."""
    size = os.fstat(descriptor).st_size
    contents = os.pread(descriptor, size, 0)
    [header_length] = _JOB_PREFIX.unpack_from(contents)
    offset = _JOB_PREFIX.size + header_length
    header = json.loads(contents[_JOB_PREFIX.size : offset])
    blobs = []
    for length in header.pop("lengths"):
        blobs.append(contents[offset : offset + length])
        offset += length
    if offset != size:
        raise ValueError(f"the job's parts end at {offset} of {size} bytes")
    return Job(header, blobs[0], blobs[1:])


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
