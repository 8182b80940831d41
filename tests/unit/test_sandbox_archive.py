"""Archives of files and replies of functions."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sandbox.agent.archive import (
    TOO_LONG,
    VALUE,
    Archive,
    Reply,
    encode_archive,
    encode_reply,
    read_archive,
    read_replies,
)
from services.sandbox.agent.protocol import memory_file

KINDS = st.sampled_from([b"v", b"n", b"e", b"l", b"c"])


@given(st.lists(st.binary(), max_size=5), st.lists(st.text(), max_size=3))
def test_an_archive_comes_out_as_it_went_in(blobs: list[bytes], arguments: list[str]) -> None:
    file = memory_file(encode_archive({"arguments": arguments}, blobs))
    assert read_archive(file) == Archive({"arguments": arguments}, blobs)
    os.close(file)


@given(st.binary(min_size=1))
def test_a_damaged_archive_is_refused(tail: bytes) -> None:
    file = memory_file(encode_archive({}, [b"x"]) + tail)
    with pytest.raises(ValueError, match="parts end at"):
        read_archive(file)
    os.close(file)


@given(st.lists(st.builds(Reply, KINDS, st.binary(max_size=50)), max_size=6), st.integers(0, 8))
def test_replies_come_out_as_they_went_in(replies: list[Reply], count: int) -> None:
    file = memory_file(b"".join(encode_reply(*reply) for reply in replies))
    assert read_replies(file, count, 50) == replies[:count]
    os.close(file)


@given(st.binary(max_size=200), st.integers(0, 10), st.integers(0, 100))
def test_forged_replies_are_never_more_or_longer_than_asked(contents: bytes, count: int, limit: int) -> None:
    file = memory_file(contents)
    replies = read_replies(file, count, limit)
    assert len(replies) <= count
    assert all(len(reply.payload) <= limit for reply in replies)
    os.close(file)


def test_a_reply_past_the_limit_is_not_read() -> None:
    file = memory_file(encode_reply(VALUE, b"x" * 11) + encode_reply(VALUE, b"y"))
    assert read_replies(file, 2, 10) == [Reply(TOO_LONG, b""), Reply(VALUE, b"y")]
    os.close(file)
