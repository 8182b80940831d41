"""Messages between the service and the agent: a JSON header and open descriptors in one packet, over a SOCK_SEQPACKET
pair; requests to run a process, and their results.

Sources, inputs and outputs travel as memory files, so that they pass through no process that outlives the job.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_HEADER_BYTES = 128 * 1024
MAX_DESCRIPTORS = 16


class Message(NamedTuple):
    """Header and descriptors, which the receiver closes."""

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
    """Message as it was received."""

    data: bytes
    descriptors: list[int]


def receive_packet(control: socket.socket) -> Packet:
    """Receives the next packet; raises EOFError when the other end is gone, and BlockingIOError as the socket does."""
    data, descriptors, _, _ = socket.recv_fds(control, MAX_HEADER_BYTES, MAX_DESCRIPTORS)
    if not data:
        raise EOFError("the other end has closed the connection")
    return Packet(data, list(descriptors))


def receive(control: socket.socket) -> Message:
    """Receives the next message; errors as for `receive_packet`."""
    data, descriptors = receive_packet(control)
    return Message(json.loads(data), descriptors)


def memory_file(contents: bytes) -> int:
    """Returns a file in memory that reads `contents` from its start."""
    descriptor = os.memfd_create("perigee")
    rest = memoryview(contents)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


@dataclass(frozen=True)
class Limits:
    """Limits of one program: times in milliseconds for each test, sizes in bytes for the whole sandbox."""

    wall_ms: int
    cpu_ms: int
    memory_bytes: int
    processes: int
    file_bytes: int
    output_bytes: int
    files: int


class Preparation(NamedTuple):
    """Sandbox that is made for a program before its request comes: space and files of its folders, its network."""

    space_bytes: int = 16 << 20
    files: int = 4096
    loopback: bool = False


@dataclass(frozen=True)
class RunRequest:
    """Request to run one process.

    `mode` is `exec` (a command) or one of Python's own in `modes`. Messages carry the process's descriptors beside the
    request, from 0 on; for the modes of Python the last one is the job's archive. For a process with `answers`
    descriptors 3 and 4 are files of replies and of inputs, of which it gets pipes; it has its limits anew for each
    answer. What a run with `keep` leaves in the working folder is there for the later runs of the sandbox, and comes
    with the result where `collect_bytes` hold it. With `brings_files` one more descriptor comes with the request: an
    archive of files for this run alone. The last descriptors are tars or zips, one for each of `unpack`, which are
    unpacked before the process starts.
    """

    mode: str
    limits: Limits
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    answers: int = 0
    keep: bool = False
    brings_files: bool = False
    collect: list[str] = field(default_factory=list)
    collect_bytes: int = 0
    unpack: list[tuple[str, int]] = field(default_factory=list)
    """Folder of each archive, and how many leading folders are taken off its names."""
    any_links: bool = False
    pack: list[str] = field(default_factory=list)
    """Folders to collect as tars."""
    loopback: bool = False
    input_is_file: bool = False
    """Whether the standard input is a file, instead of a pipe."""

    @property
    def preparation(self) -> Preparation:
        """Sandbox that it needs."""
        return Preparation(self.limits.file_bytes, self.limits.files, self.loopback)

    def split(self, descriptors: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Splits a message's descriptors: the process's, those of files that it brings, those of archives."""
        own = len(descriptors) - len(self.unpack)
        first = own - self.brings_files
        return descriptors[:first], descriptors[first:own], descriptors[own:]

    def to_header(self) -> dict[str, Any]:
        """Returns the header of a message."""
        return {"kind": "run", **vars(self), "limits": vars(self.limits)}


def read_run_request(header: dict[str, Any]) -> RunRequest:
    """Reads the request from the header of a message."""
    fields = {name: value for name, value in header.items() if name != "kind"}
    return RunRequest(**{**fields, "limits": Limits(**fields["limits"])})


@dataclass
class RunResult:
    """Result of a run.

    `stop` is None when it ended by itself, else wall, cpu, memory, output, stopped (by the service) or exited (before
    its last answer). `exit_code` is None when a signal ended it. Times are in microseconds; `answers_us` are those of
    the answers. `peak_bytes` is None when memory is not measured. `start_error` is an errno when the command could not
    be executed. `refused` says why the archive of an index was not unpacked, and nothing run.
    """

    stop: str | None = None
    exit_code: int | None = 0
    signal: int = 0
    wall_us: int = 0
    cpu_us: int = 0
    peak_bytes: int | None = None
    answers_us: list[int] = field(default_factory=list)
    start_error: int = 0
    refused_index: int = 0
    refused: str = ""

    @property
    def wall_ms(self) -> int:
        """Wall time, rounded up."""
        return -(-self.wall_us // 1000)

    @property
    def cpu_ms(self) -> int:
        """CPU time, rounded up."""
        return -(-self.cpu_us // 1000)
