"""Resident processes beside the service, with modules of the test's own."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from services.sandbox import attendants
from services.sandbox.attendants import Attendant, BoxFailedError, receive

TALKER = """
import json, socket, sys

def main():
    options = json.loads(sys.argv[1])
    channel = socket.socket(fileno=options["control"])
    sys.stderr.write(options["words"])
    sys.stderr.flush()
    if options["ready"]:
        channel.send(b'{"kind": "ready", "version": "1"}')
        sys.stderr.write("x" * (1 << 20))
        channel.send(b'{"kind": "said"}')
        channel.recv(1)
"""


@pytest.fixture
def talker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the box's package that talks."""
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "__init__.py").touch()
    (tmp_path / "box" / "talker.py").write_text(TALKER)
    monkeypatch.setattr(attendants, "BOX_PARENT", tmp_path)


@pytest.mark.usefixtures("talker")
async def test_one_that_says_much_does_not_stand_still() -> None:
    attendant = Attendant("the talker", sys.executable, "talker", {"words": "", "ready": True})
    await attendant.start()
    try:
        async with asyncio.timeout(20):
            assert (await receive(attendant.channel)).header == {"kind": "said"}
    finally:
        words = await attendant.last_words()
    assert set(words) == {"x"}
    assert len(words) <= 4096


@pytest.mark.usefixtures("talker")
async def test_one_that_does_not_start_is_quoted() -> None:
    attendant = Attendant("the talker", sys.executable, "talker", {"words": "no room\n", "ready": False})
    with pytest.raises(BoxFailedError, match="the talker did not start: no room"):
        await attendant.start()
    assert not attendant.running
