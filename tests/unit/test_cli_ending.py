"""Signals that end a command, and one that its caller has it ignore."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from perigee.cli.ending import SIGNALS, Interrupt, run_interruptible


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Those of the tests' process are what they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run_until(number: signal.Signals) -> int:
    """The exit code of work that gets a signal, and has ended by itself if that does not end it."""

    async def work(_: Interrupt) -> int:
        os.kill(os.getpid(), number)
        for _ in range(10):
            await asyncio.sleep(0.001)
        return 0

    return run_interruptible(work)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_work(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)
    assert run_until(number) == 128 + number


def test_a_hangup_that_nohup_has_ignored_ends_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run_until(signal.SIGHUP) == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
