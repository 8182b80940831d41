"""Tests of a session's working folder."""

from __future__ import annotations

import asyncio

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.judge.suites import make_suite, read_suite
from services.sandbox.runtime.sessions import Sessions

_MOST_DIGITS = 10
"""Of an exit code, which what runs in a session can forge."""


async def run_tests_in_session(sessions: Sessions, cell: pb.RunCellRequest) -> pb.RunCellResponse:
    """Runs a cell that runs tests, and reads their report; raises what `Sessions.run` does.

    The last expression of the cell is the exit code of the tests' command.
    """
    suite = make_suite(cell.tests, "python3", with_probe=False)
    inner = pb.RunCellRequest()
    inner.CopyFrom(cell)
    inner.code = f"__import__('subprocess').run({suite.command!r}).returncode".encode()
    if suite.report:
        inner.output_files.append(suite.report)
        inner.output_folders.append(suite.report)
    response = await sessions.run(inner)
    reports = [file for file in response.files if file.path == suite.report]
    kept = [file for file in response.files if file.path != suite.report]
    del response.files[:]
    response.files.extend(kept)
    if response.status == pb.STATUS_OK:
        is_code = response.result.isdecimal() and len(response.result) < _MOST_DIGITS
        exit_code = int(response.result) if is_code else None
        result = await asyncio.to_thread(read_suite, suite, exit_code, response.stdout, reports)
        response.tests.extend(result.tests)
        response.reason = result.problem
    return response
