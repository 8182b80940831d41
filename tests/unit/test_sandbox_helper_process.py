"""Helper processes, as the service starts them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from services.sandbox.runtime.failure import SandboxFailedError
from services.sandbox.runtime.helper_process import HelperProcess

CHATTY = "import sys\nsys.stderr.write('x' * 1_000_000 + '\\nthe last line\\n')\nsys.stderr.flush()\n"


def zygote(folder: Path, source: str) -> HelperProcess:
    """A real one, without isolation, that has a module of the test imported first."""
    (folder / "preloaded.py").write_text(source)
    options = {"isolated": False, "preload": ["preloaded"], "path": [str(folder)], "environment": {}}
    return HelperProcess("the zygote of a test", sys.executable, "zygote", options)


async def test_one_that_writes_a_lot_is_not_held_up(tmp_path: Path) -> None:
    process = zygote(tmp_path, CHATTY)
    await process.start()
    assert process.running
    assert (await process.last_output()).endswith("the last line")
    assert not process.running


async def test_one_that_does_not_start_is_reported_with_its_last_output(tmp_path: Path) -> None:
    process = zygote(tmp_path, "raise ImportError('no such thing')")
    with pytest.raises(SandboxFailedError, match=r"the zygote of a test did not start: .*no such thing"):
        await process.start()
    assert not process.running
