"""Sessions over HTTP."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest_asyncio

from tests.fixtures.sandbox_fronts import Fronts, running_fronts


@pytest_asyncio.fixture
async def session(fronts: Fronts) -> AsyncIterator[str]:
    """The path of an open session."""
    created = await fronts.http.post("/v1/sessions", json={"language": "python", "limits": {"memory_bytes": 96 << 20}})
    assert created.status_code == 200
    path = f"/v1/sessions/{created.json()['session_id']}"
    yield path
    assert (await fronts.http.delete(path)).status_code == 200


async def run_cell(client: httpx.AsyncClient, session: str, code: str, **fields: Any) -> dict[str, Any]:
    response = await client.post(f"{session}/cells", json={"code": code, **fields})
    assert response.status_code == 200
    reported: dict[str, Any] = response.json()
    return reported


async def test_cells_share_their_variables(fronts: Fronts, session: str) -> None:
    await run_cell(fronts.http, session, "def f(x):\n  return 2 * x\nnumber = 21")
    ran = await run_cell(fronts.http, session, "print('ä')\nf(number)")
    assert (ran["status"], ran["stdout"], ran["result"], ran["alive"]) == ("ok", "ä\n", "42", True)
    assert ran["execution_count"] == 2
    assert "result" not in await run_cell(fronts.http, session, "None")


async def test_exceptions_and_limits_are_reported(fronts: Fronts, session: str) -> None:
    failed = await run_cell(fronts.http, session, "{}['a']")
    assert (failed["status"], failed["error_name"], failed["error_value"]) == ("runtime_error", "KeyError", "'a'")
    late = await run_cell(fronts.http, session, "import time\ntime.sleep(60)", wall_ms=200)
    assert (late["status"], late["alive"]) == ("time_limit", True)
    full = await run_cell(fronts.http, session, "bytearray(1 << 30)")
    assert (full["status"], full["alive"]) == ("memory_limit", False)
    gone = await fronts.http.post(f"{session}/cells", json={"code": "1"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "NOT_FOUND")


async def test_files_go_in_and_come_out(fronts: Fronts, session: str) -> None:
    given = {"path": "given", "content_base64": base64.b64encode(b"\xff\x00").decode()}
    code = "open('out', 'wb').write(open('given', 'rb').read() * 2)"
    ran = await run_cell(fronts.http, session, code, files=[given], output_files=["out"])
    assert base64.b64decode(ran["files"][0]["content_base64"]) == b"\xff\x00" * 2


async def test_wrong_requests_name_their_fields(fronts: Fronts, session: str) -> None:
    wrong = await fronts.http.post("/v1/sessions", json={"language": "bash", "idle_seconds": 10**6})
    assert wrong.status_code == 400
    fields = {violation["field"] for violation in wrong.json()["error"]["field_violations"]}
    assert fields == {"language", "idle_seconds"}
    empty = await fronts.http.post(f"{session}/cells", json={"output_files": ["../x"], "wall_ms": 10**9})
    assert empty.status_code == 400
    fields = {violation["field"] for violation in empty.json()["error"]["field_violations"]}
    assert fields == {"output_files[0]", "wall_ms"}


async def test_a_closed_session_makes_room(tmp_path: Path) -> None:
    async with running_fronts(tmp_path, slots=1, max_sessions=1) as fronts:
        first = await fronts.http.post("/v1/sessions", json={"language": "python"})
        full = await fronts.http.post("/v1/sessions", json={"language": "python"})
        assert (full.status_code, full.json()["error"]["code"]) == (429, "RESOURCE_EXHAUSTED")
        assert int(full.headers["retry-after"]) >= 1
        path = f"/v1/sessions/{first.json()['session_id']}"
        assert (await fronts.http.delete(path)).status_code == 200
        assert (await fronts.http.delete(path)).status_code == 200
        assert (await fronts.http.post("/v1/sessions", json={"language": "python"})).status_code == 200
