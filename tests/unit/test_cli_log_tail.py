"""The line of a service's log that tells why it ended."""

import json

import pytest

from perigee.cli.process import last_error, last_words

INFO = json.dumps({"event": "listening", "level": "info"})


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], ""),
        ([INFO], ""),
        ([INFO, "", "no space left, giving up"], ""),
        (
            ["Traceback (most recent call last):", '  File "x.py", line 1', "ValueError: bad", INFO],
            "ValueError: bad",
        ),
        (["trainer: model: /x is no Hugging Face folder", INFO], "trainer: model: /x is no Hugging Face folder"),
        (
            [json.dumps({"event": "engine died", "level": "error", "error": "out of memory"}), INFO],
            "engine died: out of memory",
        ),
        (
            [json.dumps({"event": "failed", "level": "error", "exception": "Traceback\n  x\nOSError: disk full"})],
            "failed: OSError: disk full",
        ),
        (
            ["ERROR asyncio: Task exception was never retrieved", "{not json"],
            "ERROR asyncio: Task exception was never retrieved",
        ),
        (["torch.cuda.OutOfMemoryError: no memory"], "torch.cuda.OutOfMemoryError: no memory"),
    ],
)
def test_the_last_error_is_found(lines: list[str], expected: str) -> None:
    assert last_error(lines) == expected


def test_the_last_words_are_no_record() -> None:
    assert last_words(["first", "no space left, giving up", "", INFO]) == "no space left, giving up"
    assert last_words([INFO]) == ""


def test_an_endless_line_is_cut() -> None:
    assert len(last_error(["ValueError: " + "x" * 10_000])) == 300
