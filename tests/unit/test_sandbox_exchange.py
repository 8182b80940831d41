"""The exchange of inputs and replies with a process that answers one question after another."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from services.sandbox.agent.archive import LOADED, VALUE, Reply, encode_inputs, encode_reply, read_replies
from services.sandbox.agent.exchange import Exchange, ReplyTooLongError
from services.sandbox.agent.protocol import memory_file

INPUTS = [b"[1]", b"[2]", b"x" * 200_000]
LOADED_REPLY = encode_reply(LOADED, b"")


@pytest.fixture
def replies() -> Iterator[int]:
    file = memory_file(b"")
    yield file
    os.close(file)


@pytest.fixture
def exchange(replies: int) -> Iterator[Exchange]:
    inputs = memory_file(encode_inputs(INPUTS))
    exchange = Exchange(replies, inputs, 100)
    for descriptor in (*exchange.process_ends, exchange._replies, exchange._inputs):
        os.set_blocking(descriptor, False)
    yield exchange
    exchange.close()
    exchange.close_process_ends()
    os.close(inputs)


def answer(exchange: Exchange, reply: bytes) -> int:
    """Sends bytes of replies; returns how many replies are complete, each followed by the next input."""
    os.write(exchange.process_ends[0], reply)
    complete = 0
    while exchange.receive():
        exchange.send_next()
        complete += 1
    return complete


def read_inputs(exchange: Exchange) -> bytes:
    """Everything that the process can read of its inputs now."""
    try:
        return os.read(exchange.process_ends[1], 1 << 20)
    except BlockingIOError:
        return b""


def test_an_input_comes_when_the_reply_before_is_complete(exchange: Exchange, replies: int) -> None:
    assert read_inputs(exchange) == b""
    assert answer(exchange, LOADED_REPLY) == 1
    assert read_inputs(exchange) == encode_inputs(INPUTS[:1])
    reply = encode_reply(VALUE, b"one")
    assert answer(exchange, reply[:3]) == answer(exchange, reply[3:-1]) == 0
    assert read_inputs(exchange) == b""
    assert answer(exchange, reply[-1:]) == 1
    assert read_inputs(exchange) == encode_inputs(INPUTS[1:2])
    assert read_replies(replies, 2) == [Reply(LOADED, b""), Reply(VALUE, b"one")]


def test_an_input_larger_than_a_pipe_comes_in_parts(exchange: Exchange) -> None:
    answer(exchange, LOADED_REPLY + encode_reply(VALUE, b"") * 2)
    received = read_inputs(exchange)
    while len(received) < len(encode_inputs(INPUTS)):
        exchange.send()
        received += read_inputs(exchange)
    assert received == encode_inputs(INPUTS)
    assert not exchange.ended
    assert answer(exchange, encode_reply(VALUE, b"")) == 1
    assert exchange.ended


def test_a_submission_that_has_not_loaded_gets_no_input(exchange: Exchange) -> None:
    assert answer(exchange, encode_reply(VALUE, b"1") * 5) == 1
    assert exchange.ended
    assert os.read(exchange.process_ends[1], 100) == b""


def test_a_reply_may_not_announce_more_than_the_limit(exchange: Exchange) -> None:
    answer(exchange, LOADED_REPLY)
    with pytest.raises(ReplyTooLongError):
        answer(exchange, encode_reply(VALUE, b"x" * 101)[:5])


def test_all_replies_together_are_bounded(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.sandbox.agent.exchange._MOST_BYTES", 100)
    reply = encode_reply(VALUE, b"x" * 60)
    assert answer(exchange, LOADED_REPLY + reply) == 2
    with pytest.raises(ReplyTooLongError):
        answer(exchange, reply)
