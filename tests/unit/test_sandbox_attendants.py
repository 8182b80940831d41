"""The resident processes, as the service starts them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from services.sandbox.runtime.helper_process import Attendant, BoxFailedError

CHATTY = "import sys\nsys.stderr.write('x' * 1_000_000 + '\\nthe last word\\n')\nsys.stderr.flush()\n"


def zygote(folder: Path, source: str) -> Attendant:
    """A real one, without isolation, that has a module of the test imported first."""
    (folder / "preloaded.py").write_text(source)
    options = {"isolated": False, "preload": ["preloaded"], "path": [str(folder)], "environment": {}}
    return Attendant("the zygote of a test", sys.executable, "zygote", options)


async def test_one_that_says_a_lot_is_not_held_up(tmp_path: Path) -> None:
    attendant = zygote(tmp_path, CHATTY)
    await attendant.start()
    assert attendant.running
    assert (await attendant.last_words()).endswith("the last word")
    assert not attendant.running


async def test_one_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    attendant = zygote(tmp_path, "raise ImportError('no such thing')")
    with pytest.raises(BoxFailedError, match=r"the zygote of a test did not start: .*no such thing"):
        await attendant.start()
    assert not attendant.running
