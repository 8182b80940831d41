"""gRPC drops options whose names it does not know without a word, so that a misspelt one has no effect."""

from pathlib import Path
from typing import ClassVar

import pytest
from grpc._cython import cygrpc

from perigee.rpc import channel_arguments
from services.kit.config import ServiceConfig
from services.kit.server import server_arguments


class ProbeConfig(ServiceConfig):
    section: ClassVar[str] = "probe"


NAMES = sorted({name for name, _ in [*channel_arguments("a.B", ["C"]), *server_arguments(ProbeConfig())]})


@pytest.fixture(scope="module")
def library() -> bytes:
    """gRPC as it was compiled; its names of options end with a zero byte."""
    return Path(cygrpc.__file__).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_grpc_knows_every_option(name: str, library: bytes) -> None:
    assert f"{name}\0".encode() in library


def test_a_name_that_grpc_does_not_know_is_seen(library: bytes) -> None:
    assert b"grpc.keepalive_time_s\0" not in library
