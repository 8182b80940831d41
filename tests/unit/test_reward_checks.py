"""The math verifier's check outside of its process: nothing in it needs a signal, or the main thread."""

from __future__ import annotations

import signal
import threading

import pytest

from services.reward.mathematics.check import check


@pytest.mark.parametrize(
    ("reference", "answer", "status"),
    [
        ("\\sqrt{8}", "2\\sqrt{2}", "equal"),
        ("(x+1)^2", "x^2+2x+1", "equal"),
        ("\\{1,\\sqrt{4}\\}", "\\{2,1\\}", "equal"),
        ("[0,\\pi)", "(0,\\pi]", "different"),
        ("y=2x+1", "2x-y+1=0", "equal"),
        ("x^2+y^2>9", "x^2+y^2\\ge 9", "different"),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&5\\end{bmatrix}", "different"),
        ("\\sqrt{7}", "\\frac{(", "unreadable"),
    ],
)
def test_a_check_needs_no_signal(monkeypatch: pytest.MonkeyPatch, reference: str, answer: str, status: str) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a signal was asked for")

    for name in ("alarm", "setitimer", "signal"):
        monkeypatch.setattr(signal, name, refuse)
    found: list[dict[str, str]] = []
    # Python sets signal handlers in the main thread alone.
    thread = threading.Thread(target=lambda: found.append(check({"references": [reference], "answer": answer})))
    thread.start()
    thread.join()
    assert [reply["status"] for reply in found] == [status]
