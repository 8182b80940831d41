"""Messages between the service and a box: a JSON header and open descriptors, one packet each, over a SOCK_SEQPACKET
pair.

Sources, inputs and outputs travel as memory files, so that they pass through no process that outlives the job.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any, NamedTuple

MAX_HEADER_BYTES = 128 * 1024
MAX_DESCRIPTORS = 16


class Message(NamedTuple):
    """A header, and descriptors that the receiver closes."""

    header: dict[str, Any]
    descriptors: list[int]

    def close(self) -> None:
        """Closes the descriptors."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def send(control: socket.socket, header: dict[str, Any], descriptors: list[int]) -> None:
    """Sends one message; the sender keeps its own copies of the descriptors."""
    socket.send_fds(control, [json.dumps(header).encode()], descriptors)


class Packet(NamedTuple):
    """A message as it came."""

    data: bytes
    descriptors: list[int]


def receive_packet(control: socket.socket) -> Packet:
    """The next packet; raises EOFError when the other side is gone, and BlockingIOError as the socket does."""
    data, descriptors, _, _ = socket.recv_fds(control, MAX_HEADER_BYTES, MAX_DESCRIPTORS)
    if not data:
        raise EOFError("the other side has closed the box")
    return Packet(data, list(descriptors))


def receive(control: socket.socket) -> Message:
    """The next message; errors as for `receive_packet`."""
    data, descriptors = receive_packet(control)
    return Message(json.loads(data), descriptors)


def memory_file(contents: bytes) -> int:
    """A file in memory that reads `contents` from its start."""
    descriptor = os.memfd_create("perigee")
    rest = memoryview(contents)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
