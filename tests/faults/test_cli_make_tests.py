"""`perigee sandbox make-tests` when the sandbox goes away, and when one is there again."""

import asyncio
from pathlib import Path

from tests.fixtures.command_line import run_perigee, start_perigee
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible

OPTIONS = ("--generator-language", "python", "--candidates", "12", "--minimum", "12", "--solutions", "3")


def write_problem(folder: Path) -> Path:
    (folder / "known").mkdir(parents=True)
    (folder / "problem.yaml").write_text("checker: tokens\n")
    (folder / "generator.py").write_text("import sys\nprint(*sys.argv[1:])")
    for name in ("a", "b", "c"):
        (folder / "known" / f"{name}.py").write_text(f"print(sum(map(int, input().split())))  # {name}")
    return folder


def suite_of(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("tests/*"), *folder.glob("make-tests.json")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


async def test_a_sandbox_that_goes_away_costs_no_result_and_makes_no_disagreement(tmp_path: Path) -> None:
    skip_unless_possible("zygote")
    sure, shaky = write_problem(tmp_path / "sure"), write_problem(tmp_path / "shaky")
    journal = shaky / ".make-tests" / "journal.jsonl"
    async with running_sandbox(tmp_path / "first", isolation="zygote") as client:
        arguments = ("make-tests", str(shaky), *OPTIONS, "--address", client.target)
        process = await start_perigee(*arguments)
        while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
            assert process.returncode is None
            await asyncio.sleep(0.002)
    _, stderr = await process.communicate()
    assert process.returncode == 3
    (line,) = stderr.decode().splitlines()
    assert line.startswith("perigee: known/")
    assert "the sandbox failed 5 times" in line
    assert suite_of(shaky) == {}
    stored = journal.read_bytes()
    async with running_sandbox(tmp_path / "second", isolation="zygote") as client:
        for folder in (shaky, sure):
            ended = await run_perigee("make-tests", str(folder), *OPTIONS, "--address", client.target)
            assert ended.code == 0, ended.stderr
    assert journal.read_bytes().startswith(stored)
    assert journal.read_bytes().count(b"\n") == 12 + 3 * 12
    assert len(suite_of(sure)) == 25
    assert suite_of(shaky) == suite_of(sure)
