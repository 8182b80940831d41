"""Kernels: IPython's magics, display data, plots and tracebacks; SandboxFusion's /run_jupyter.

Skipped by name where the runtime is missing.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from perigee.sandbox.client import SandboxClient, Session
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox import skip_without_kernel
from tests.fixtures.sandbox_fronts import Fronts

PNG = b"\x89PNG\r\n\x1a\n"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def kernel(sandbox: SandboxClient) -> AsyncIterator[Session]:
    """A kernel for all cells, in each isolation."""
    await skip_without_kernel(sandbox)
    async with sandbox.session("jupyter") as session:
        yield session


def shown(cell: pb.RunCellResponse) -> list[dict[str, bytes]]:
    """What a cell displayed, by MIME type."""
    return [{each.mime_type: each.content for each in display.contents} for display in cell.displays]


async def test_the_last_expression_is_displayed(kernel: Session) -> None:
    cell = await kernel.run("x = [1, 2]\nx")
    assert (cell.status, cell.result, cell.stdout) == (pb.STATUS_OK, "[1, 2]", b"")
    assert [display.is_result for display in cell.displays] == [True]
    assert shown(cell) == [{"text/plain": b"[1, 2]"}]
    quiet = await kernel.run("x;")
    assert (len(quiet.displays), quiet.HasField("result")) == (0, False)
    assert (await kernel.run("_ + Out[1] if 1 in Out else x")).status == pb.STATUS_OK


async def test_magics_and_shell_commands(kernel: Session) -> None:
    assert b"Wall time" in (await kernel.run("%time sum(range(10))")).stdout
    cell = await kernel.run("print('before')\n!echo $HOME; echo oops >&2\nprint('after')")
    assert (cell.stdout, cell.stderr) == (b"before\n/box\nafter\n", b"oops\n")
    assert (await kernel.run("%%bash\nfor i in 1 2; do echo $i; done")).stdout == b"1\n2\n"
    assert (await kernel.run("names = !printf 'a\\nb'\nlist(names)")).result == "['a', 'b']"
    assert (await kernel.run("%%writefile made.py\nvalue = 7")).status == pb.STATUS_OK
    assert (await kernel.run("import made\nmade.value")).result == "7"
    assert (await kernel.run("import asyncio\nawait asyncio.sleep(0, 'awaited')")).result == "'awaited'"
    assert b"not found" in (await kernel.run("%nosuchmagic")).stderr


async def test_display_data(kernel: Session) -> None:
    await kernel.run("from IPython.display import *")
    cell = await kernel.run("display(HTML('<b>x</b>'))\ndisplay(SVG('<svg/>'), JSON({'a': [1]}))\nMarkdown('*m*')")
    assert [display.is_result for display in cell.displays] == [False, False, False, True]
    html, svg, json, markdown = shown(cell)
    assert html["text/html"] == b"<b>x</b>"
    assert svg["image/svg+xml"].startswith(b"<svg")
    assert json["application/json"] == b'{"a": [1]}'
    assert markdown["text/markdown"] == b"*m*"


async def test_plots(kernel: Session) -> None:
    cell = await kernel.run("%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 4, 9])\nplt.show()")
    assert (cell.status, cell.stderr) == (pb.STATUS_OK, b"")
    assert shown(cell)[0]["image/png"].startswith(PNG)
    left_open = await kernel.run("plt.plot([1, 2]);")
    assert [content["image/png"][:8] for content in shown(left_open)] == [PNG]


async def test_tracebacks(kernel: Session) -> None:
    await kernel.run("def fail(x):\n    return 1 / x")
    cell = await kernel.run("print('before')\nfail(0)")
    assert (cell.status, cell.error_name, cell.error_value) == (
        pb.STATUS_RUNTIME_ERROR,
        "ZeroDivisionError",
        "division by zero",
    )
    assert (cell.stdout, cell.stderr) == (b"before\n", b"")
    assert "\x1b[" in cell.error_traceback
    assert "fail" in cell.error_traceback
    assert (await kernel.run("def f(:")).error_name == "SyntaxError"
    assert (await kernel.run("exit()")).error_name == "SystemExit"
    late = await kernel.run("while True: pass", wall_ms=300)
    assert (late.status, late.error_name, late.alive) == (pb.STATUS_TIME_LIMIT, "KeyboardInterrupt", True)


async def test_a_restart_forgets_variables_and_keeps_files(kernel: Session) -> None:
    await kernel.run("kept = 1\nopen('kept', 'w').close()")
    await kernel.restart()
    cell = await kernel.run("import os\n'kept' in globals(), os.path.exists('kept')")
    assert (cell.result, cell.execution_count) == ("(False, True)", 1)


async def run_notebook(fronts: Fronts, cells: list[str], **fields: Any) -> dict[str, Any]:
    await skip_without_kernel(fronts.grpc)
    answered = await fronts.http.post("/run_jupyter", json={"cells": cells, **fields})
    assert answered.status_code == 200
    read: dict[str, Any] = answered.json()
    return read


async def test_notebooks_as_sandbox_fusion_runs_them(fronts: Fronts) -> None:
    cells = ["print(open('in').read())", "a = 'hello'\na", "1 / 0", "", "open('out', 'w').write(a);"]
    files = {"in": base64.b64encode(b"given").decode()}
    ran = await run_notebook(fronts, cells, files=files, fetch_files=["out", "absent"])
    assert (ran["status"], ran["driver"]["status"]) == ("Success", "Finished")
    assert ran["files"] == {"out": base64.b64encode(b"hello").decode()}
    given, shown_, failed, _, _ = ran["cells"]
    assert given == {"stdout": "given\n", "stderr": "", "display": [], "error": []}
    assert shown_["display"] == [{"text/plain": "'hello'"}]
    assert failed["error"][0]["ename"] == "ZeroDivisionError"
    assert failed["error"][0]["traceback"]


async def test_notebooks_end_in_time(fronts: Fronts) -> None:
    ran = await run_notebook(fronts, ["import time\ntime.sleep(90)", "print(2)"], cell_timeout=4)
    assert [cell["stdout"] for cell in ran["cells"]] == ["", "2\n"]
    assert ran["cells"][0]["error"][0]["ename"] == "KeyboardInterrupt"
    ran = await run_notebook(fronts, ["import time\ntime.sleep(90)", "print(2)"], total_timeout=0.5)
    assert (ran["status"], ran["driver"]["status"], ran["cells"]) == ("Failed", "TimeLimitExceeded", [])


async def test_a_kernel_that_ends_is_told(fronts: Fronts) -> None:
    ran = await run_notebook(fronts, ["print(1)", "import os\nos._exit(3)", "print(2)"])
    assert (ran["status"], ran["driver"]["status"], len(ran["cells"])) == ("Failed", "Error", 2)
