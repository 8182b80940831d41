"""What cells report is read as untrusted."""

from __future__ import annotations

import json

import pytest

from perigee.sandbox.v1 import sandbox_pb2 as pb
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
