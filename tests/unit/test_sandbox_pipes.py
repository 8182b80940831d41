"""What a program reads and writes passes through pipes into the service's files."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest

from services.sandbox.agent.protocol import memory_file
from services.sandbox.agent.streams import Streams

LARGE = bytes(range(256)) * 4096


@pytest.fixture
def files() -> Iterator[list[int]]:
    """Files for input and outputs, 1 MiB to be read."""
    opened = [memory_file(content) for content in (LARGE, b"", b"")]
    yield opened
    for file in opened:
        os.close(file)


def test_an_input_larger_than_a_pipe_comes_whole(files: list[int]) -> None:
    streams = Streams(files, 100)
    reader = os.dup(streams.handed[0])
    streams.release()
    read = b""
    while chunk := os.read(reader, 1 << 16):
        read += chunk
        streams.move()
    os.close(reader)
    streams.close()
    assert read == LARGE


def test_an_output_is_moved_up_to_one_byte_beyond_its_limit(files: list[int]) -> None:
    streams = Streams(files, 100)
    os.write(streams.handed[1], b"x" * 500)
    os.write(streams.handed[2], b"y" * 50)
    streams.move()
    assert [os.fstat(file).st_size for file in files[1:]] == [101, 50]
    streams.close()


def test_opening_an_output_anew_keeps_what_was_written(files: list[int]) -> None:
    streams = Streams(files, 100)
    os.write(streams.handed[1], b"one\n")
    with open(f"/proc/self/fd/{streams.handed[1]}", "w") as again:
        again.write("two\n")
    os.write(streams.handed[1], b"three\n")
    streams.move()
    streams.close()
    assert os.pread(files[1], 100, 0) == b"one\ntwo\nthree\n"


def test_streams_that_have_ended_leave_the_pollers(files: list[int]) -> None:
    streams = Streams(files, 100)
    poller, patient = select.poll(), select.poll()
    streams.poll(poller, patient)
    os.write(streams.handed[1], b"x")
    assert poller.poll(0)
    assert not patient.poll(0)  # which waits for ends alone
    streams.release()  # as a program that closes all of them
    assert patient.poll(0)
    while poller.poll(0):
        streams.move()
    assert not patient.poll(0)
    streams.close()


def test_an_input_can_stay_a_file(files: list[int]) -> None:
    streams = Streams(files, 100, input_is_file=True)
    assert streams.handed[0] == files[0]
    assert streams.handed[1] != files[1]
    streams.close()


def test_other_descriptors_are_handed_on(files: list[int]) -> None:
    reader, writer = os.pipe()
    streams = Streams([reader, writer, files[2]], 100)
    assert streams.handed[:2] == [reader, writer]
    assert streams.handed[2] != files[2]
    streams.close()
    os.close(reader)
    os.close(writer)
