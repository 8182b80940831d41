"""Archives of files and replies of functions."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sandbox.agent.archive import (
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


@given(st.lists(st.builds(Reply, KINDS, st.binary(max_size=50)), max_size=6))
def test_replies_come_out_as_they_went_in(replies: list[Reply]) -> None:
    file = memory_file(b"".join(encode_reply(*reply) for reply in replies))
    assert read_replies(file, len(replies)) == replies
    os.close(file)
