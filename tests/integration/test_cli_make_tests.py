"""`perigee sandbox make-tests` against a real sandbox, through kills and over many problems."""

import asyncio
import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.fixtures.command_line import run_perigee, start_perigee

GENERATOR = """
import random, sys
index, seed = int(sys.argv[1]), int(sys.argv[2])
assert sys.stdin.read() == f"{index} {seed}\\n"
assert index != 2
random.seed(seed)
print(3 if index in (3, 4) else random.randint(10, 10**6))
"""
KNOWN = {
    "plus.py": "n = int(input())\nprint(n + n)",
    "shift.py": "print(int(input()) << 1)",
    "times.py": "print(2 * int(input()))",
    "odd.py": "n = int(input())\nprint(2 * n if n != 3 else 7)",
}
CANDIDATES = 10
OPTIONS = ("--generator-language", "python", "--candidates", str(CANDIDATES), "--minimum", "6", "--solutions", "4")
KEPT = ("--pass-fraction", "0.75")
RUNS = CANDIDATES + 8 * len(KNOWN)  # all candidates, and the solutions on those that are usable


def write_problem(folder: Path, text: str = "limits: {wall_ms: 2000}\n") -> Path:
    (folder / "known").mkdir(parents=True)
    (folder / "problem.yaml").write_text(text)
    (folder / "generator.py").write_text(GENERATOR)
    for name, source in KNOWN.items():
        (folder / "known" / name).write_text(source)
    return folder


def suite_of(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("tests/*"), *folder.glob("make-tests.json")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


async def make(folder: Path, address: str, *options: str) -> int:
    ended = await run_perigee("make-tests", str(folder), "--address", address, *OPTIONS, *options)
    assert ended.stderr == ""
    return ended.code


async def test_a_problem_is_dropped_or_kept(sandbox_address: str, tmp_path: Path) -> None:
    folder = write_problem(tmp_path / "double")
    assert await make(folder, sandbox_address) == 1
    summary = json.loads((folder / "make-tests.json").read_text())
    assert (summary["verdict"], summary["dropped_because"]) == ("dropped", "solutions_differ")
    assert not (folder / "tests").exists()
    dropped = {case["name"]: case["dropped_because"] for case in summary["candidates"] if not case["kept"]}
    assert list(dropped) == ["002", "004"]
    assert dropped["002"].startswith("the generator failed: RUNTIME_ERROR: AssertionError")
    assert dropped["004"] == "the same input as 003"
    assert await make(folder, sandbox_address, *KEPT) == 0
    summary = json.loads((folder / "make-tests.json").read_text())
    assert (summary["verdict"], summary["counts"]["cases"]) == ("kept", 8)
    failed = {solution["name"]: solution["failed"] for solution in summary["solutions"]}
    assert failed == {f"known/{name}": {"003": "DIFFERS"} if name == "odd.py" else {} for name in sorted(KNOWN)}
    for name in summary["tests"]:
        number = int((folder / "tests" / f"{name}.in").read_text())
        assert int((folder / "tests" / f"{name}.out").read_text()) == 2 * number


async def test_killed_again_and_again_it_ends_with_the_same_bytes(sandbox_address: str, tmp_path: Path) -> None:
    sure, shaky = write_problem(tmp_path / "sure"), write_problem(tmp_path / "shaky")
    assert await make(sure, sandbox_address, *KEPT) == 0
    journal = shaky / ".make-tests" / "journal.jsonl"
    counts = [0]
    for at_least in (4, 9, 14, 20, 26):
        arguments = ("make-tests", str(shaky), "--address", sandbox_address, *OPTIONS, *KEPT)
        process = await start_perigee(*arguments)
        while lines_of(journal) < at_least:
            assert process.returncode is None, "it was over before it could be killed"
            await asyncio.sleep(0.002)
        process.kill()
        await process.communicate()
        counts.append(lines_of(journal))
    assert counts == sorted(counts)
    assert counts[-1] < RUNS
    assert await make(shaky, sandbox_address, *KEPT) == 0
    assert lines_of(journal) == RUNS  # nothing ran twice
    assert suite_of(shaky) == suite_of(sure)
    assert sorted(path.name for path in (shaky / ".make-tests" / "staging").iterdir()) == []


def lines_of(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_stops_it_in_order(sandbox_address: str, tmp_path: Path, number: signal.Signals) -> None:
    folder = write_problem(tmp_path / "double")
    process = await start_perigee("make-tests", str(folder), "--address", sandbox_address, *OPTIONS)
    while lines_of(folder / ".make-tests" / "journal.jsonl") < 12:
        assert process.returncode is None
        await asyncio.sleep(0.002)
    process.send_signal(number)
    stdout, stderr = await process.communicate()
    assert (process.returncode, stdout) == (128 + number, b"")
    assert stderr.decode() == "stopped; the same command continues with what is there\n"
    assert not (folder / "make-tests.json").exists()


async def test_two_at_once_do_not_mix(sandbox_address: str, tmp_path: Path) -> None:
    folder = write_problem(tmp_path / "double")
    first = await start_perigee("make-tests", str(folder), "--address", sandbox_address, *OPTIONS, *KEPT)
    while lines_of(folder / ".make-tests" / "journal.jsonl") < 1:
        assert first.returncode is None
        await asyncio.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    second = await run_perigee("make-tests", str(folder), "--address", sandbox_address, *OPTIONS)
    first.send_signal(signal.SIGCONT)
    await first.communicate()
    assert (first.returncode, second.code) == (0, 1)
    assert second.messages == [f"perigee: {folder}: another make-tests works on this problem"]


async def test_many_problems_end_in_a_funnel(sandbox_address: str, tmp_path: Path) -> None:
    write_problem(tmp_path / "kept")
    write_problem(tmp_path / "checked", "checker: {program: checker.cpp}\n")
    wrong = write_problem(tmp_path / "wrong", "checkr: tokens\n")
    apart = write_problem(tmp_path / "apart")
    (apart / "known" / "plus.py").write_text("n = int(input())\nprint(2 * n if n % 2 else 0)")
    few = write_problem(tmp_path / "few")
    (few / "generator.py").write_text("import sys\nprint(sys.argv[2] if int(sys.argv[1]) < 5 else 1)")
    ended = await run_perigee("make-tests", str(tmp_path), "--address", sandbox_address, *OPTIONS, *KEPT)
    assert ended.code == 1, "one of them cannot be used"
    assert f"wrong: unusable: {wrong}/problem.yaml: checkr: unknown key; did you mean checker?" in ended.stdout.decode()
    summary = json.loads((tmp_path / "make-tests.json").read_text())
    assert {name: problem["outcome"] for name, problem in summary["problems"].items()} == {
        "apart": "solutions_differ",
        "checked": "needs_checker",
        "few": "too_few_cases",
        "kept": "kept",
        "wrong": "unusable",
    }
    assert list(summary["funnel"].values()) == [5, 4, 3, 2, 1]
    assert json.loads((tmp_path / "few" / "make-tests.json").read_text())["reason"] == (
        "the generator made 5 usable inputs of 10, 6 must be"
    )
    before = suite_of(tmp_path / "kept")
    shutil.rmtree(tmp_path / "wrong")
    again = await run_perigee("make-tests", str(tmp_path), "--address", sandbox_address, *OPTIONS, *KEPT)
    assert again.code == 0
    assert suite_of(tmp_path / "kept") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--minimum", "40"), "--minimum: must be from 1 to --candidates, 10"),
        (("--agree-fraction", "half"), "--agree-fraction: 'half' is no fraction"),
        (("--solutions", "5"), "known: holds 4 known solutions of 5"),
        (("--generator-language", "pythn"), "--generator-language: this sandbox has no runtime pythn"),
    ],
)
async def test_a_mistake_is_reported_in_one_line(
    sandbox_address: str, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    folder = write_problem(tmp_path / "double")
    ended = await run_perigee("make-tests", str(folder), "--address", sandbox_address, *OPTIONS, *options)
    assert ended.code == 2
    (line,) = ended.messages
    assert message in line
    assert not (folder / ".make-tests").exists()
