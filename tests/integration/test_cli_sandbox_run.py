"""`perigee sandbox run` against a real sandbox: bytes as they are written, files, exit codes, and no program left."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.fixtures.command_line import run_perigee, start_perigee

BOTH = r"""
import os, sys
os.write(1, b"\xff\x00out")
os.write(2, b"err\n")
sys.exit(7)
"""
AROUND = """
import os, sys
print(sys.argv[1:], sys.stdin.read(), os.environ["GREETING"], open("data/words.txt").read())
os.mkdir("out")
with open("out/copy.bin", "wb") as file:
    file.write(bytes(range(256)))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words.txt").write_text("some words")
    return tmp_path


async def test_output_is_passed_on_byte_for_byte(sandbox_address: str, folder: Path) -> None:
    (folder / "both.py").write_text(BOTH)
    ended = await run_perigee("run", "both.py", "--address", sandbox_address, folder=folder)
    assert (ended.code, ended.stdout, ended.stderr) == (7, b"\xff\x00out", "err\n")


async def test_output_comes_while_the_program_runs(sandbox_address: str, folder: Path) -> None:
    (folder / "slow.py").write_text("import time\nprint('first', flush=True)\ntime.sleep(30)")
    process = await start_perigee("run", "slow.py", "--address", sandbox_address, folder=folder)
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 20) == b"first\n"
    assert process.returncode is None
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert process.returncode == 130


async def test_everything_around_a_program(sandbox_address: str, folder: Path) -> None:
    (folder / "around.py").write_text(AROUND)
    ended = await run_perigee(
        *("run", "around.py", "one", "--stdin", "-", "--file", "data/words.txt", "--env", "GREETING=hello"),
        *("--output", "out/copy.bin", "--output-dir", "fetched", "--stats", "--address", sandbox_address),
        *("--", "--two"),
        folder=folder,
        stdin=b"from here",
    )
    assert ended.code == 0, ended.stderr
    assert ended.stdout == b"['one', '--two'] from here hello some words\n"
    assert (folder / "fetched" / "out" / "copy.bin").read_bytes() == bytes(range(256))
    (stats,) = ended.messages
    assert stats.startswith("wall ")


async def test_a_file_that_is_not_there_is_reported(sandbox_address: str, folder: Path) -> None:
    (folder / "nothing.py").write_text("print(1)")
    arguments = ("run", "nothing.py", "--output", "gone.txt", "--address", sandbox_address)
    ended = await run_perigee(*arguments, folder=folder)
    assert (ended.code, ended.stdout) == (1, b"1\n")
    (line,) = ended.messages
    assert line.startswith("perigee: --output gone.txt: ")
    assert not (folder / "gone.txt").exists()


@pytest.mark.parametrize(
    ("source", "options", "code", "reported"),
    [
        ("while True: pass", ("--cpu-ms", "300"), 124, "was ended: "),
        ("import time\ntime.sleep(20)", ("--wall-ms", "300"), 124, "was ended: "),
        ("x = bytearray(10**9)", ("--memory-mb", "64"), 137, "was ended: "),
        ("print('x' * (3 << 20))", ("--output-mb", "2"), 153, f"was ended: output limit of {2 << 20} bytes"),
        ("while True: print('x' * 10**5)", (), 153, "was ended: "),
        ("import os\nos.kill(os.getpid(), 11)", (), 139, "was ended by SIGSEGV"),
    ],
)
async def test_bad_ends_have_codes_of_their_own(
    sandbox_address: str, folder: Path, source: str, options: tuple[str, ...], code: int, reported: str
) -> None:
    (folder / "bad.py").write_text(source)
    ended = await run_perigee("run", "bad.py", *options, "--address", sandbox_address, folder=folder)
    assert ended.code == code
    assert any(line.startswith(f"perigee: bad.py {reported}") for line in ended.messages), ended.stderr


@pytest.mark.parametrize(
    ("source", "options", "code", "reported"),
    [
        ("import os\nos.fork()", ("--processes", "1"), 1, "BlockingIOError"),
        ("open('f', 'wb').write(bytes(3 << 20))", ("--file-mb", "2"), 1, "OSError"),
        ("exit(7)", ("--language", "PYTHON3", "--stats"), 7, "wall "),
    ],
)
async def test_limits_and_names_as_the_sandbox_takes_them(
    sandbox_address: str, folder: Path, source: str, options: tuple[str, ...], code: int, reported: str
) -> None:
    (folder / "program.py").write_text(source)
    ended = await run_perigee("run", "program.py", *options, "--address", sandbox_address, folder=folder)
    assert (ended.code, reported in ended.stderr) == (code, True), ended.stderr


async def test_a_reader_that_goes_away_ends_it(sandbox_address: str, folder: Path) -> None:
    (folder / "endless.py").write_text("import time\nwhile True: print('x', flush=True); time.sleep(0.01)")
    reading, writing = os.pipe()
    arguments = ("run", "endless.py", "--address", sandbox_address)
    process = await start_perigee(*arguments, folder=folder, stdout=writing)
    os.close(writing)
    assert await asyncio.to_thread(os.read, reading, 1) == b"x"
    os.close(reading)
    _, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, stderr) == (141, b"")
