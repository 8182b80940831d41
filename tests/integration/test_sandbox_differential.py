"""Programs run in the sandbox as under the plain interpreter; `python -m tests.differential` runs more of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from perigee.sandbox.client import SandboxClient
from services.sandbox.config import SandboxConfig
from services.sandbox.languages.catalog import find_python, load_catalog
from tests.differential.programs import KNOWN, RECORDED, Ending, find_programs, run_plainly, run_sandboxed
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible

SLOTS = 2
FEW = [
    *("bash/dev_stdout", "bash/dev_stderr", "bash/signals_ignored", "bash/yes_head", "bash/cat_dev_stdin"),
    *("bash/test_streams", "bash/big_output", "bash/unread_input", "perl/sigpipe", "perl/streams"),
    *("lua/stdout_file", "php/dev_stdout", "c/freopen"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def either(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SandboxClient]:
    """A sandbox with warm interpreters and containers."""
    skip_unless_possible("crun")
    async with running_sandbox(tmp_path_factory.mktemp("differential"), slots=SLOTS) as client:
        yield client


async def test_python_programs_run_as_recorded(either: SandboxClient) -> None:
    recorded = json.loads(RECORDED.read_text())
    if find_python("", None).version != recorded["version"]:
        pytest.skip(f"needs the Python {recorded['version']} that was recorded")
    turn = asyncio.Semaphore(SLOTS)
    programs = [program for program in find_programs("python/") if program.name not in KNOWN]

    async def run(name: str) -> Ending:
        async with turn:
            return await run_sandboxed(either, by_name[name])

    by_name = {program.name: program for program in programs}
    endings = dict(zip(by_name, await asyncio.gather(*map(run, by_name)), strict=True))
    different = {name: end for name, end in endings.items() if end.digest() != recorded["digests"][name]}
    assert not different, "python -m tests.differential NAME shows what differs"


@pytest.mark.parametrize("name", FEW)
async def test_a_program_ends_as_by_itself(either: SandboxClient, name: str) -> None:
    runtime = load_catalog(SandboxConfig()).find(name.partition("/")[0])
    if runtime is None:
        pytest.skip(f"needs the runtime of {name}")
    [program] = [program for program in find_programs(name) if program.name == name]
    assert await run_sandboxed(either, program) == await run_plainly(runtime, program)
