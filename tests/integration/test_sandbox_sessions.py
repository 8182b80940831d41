"""Sessions keep what cells leave, from cell to cell, until they end; in every isolation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from perigee.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError, UnavailableError
from perigee.sandbox.client import SandboxClient, Session
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.runtime import sessions
from services.sandbox.runtime.programs import LoadedProgram, open_program
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible

SLEEP = "import time\ntime.sleep(60)"
BUSY = "while True: pass"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def session(sandbox: SandboxClient) -> AsyncIterator[Session]:
    """One session for the cells that leave it as it is."""
    async with sandbox.session() as opened:
        yield opened


@asynccontextmanager
async def opened_session(client: SandboxClient, **fields: object) -> AsyncIterator[str]:
    """The id of a session with the given fields."""
    created = await client.create_session(pb.CreateSessionRequest(language="python", **fields))  # type: ignore[arg-type]
    try:
        yield created.session_id
    finally:
        await client.close_session(pb.CloseSessionRequest(session_id=created.session_id))


async def run_cell(client: SandboxClient, session_id: str, code: str, **fields: object) -> pb.RunCellResponse:
    request = pb.RunCellRequest(session_id=session_id, code=code.encode(), **fields)  # type: ignore[arg-type]
    return await client.run_cell(request)


async def test_variables_functions_and_imports_are_kept(session: Session) -> None:
    first = await session.run("import math as m\nnumbers = [1, 2]\ndef double(x):\n  return 2 * x\nnumbers")
    second = await session.run("numbers.append(double(m.floor(1.5)))\nprint(numbers)")
    third = await session.run("class A:\n  def f(self): return double(4)\nA().f() + sum(numbers)")
    assert (first.status, first.result) == (pb.STATUS_OK, "[1, 2]")
    assert (second.stdout, second.HasField("result")) == (b"[1, 2, 2]\n", False)
    assert third.result == "13"
    assert third.execution_count == second.execution_count + 1 == first.execution_count + 2


async def test_the_last_expression_is_reported(session: Session) -> None:
    assert (await session.run("'text'")).result == "'text'"
    assert not (await session.run("None")).HasField("result")
    assert not (await session.run("x = 1")).HasField("result")
    assert not (await session.run("# nothing")).HasField("result")
    assert (await session.run("5;")).result == "5"
    assert (await session.run("_ + 1")).result == "6"


async def test_an_exception_ends_the_cell_alone(session: Session) -> None:
    await session.run("kept = 'kept'\ndef fail(x):\n  return 1 / x")
    failed = await session.run("print('before')\nlost = fail(0)\nprint('after')")
    assert (failed.status, failed.alive) == (pb.STATUS_RUNTIME_ERROR, True)
    assert (failed.error_name, failed.error_value) == ("ZeroDivisionError", "division by zero")
    assert failed.stdout == b"before\n"
    assert b"return 1 / x" in failed.stderr
    assert b"ZeroDivisionError: division by zero" in failed.stderr
    assert (await session.run("kept, 'lost' in globals()")).result == "('kept', False)"


@pytest.mark.parametrize(
    ("code", "error"),
    [("def f(:", "SyntaxError"), ("exit(3)", "SystemExit"), ("raise KeyboardInterrupt", "KeyboardInterrupt")],
)
async def test_what_would_end_a_program_ends_the_cell_alone(session: Session, code: str, error: str) -> None:
    failed = await session.run(code)
    assert (failed.status, failed.error_name, failed.alive) == (pb.STATUS_RUNTIME_ERROR, error, True)
    assert (await session.run("6 * 7")).result == "42"


@pytest.mark.parametrize("code", [SLEEP, BUSY])
async def test_the_wall_limit_interrupts_the_cell_alone(session: Session, code: str) -> None:
    await session.run("kept = 2")
    late = await session.run(code, wall_ms=300)
    assert (late.status, late.reason, late.alive) == (pb.STATUS_TIME_LIMIT, "wall-clock limit of 300 ms", True)
    assert late.error_name == "KeyboardInterrupt"
    assert (await session.run("kept")).result == "2"


async def test_a_cell_may_not_ask_for_more_time_than_its_session_has(sandbox: SandboxClient) -> None:
    async with sandbox.session(limits=pb.Limits(wall_ms=3000)) as session:
        with pytest.raises(InvalidArgumentError, match="at most the session's 3000 is allowed") as refused:
            await session.run("1", wall_ms=3001)
        assert [violation.field for violation in refused.value.violations] == ["wall_ms"]
        assert (await session.run("1", wall_ms=3000)).result == "1"


async def test_files_of_a_cell_fit_into_its_session(sandbox: SandboxClient) -> None:
    async with sandbox.session(limits=pb.Limits(file_bytes=1 << 16)) as session:
        request = pb.RunCellRequest(session_id=session.id, code=b"", files=[pb.File(path="a", content=bytes(1 << 17))])
        with pytest.raises(InvalidArgumentError, match="files"):
            await sandbox.run_cell(request)
        assert (await session.run("2")).result == "2"
        assert (await session.run("")).status == pb.STATUS_OK


async def test_the_cpu_limit_interrupts_the_cell_alone(sandbox: SandboxClient) -> None:
    async with sandbox.session(limits=pb.Limits(cpu_ms=300, wall_ms=30_000)) as session:
        await session.run("kept = 1")
        late = await session.run(BUSY)
        assert (late.status, late.reason, late.alive) == (pb.STATUS_TIME_LIMIT, "CPU limit of 300 ms", True)
        assert late.cpu_ms >= 300
        assert (await session.run("kept")).result == "1"


async def test_a_cell_that_ignores_interrupts_ends_the_session(sandbox: SandboxClient) -> None:
    async with sandbox.session() as session:
        await session.run("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)")
        late = await session.run("while True: pass", wall_ms=300)
        assert (late.status, late.alive) == (pb.STATUS_TIME_LIMIT, False)
        with pytest.raises(NotFoundError):
            await session.run("1")


async def test_cells_that_wait_for_a_deaf_one_end_with_the_session(sandbox: SandboxClient) -> None:
    async with opened_session(sandbox) as session_id:
        await run_cell(sandbox, session_id, "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)")
        deaf = asyncio.create_task(run_cell(sandbox, session_id, SLEEP, wall_ms=1000))
        await asyncio.sleep(0.2)
        waiting = [asyncio.create_task(run_cell(sandbox, session_id, "1")) for _ in range(2)]
        async with asyncio.timeout(60):
            late = await deaf
            ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert (late.status, late.alive) == (pb.STATUS_TIME_LIMIT, False)
        for end in ends:
            assert isinstance(end, NotFoundError), end


async def test_the_memory_limit_ends_the_session(sandbox: SandboxClient) -> None:
    async with sandbox.session(limits=pb.Limits(memory_bytes=64 << 20)) as session:
        assert (await session.run("kept = bytearray(8 << 20)")).alive
        full = await session.run("big = bytearray(1 << 30)")
        assert (full.status, full.alive) == (pb.STATUS_MEMORY_LIMIT, False)
        assert full.reason == f"memory limit of {64 << 20} bytes"
        with pytest.raises(NotFoundError, match="is not open"):
            await session.run("1")


async def test_too_much_output_is_cut(sandbox: SandboxClient) -> None:
    async with sandbox.session(limits=pb.Limits(output_bytes=1000)) as session:
        flood = await session.run("print('x' * 100_000)")
        assert (flood.status, flood.stdout_truncated, len(flood.stdout)) == (pb.STATUS_OUTPUT_LIMIT, True, 1000)
        assert (await session.run("'x' * 100_000")).status == pb.STATUS_OUTPUT_LIMIT
        assert (await session.run("1")).result == "1"


async def test_files_go_in_and_come_out(sandbox: SandboxClient) -> None:
    first = pb.File(path="data/first.txt", content=b"first")
    async with opened_session(sandbox, files=[first], env={"MINE": "yes"}) as session_id:
        second = pb.File(path="second.py", content=b"x = 'second'")
        code = (
            "import os, second\nopen('out.bin', 'wb').write(b'\\xff' + open('data/first.txt', 'rb').read())\nsecond.x"
        )
        paths = ["out.bin", "absent"]
        ran = await run_cell(sandbox, session_id, code, files=[second], output_files=paths)
        assert ran.result == "'second'"
        assert [(file.path, file.content) for file in ran.files] == [("out.bin", b"\xfffirst"), ("absent", b"")]
        assert ran.files[1].error
        again = await run_cell(sandbox, session_id, "os.listdir(), os.environ['MINE']", output_files=["out.bin"])
        assert again.files[0].content == b"\xfffirst"
        assert again.result is not None
        assert "out.bin" in again.result
        assert "yes" in again.result


async def test_cells_run_one_after_another_in_their_order(session: Session) -> None:
    await session.run("import time\norder = []")
    code = "order.append(('begin', {0}))\ntime.sleep(0.05)\norder.append(('end', {0}))"
    ran = await asyncio.gather(*(session.run(code.format(number)) for number in range(5)))
    counts = [cell.execution_count for cell in ran]
    assert counts == sorted(counts)
    expected = [(what, number) for number in range(5) for what in ("begin", "end")]
    assert (await session.run("order")).result == repr(expected)


async def test_a_caller_that_leaves_interrupts_its_cell(sandbox: SandboxClient) -> None:
    async with sandbox.session(limits=pb.Limits(wall_ms=100_000)) as session:
        await session.run("kept = 'kept'")
        leaving = asyncio.create_task(session.run("kept = 'begun'\nimport time\ntime.sleep(100)"))
        waiting = asyncio.create_task(session.run("never = 1"))
        await asyncio.sleep(0.5)  # the first runs, or on a loaded machine is about to; the second waits for it
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        after = await asyncio.wait_for(session.run("kept, 'never' in globals()"), 50)
        assert after.result in ("('begun', False)", "('kept', False)")


async def test_sessions_do_not_see_each_other(sandbox: SandboxClient) -> None:
    async with sandbox.session() as first, sandbox.session() as second:
        await first.run("x = 'secret'\nopen('secret', 'w').write(x)\nopen('/tmp/secret', 'w').write(x)")
        look = "import os, glob\n'x' in globals(), os.listdir('.'), os.listdir('/tmp'), len(glob.glob('/proc/[0-9]*'))"
        [known, box, temporary, processes] = eval((await second.run(look)).result or "")
        assert (known, box, temporary) == (False, [], [])
        assert processes <= 3
        user = "import os; os.getuid()"
        assert (await first.run(user)).result != (await second.run(user)).result


async def test_a_slot_is_clean_for_the_next_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    skip_unless_possible("zygote")
    folder = tmp_path_factory.mktemp("sandbox")
    async with running_sandbox(folder, isolation="zygote", slots=1, max_sessions=1) as client:
        async with client.session() as first:
            await first.run("x = 1\nopen('left', 'w').close()\nimport subprocess\nsubprocess.Popen(['sleep', '60'])")
            with pytest.raises(ResourceExhaustedError) as refused:
                await client.create_session(pb.CreateSessionRequest(language="python"))
            assert refused.value.retry_after_s
        async with client.session() as second:
            look = "import os, glob\n'x' in globals(), os.listdir('.'), len(glob.glob('/proc/[0-9]*')) <= 3"
            assert (await second.run(look)).result == "(False, [], True)"


async def test_an_idle_session_ends_and_a_busy_one_does_not(sandbox: SandboxClient) -> None:
    async with opened_session(sandbox, idle_seconds=1) as idle, opened_session(sandbox, idle_seconds=1) as busy:
        working = asyncio.create_task(run_cell(sandbox, busy, "import time\ntime.sleep(3.5)\n'done'"))
        await asyncio.sleep(3.2)
        with pytest.raises(NotFoundError):
            await run_cell(sandbox, idle, "1")
        assert (await working).result == "'done'"


async def test_a_session_that_takes_long_to_start_is_not_idle(
    sandbox: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def open_slowly(*arguments: Any) -> AsyncIterator[LoadedProgram]:
        await asyncio.sleep(2.5)  # past the session's second, and past the next look for idle ones
        async with open_program(*arguments) as loaded:
            yield loaded

    monkeypatch.setattr(sessions, "open_program", open_slowly)
    async with opened_session(sandbox, idle_seconds=1) as session_id:
        assert (await run_cell(sandbox, session_id, "1 + 1")).result == "2"


async def test_a_session_that_is_ended_while_it_starts_is_an_error(
    sandbox: SandboxClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def never_open(*arguments: Any) -> AsyncIterator[LoadedProgram]:
        await asyncio.Event().wait()
        yield LoadedProgram(*arguments)

    async def end_at_once(session: sessions.Session) -> None:
        asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(session.close()))
        await start(session)

    start = sessions.Session.start
    monkeypatch.setattr(sessions, "open_program", never_open)
    monkeypatch.setattr(sessions.Session, "start", end_at_once)
    with pytest.raises(UnavailableError, match="ended while it started"):
        await sandbox.create_session(pb.CreateSessionRequest(language="python"), timeout_s=10)


async def test_a_closed_session_is_not_there(sandbox: SandboxClient) -> None:
    created = await sandbox.create_session(pb.CreateSessionRequest(language="python"))
    close = pb.CloseSessionRequest(session_id=created.session_id)
    running = asyncio.create_task(run_cell(sandbox, created.session_id, SLEEP))
    await asyncio.sleep(0.2)
    await sandbox.close_session(close)
    ended = await asyncio.wait_for(running, 60)
    assert not ended.alive
    with pytest.raises(NotFoundError):
        await run_cell(sandbox, created.session_id, "1")
    await sandbox.close_session(close)
    await sandbox.close_session(pb.CloseSessionRequest(session_id="never was"))


async def test_contexts_share_files_and_nothing_else(sandbox: SandboxClient) -> None:
    async with sandbox.session() as session:
        await session.run("x = 'first'\nopen('f', 'w').write(x)")
        other = await session.run("'x' in globals(), open('f').read()", context="other")
        assert (other.result, other.execution_count) == ("(False, 'first')", 1)
        await session.run("x = 'other'", context="other")
        await session.restart("other")
        assert (await session.run("'x' in globals(), open('f').read()", context="other")).result == "(False, 'first')"
        assert (await session.run("x")).result == "'first'"
        await session.restart()
        again = await session.run("'x' in globals(), open('f').read()")
        assert (again.result, again.execution_count) == ("(False, 'first')", 1)


async def test_an_interrupt_ends_the_cell_alone(sandbox: SandboxClient) -> None:
    async with sandbox.session() as session:
        await session.interrupt()
        running = asyncio.create_task(session.run(SLEEP))
        while not running.done():
            await session.interrupt()
            await asyncio.sleep(0.1)
        assert (running.result().status, running.result().error_name) == (pb.STATUS_RUNTIME_ERROR, "KeyboardInterrupt")
        assert (await session.run("6 * 7")).result == "42"


async def test_interrupts_while_a_session_begins_its_cell_end_the_cell_alone(sandbox: SandboxClient) -> None:
    for _ in range(5):
        async with sandbox.session() as session:
            running = asyncio.create_task(session.run(SLEEP))
            while not running.done():
                await session.interrupt()
            ended = running.result()
            assert (ended.error_name, ended.reason) == ("KeyboardInterrupt", "KeyboardInterrupt")
            assert (await session.run("6 * 7")).result == "42"


async def test_variables_of_a_cell_last_as_long_as_it(sandbox: SandboxClient) -> None:
    async with opened_session(sandbox, env={"KEPT": "1"}) as session_id:
        look = "import os\nos.environ.get('KEPT'), os.environ.get('SET')"
        assert (await run_cell(sandbox, session_id, look, env={"KEPT": "2", "SET": "3"})).result == "('2', '3')"
        assert (await run_cell(sandbox, session_id, look)).result == "('1', None)"


async def test_contexts_are_bounded(sandbox: SandboxClient) -> None:
    async with sandbox.session() as session:
        for number in range(16):
            await session.run("1", context=str(number))
        with pytest.raises(InvalidArgumentError, match="at most 16") as refused:
            await session.run("1", context="16")
        assert [violation.field for violation in refused.value.violations] == ["context"]
        await session.restart("0")
        assert (await session.run("2", context="16")).result == "2"
