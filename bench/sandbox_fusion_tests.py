"""Runs SandboxFusion's own tests against a sandbox that is served, with its runners replaced by calls of /run_code.

    python bench/sandbox_fusion_tests.py path/to/SandboxFusion --http http://127.0.0.1:8056 [-k EXPRESSION] [TESTS ...]

TESTS are paths below the clone, the runners' tests unless set; those of its data sets are sandbox/tests/datasets. Its
own requirements must be there for the interpreter: databases, aiosqlite and aiofiles beside those of Perigee's tests.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.staticfiles import StaticFiles

URL = "PERIGEE_FUSION_TESTS_URL"
PATHS = {"/run_code": ("run_code", "RunCodeResponse"), "/run_jupyter": ("run_jupyter_handler", "RunJupyterResponse")}
CALL_S = 300.0


def pytest_configure(config: pytest.Config) -> None:
    """Has the tested application call the served sandbox, before its other modules import what is replaced here."""
    from sandbox.server import sandbox_api  # type: ignore[import-not-found]

    StaticFiles.__init__.__kwdefaults__["check_dir"] = False  # pages that are built are no part of a clone
    for route in sandbox_api.sandbox_router.routes:
        if route.path in PATHS:
            name, response = PATHS[route.path]
            forward = _forward(route.path, getattr(sandbox_api, response))
            forward.__signature__ = inspect.signature(route.endpoint)
            route.endpoint = forward
            setattr(sandbox_api, name, forward)


def _forward(path: str, response: Any) -> Any:
    async def forward(request: Any) -> Any:
        async with httpx.AsyncClient(timeout=CALL_S) as client:
            answer = await client.post(f"{os.environ[URL]}{path}", json=request.model_dump())
        answer.raise_for_status()
        return response(**answer.json())

    return forward


def main() -> None:
    """Runs the tests and ends with pytest's exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("clone", type=Path, help="folder of a clone of SandboxFusion")
    parser.add_argument("--http", required=True, help="address of the sandbox's HTTP, http://HOST:PORT")
    parser.add_argument("-k", default="", help="tests by an expression of pytest's")
    parser.add_argument("tests", nargs="*", default=["sandbox/tests/runners"])
    arguments = parser.parse_intermixed_args()
    os.environ[URL] = arguments.http
    os.chdir(arguments.clone)
    # in the place of this folder, a module of which has the name of the clone's package
    sys.path[0] = str(Path.cwd())
    options = [
        "-o",
        "addopts=--ignore=sandbox/tests/runners/samples",
        "-o",
        "asyncio_mode=auto",
        "-p",
        "no:cacheprovider",
        "-q",
        "--tb=native",
        "-k",
        arguments.k,
    ]
    sys.exit(pytest.main([*options, *arguments.tests], plugins=[sys.modules[__name__]]))


if __name__ == "__main__":
    main()
