"""Cells: how they are interrupted, and what they report, read as untrusted."""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

import pytest

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.cells import Interrupts
from services.sandbox.agent.protocol import memory_file
from services.sandbox.api.compat import to_bundle
from services.sandbox.runtime.sessions import read_reply


def test_displays_are_read() -> None:
    contents = [["text/plain", "x", False], ["image/png", "AP8=", True], ["application/json", '{"a": 1}', False]]
    reply = {"ok": True, "displays": [{"is_result": True, "contents": contents}]}
    read = read_reply(memory_file(json.dumps(reply).encode()), 1000)
    [display] = read["displays"]
    assert (display.is_result, [each.content for each in display.contents]) == (True, [b"x", b"\0\xff", b'{"a": 1}'])
    assert to_bundle(display) == {"text/plain": "x", "image/png": "AP8=", "application/json": {"a": 1}}


@pytest.mark.parametrize(
    "displays",
    [1, [1], [{}], [{"is_result": True}], [{"is_result": 1.5, "contents": []}], [{"is_result": 1, "contents": [1]}]]
    + [[{"is_result": True, "contents": [content]}] for content in ([], [1, "", False], ["a", 1, True], ["a", "x", 1])],
)
def test_forged_displays_are_dropped(displays: object) -> None:
    assert not read_reply(memory_file(json.dumps({"ok": True, "displays": displays}).encode()), 1000).get("displays")


def test_forged_json_is_text() -> None:
    content = pb.DisplayContent(mime_type="application/json", content=b"{" * 100_000)
    assert to_bundle(pb.Display(contents=[content])) == {"application/json": "{" * 100_000}


def test_an_interrupt_beside_the_cell_does_not_leave_run() -> None:
    interrupts, survived = Interrupts(), []

    def interrupt_twice() -> dict[str, Any]:
        run = sys._getframe(2)
        interrupts(signal.SIGINT, run)  # while `run` has not begun the cell, or handles its first interrupt
        survived.append(run.f_code.co_name)
        interrupts(signal.SIGINT, sys._getframe())
        return {"ok": True}

    assert interrupts.run(interrupt_twice)["error_name"] == "KeyboardInterrupt"
    assert survived == ["run"]
    interrupts(signal.SIGINT, None)
    assert interrupts.run(lambda: {"ok": True})["error_name"] == "KeyboardInterrupt"
