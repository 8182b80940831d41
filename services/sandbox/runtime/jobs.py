"""Jobs of the sandbox; their results are the contract's messages."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from perigee.sandbox.compare import Comparison, Tolerance
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.protocol import Limits
from services.sandbox.languages.catalog import Runtime

Comparator = Comparison | Tolerance


@dataclass(frozen=True)
class Program:
    """Source with all that it needs to be compiled and run."""

    runtime: Runtime
    source: bytes
    limits: Limits
    compile_limits: Limits
    files: Sequence[pb.File] = ()
    environment: dict[str, str] = field(default_factory=dict)
    archives: Sequence[pb.Archive] = ()
    """Unpacked into the working folder before the files are placed."""
    loopback: bool = False
    """Whether it has a loopback device, and may make sockets of TCP and UDP."""
    command: tuple[str, ...] = ()
    """Run instead of a source, with archives for files."""
    any_links: bool = False
    """Whether its archives may have links to what is not below their folder."""
    compile_arguments: tuple[str, ...] = ()


def make_tar(files: Iterable[pb.File]) -> bytes:
    """Packs files into a tar."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        for file in files:
            member = tarfile.TarInfo(file.path)
            member.size, member.mode = len(file.content), 0o755 if file.executable else 0o644
            tar.addfile(member, io.BytesIO(file.content))
    return output.getvalue()


@dataclass(frozen=True)
class Checker:
    """Checker or interactor of the caller."""

    program: Program
    protocol: pb.CheckerProtocol.ValueType = pb.CHECKER_PROTOCOL_TESTLIB
    points_scale: pb.PointsScale.ValueType = pb.POINTS_SCALE_UNSPECIFIED
    arguments: tuple[str, ...] = ()
    replace_arguments: bool = False


@dataclass(frozen=True)
class Job:
    """Program to run once."""

    program: Program
    request: pb.ExecuteRequest


@dataclass(frozen=True)
class Submission:
    """Program or function with its tests, all of one kind."""

    program: Program
    request: pb.JudgeRequest
    comparator: Comparator
    expected: Sequence[object] = ()
    """Values that function tests expect, read from their JSON."""
    checker: Checker | None = None
    interactor: Checker | None = None
