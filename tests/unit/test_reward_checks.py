"""Checks outside of the service: the math verifier's needs no signal, and deadlines count CPU time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import pytest

from services.reward.math.check import check


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


SPIN = """
import time
from services.reward.pool import check_worker

def check(request):
    if request["kind"] == "waits":
        time.sleep(request["seconds"])
    begin = time.process_time()
    while request["kind"] == "computes" and time.process_time() < begin + request["seconds"]:
        pass
    return {"status": "equal", "reason": ""}

supervisor = check_worker.Supervisor(check, check_worker.Limits(1 << 30, 60.0, 0))
supervisor.serve()
supervisor.end()
"""


@pytest.mark.parametrize(
    ("kind", "seconds", "status"),
    [
        # Off the processor, as on a busy machine, a check may take longer than its deadline; on it, it may not.
        ("waits", 1.0, "equal"),
        ("computes", 0.1, "equal"),
        ("computes", 30.0, "deadline"),
        ("waits", 30.0, "deadline"),
    ],
)
def test_deadlines_count_the_time_that_a_check_had_the_processor(kind: str, seconds: float, status: str) -> None:
    message = {"id": 1, "deadline_s": 0.4, "check": {"kind": kind, "seconds": seconds}}
    with subprocess.Popen([sys.executable, "-c", SPIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["status"] == status
        process.stdin.close()
