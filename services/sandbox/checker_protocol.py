"""What a caller's checker or interactor decided, read from how its process ended.

The exit codes and messages are testlib's (https://github.com/MikeMirzayanov/testlib): 0 `_ok`, 1 `_wa`, 2 `_pe`,
7 `_points` with the message `points SHARE TEXT`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.sandbox.jobs import Verdict

_MESSAGE_CHARACTERS = 1000
_UTF8_BYTES = 4
_ACCEPTED, _WRONG_ANSWER, _PRESENTATION_ERROR, _POINTS = 0, 1, 2, 7
_SHARE = re.compile(r"\s*(?:points\s+)?([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?!\S)", re.ASCII)
# uncaught exceptions of Python and of the JVM, a panic of Go: their exit codes are those of wrong answers
_CRASH = re.compile(rb"\s*(?:Traceback \(most recent call last\):|Exception in thread \"|panic: )")


@dataclass(frozen=True)
class Decision:
    """ACCEPTED, WRONG_ANSWER or INFRA_ERROR; the share of the test's points, from 0 to 1 or None for a failure; and the
    program's message, or why it failed.
    """

    verdict: Verdict
    share: float | None
    message: str


def read_decision(exit_code: int, signal: int, stderr: bytes, limit: str = "") -> Decision:
    """What a checker or an interactor decided.

    `signal` is 0 unless one ended the program, `limit` says which limit it passed, empty for none. Whatever is not a
    decision is a failure of the program, told as INFRA_ERROR, and never a wrong answer: other exit codes, a signal, a
    limit, an uncaught exception, or points without a share from 0 to 1 as the first word or right after the first
    word `points`. Nothing is searched for further on, since messages quote what submissions wrote.
    """
    message = stderr[: _UTF8_BYTES * _MESSAGE_CHARACTERS].decode(errors="replace").strip()[:_MESSAGE_CHARACTERS]
    if limit:
        return _failure(f"passed its {limit}", message)
    if signal:
        return _failure(f"was ended by signal {signal}", message)
    if exit_code == _ACCEPTED:
        return Decision(Verdict.ACCEPTED, 1.0, message)
    if exit_code in (_WRONG_ANSWER, _PRESENTATION_ERROR):
        if _CRASH.match(stderr):
            end = stderr[-_MESSAGE_CHARACTERS:].decode(errors="replace").strip().rpartition("\n")[2]
            return _failure("ended with an uncaught exception", end)
        return Decision(Verdict.WRONG_ANSWER, 0.0, message)
    if exit_code == _POINTS:
        return _read_points(message)
    return _failure(f"ended with exit code {exit_code}", message)


def _read_points(message: str) -> Decision:
    found = _SHARE.match(message)
    if found is None:
        return _failure("ended with exit code 7 without a message like `points 0.5`", message)
    share = float(found[1])
    if not 0 <= share <= 1:
        return _failure(f"gave {found[1]} points, which is no share from 0 to 1", message)
    return Decision(Verdict.ACCEPTED if share == 1 else Verdict.WRONG_ANSWER, share, message)


def _failure(reason: str, message: str) -> Decision:
    text = f"the checking program {reason}: {message}" if message else f"the checking program {reason}"
    return Decision(Verdict.INFRA_ERROR, None, text[:_MESSAGE_CHARACTERS])
