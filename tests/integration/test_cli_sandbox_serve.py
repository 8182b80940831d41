"""`perigee sandbox serve`: a sandbox of one's own, from the first line to SIGTERM."""

import asyncio
import signal
from pathlib import Path

import pytest

from perigee.cli.stack import pick_ports
from tests.fixtures.command_line import run_perigee, start_perigee
from tests.fixtures.sandbox import skip_unless_possible


async def test_it_serves_until_it_is_reported_to_end(tmp_path: Path) -> None:
    skip_unless_possible("zygote")
    port, http_port = pick_ports(2)
    state = f"state_path={tmp_path / 'state'}"
    process = await start_perigee(
        *("serve", "--port", str(port), "--http-port", str(http_port), "--slots", "1", "--set", state)
    )
    assert process.stderr is not None
    try:
        await asyncio.wait_for(_read_until(process.stderr, b'"listening"'), 60)
        address = f"127.0.0.1:{port}"
        listed = await run_perigee("runtimes", "--address", address)
        assert listed.code == 0, listed.stderr
        reader, writer = await asyncio.open_connection("127.0.0.1", http_port)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await asyncio.wait_for(reader.readline(), 20)).startswith(b"HTTP/1.1 ")
        writer.close()
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0
        gone = await run_perigee("runtimes", "--address", address)
        assert gone.code == 3
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def _read_until(stream: asyncio.StreamReader, part: bytes) -> None:
    while part not in (line := await stream.readline()):
        assert line, "it ended before it listened"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--set", "slotz=2"), 2, "did you mean slots?"),
        (("--set", "server.host=0.0.0.0"), 1, "server.token: is required to listen on 0.0.0.0: set PERIGEE_TOKEN"),
    ],
)
async def test_the_services_own_rules_hold(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.delenv("PERIGEE_TOKEN", raising=False)
    ended = await run_perigee("serve", "--port", "0", "--http-port", "0", *options)
    assert ended.code == code
    assert message in ended.stderr
