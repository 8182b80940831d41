"""From a generator and known solutions to test cases: what is kept and why, failing sandboxes, taking up again."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perigee.errors import DeadlineExceededError, InvalidArgumentError, ResourceExhaustedError, UnavailableError
from perigee.files import Journal, dump_line
from perigee.sandbox.compare import Comparison
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen import making
from perigee.testgen.making import GenerationContext, make_cases
from perigee.testgen.plan import Plan, Problem, Program, compare_by
from perigee.testgen.selection import Drop, Selection
from perigee.testgen.store import Store, check_names, write_suite
from tests.fixtures.scripted_sandbox import CRASH, INFRA_ERROR, TIME_LIMIT, Behaviour, ScriptedSandbox

same_lines = compare_by(Comparison.LINES)
same_tokens = compare_by(Comparison.TOKENS)
same_bytes = compare_by(Comparison.EXACT)
same_unordered_lines = compare_by(Comparison.UNORDERED_LINES)
same_unordered_tokens = compare_by(Comparison.UNORDERED_TOKENS)

PLAN = Plan(candidates=8, minimum=4, solutions=4, jobs=3)


def double(arguments: list[str], stdin: bytes) -> bytes:
    return b"%d\n" % (2 * int(stdin))


def crash_on_three(arguments: list[str], stdin: bytes) -> bytes | pb.ExecuteResponse:
    return CRASH if int(stdin) == 3 else b"%d" % (2 * int(stdin))


def generate(arguments: list[str], stdin: bytes) -> bytes | pb.ExecuteResponse:
    """Fails for 1, prints nothing for 2, repeats itself for 5."""
    index, seed = map(int, arguments)
    assert stdin == f"{index} {seed}\n".encode()
    special: dict[int, bytes | pb.ExecuteResponse] = {1: TIME_LIMIT, 2: b"\n", 5: b"4\n"}
    return special.get(index, b"%d\n" % index)


PROGRAMS: dict[bytes, Behaviour] = {
    b"generator": generate,
    b"a": double,
    b"b": double,
    b"c": double,
    b"d": crash_on_three,
}


def problem_of(generator: bytes = b"generator", known: tuple[bytes, ...] = (b"a", b"b", b"c", b"d")) -> Problem:
    solutions = tuple(Program(f"known/{number}.py", "python", source) for number, source in enumerate(known))
    return Problem(Program("generator.py", "python", generator), solutions, pb.Limits(wall_ms=1000), same_tokens)


async def make(folder: Path, sandbox: ScriptedSandbox, problem: Problem = problem_of(), plan: Plan = PLAN) -> Selection:
    with Store(folder) as store:
        check_names(folder, plan, store)
        selection = await make_cases(problem, plan, GenerationContext(sandbox, store, {"python": 1.0}, lambda *_: None))
        write_suite(folder, problem.known, plan, selection, store)
    return selection


def suite_of(folder: Path) -> dict[str, bytes]:
    """Everything in the folder but the state."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".make-tests" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(files)}


async def test_candidates_are_dropped_with_reasons(tmp_path: Path) -> None:
    selection = await make(tmp_path, ScriptedSandbox(PROGRAMS))
    assert {case.name: case.dropped for case in selection.cases} == {
        "001": "the generator failed: TIME_LIMIT: wall-clock limit of 1 ms",
        "002": "the generator failed: EMPTY: it printed nothing",
        "003": "",
        "004": "",
        "005": "the same input as 004",
        **dict.fromkeys(("006", "007", "008"), ""),
    }
    assert selection.drop is Drop.SOLUTIONS_DIFFER
    assert list(selection.cases[2].results.values()) == ["AGREES", "AGREES", "AGREES", "RUNTIME_ERROR"]
    assert list(suite_of(tmp_path)) == ["make-tests.json"]


async def test_a_problem_that_is_kept_has_its_tests(tmp_path: Path) -> None:
    selection = await make(tmp_path, ScriptedSandbox(PROGRAMS), problem_of(known=(b"a", b"b", b"c")))
    assert selection.kept
    suite = suite_of(tmp_path)
    summary = json.loads(suite.pop("make-tests.json"))
    assert summary["tests"] == ["003", "004", "006", "007", "008"]
    assert suite == {
        f"tests/00{index}.{ending}": content
        for index in (3, 4, 6, 7, 8)
        for ending, content in (("in", b"%d\n" % index), ("out", b"%d\n" % (2 * index)))
    }


async def test_a_generator_that_ignores_its_seed_is_found_out(tmp_path: Path) -> None:
    counter = iter(range(1000))
    sandbox = ScriptedSandbox(PROGRAMS | {b"generator": lambda arguments, stdin: b"%d" % next(counter)})
    selection = await make(tmp_path, sandbox)
    assert selection.drop is Drop.TOO_FEW_CASES
    assert selection.reason == "the generator made 0 usable inputs of 8, 4 must be"
    unstable = "the generator failed: UNSTABLE: two runs with the same seed differ"
    assert {case.dropped for case in selection.cases} == {unstable}
    assert {request.source for request in sandbox.requests} == {b"generator"}


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "PAUSES_S", (0.0, 0.0))


FAILURES = [
    INFRA_ERROR,
    pb.ExecuteResponse(),
    UnavailableError("gone"),
    DeadlineExceededError("late"),
    ResourceExhaustedError("full", retry_after_s=0.01),
]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.usefixtures("no_pauses")
async def test_a_failing_sandbox_is_asked_again_and_changes_nothing(tmp_path: Path, failure: object) -> None:
    sure, shaky = tmp_path / "sure", tmp_path / "shaky"
    await make(sure, ScriptedSandbox(PROGRAMS))
    # with three at work and every tenth call failing, no run meets three failures in a row
    sandbox = ScriptedSandbox(PROGRAMS, lambda call: failure if call % 10 == 0 else None)  # type: ignore[arg-type, return-value]
    await make(shaky, sandbox)
    assert len(sandbox.requests) == 39
    assert suite_of(shaky) == suite_of(sure)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.usefixtures("no_pauses")
async def test_a_sandbox_that_stays_away_stops_the_run_and_the_next_one_goes_on(
    tmp_path: Path, failure: object
) -> None:
    sure, shaky = tmp_path / "sure", tmp_path / "shaky"
    reference = ScriptedSandbox(PROGRAMS)
    await make(sure, reference)
    sandbox = ScriptedSandbox(PROGRAMS, lambda call: failure if call > 25 else None)  # type: ignore[arg-type, return-value]
    with pytest.raises(UnavailableError, match=r"known/\d.py on candidate 00\d: the sandbox failed 3 times: "):
        await make(shaky, sandbox)
    assert suite_of(shaky) == {}
    rest = ScriptedSandbox(PROGRAMS)
    await make(shaky, rest)
    assert suite_of(shaky) == suite_of(sure)
    assert len(rest.requests) == len(reference.requests) - 25


async def test_a_refused_program_is_named(tmp_path: Path) -> None:
    refusal = InvalidArgumentError.for_field("source", "has 2000000 bytes")
    sandbox = ScriptedSandbox(PROGRAMS, lambda call: refusal)
    with pytest.raises(InvalidArgumentError, match=r"generator.py for candidate 001: source: has"):
        await make(tmp_path, sandbox, plan=Plan(candidates=8, minimum=4, jobs=1))


async def test_nothing_runs_twice(tmp_path: Path) -> None:
    await make(tmp_path, ScriptedSandbox(PROGRAMS))
    before = suite_of(tmp_path)
    again = ScriptedSandbox(PROGRAMS)
    await make(tmp_path, again)
    assert again.requests == []
    assert suite_of(tmp_path) == before


async def sources_run(folder: Path, problem: Problem, plan: Plan = PLAN) -> list[bytes]:
    sandbox = ScriptedSandbox(PROGRAMS | {b"generator2": generate, b"d2": double})
    await make(folder, sandbox, problem, plan)
    return [request.source for request in sandbox.requests]


async def test_what_changes_loses_its_own_results_alone(tmp_path: Path) -> None:
    await make(tmp_path, ScriptedSandbox(PROGRAMS))
    # one solution: just its runs on the 5 usable inputs
    assert await sources_run(tmp_path, problem_of(known=(b"a", b"b", b"c", b"d2"))) == [b"d2"] * 5
    assert await sources_run(tmp_path, problem_of()) == []
    # the generator: its runs, twice each; its inputs are the same, and so are the results on them
    assert await sources_run(tmp_path, problem_of(b"generator2")) == [b"generator2"] * 16
    # more candidates: those that are new
    more = Plan(candidates=9, minimum=4, solutions=4, jobs=1)
    assert await sources_run(tmp_path, problem_of(), more) == [b"generator"] * 2 + [b"a", b"b", b"c", b"d"]
    # another seed: all candidates anew
    other = Plan(seed=1, candidates=8, minimum=4, solutions=4, jobs=1)
    assert await sources_run(tmp_path, problem_of(), other) == [b"generator"] * 16


async def test_tests_of_others_are_not_touched(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "sample.in").write_text("1\n")
    (tests / "004.in").write_text("mine\n")
    with pytest.raises(InvalidArgumentError, match=r"tests/004.in: was not made by make-tests; rename or remove it"):
        await make(tmp_path, ScriptedSandbox(PROGRAMS))
    (tests / "004.in").unlink()
    kept = problem_of(known=(b"a", b"b", b"c"))
    await make(tmp_path, ScriptedSandbox(PROGRAMS), kept)
    assert "tests/004.in" in suite_of(tmp_path)
    await make(tmp_path, ScriptedSandbox(PROGRAMS))  # dropped, so its own tests go
    assert sorted(suite_of(tmp_path)) == ["make-tests.json", "tests/sample.in"]


async def test_a_store_that_was_removed_leaves_the_tests_its_own(tmp_path: Path) -> None:
    kept = problem_of(known=(b"a", b"b", b"c"))
    await make(tmp_path, ScriptedSandbox(PROGRAMS), kept)
    before = suite_of(tmp_path)
    shutil.rmtree(tmp_path / ".make-tests")
    await make(tmp_path, ScriptedSandbox(PROGRAMS), kept)
    assert suite_of(tmp_path) == before


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def no_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process wrote outlives it without being synced."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.usefixtures("no_syncs")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(kills=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["before", "within", "after"])), max_size=4))
async def test_killed_at_any_write_it_ends_with_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, kills: list[tuple[int, str]]
) -> None:
    sure, shaky = tmp_path_factory.mktemp("sure"), tmp_path_factory.mktemp("shaky")
    # an earlier state, so that there are tests to be removed as well
    for folder in (sure, shaky):
        await make(folder, ScriptedSandbox(PROGRAMS), problem_of(known=(b"a", b"b", b"c")), Plan(3, 8, 4, 3))
    kept = problem_of(known=(b"a", b"b", b"c"))
    await make(sure, ScriptedSandbox(PROGRAMS), kept)
    for writes, moment in kills:
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, writes, moment)
            try:
                await make(shaky, ScriptedSandbox(PROGRAMS), kept)
            except* Killed:
                pass
    await make(shaky, ScriptedSandbox(PROGRAMS), kept)
    assert suite_of(shaky) == suite_of(sure)


def kill_at(patch: pytest.MonkeyPatch, writes: int, moment: str) -> None:
    """Lets so many writes of the store pass, ends the process at the next, and lets nothing be written afterwards."""
    left = [writes]
    write, append = Store.write, Journal.append

    def dying(half: Callable[[], None], whole: Callable[[], None]) -> None:
        left[0] -= 1
        if left[0] >= 0:
            return whole()
        if left[0] == -1 and moment == "within":
            half()
        if left[0] == -1 and moment == "after":
            whole()
        raise Killed

    def dying_write(store: Store, path: Path, content: bytes) -> None:
        staging = store.path / "staging" / path.name

        def half() -> None:
            staging.write_bytes(content[: len(content) // 2])

        dying(half, lambda: write(store, path, content))

    def dying_append(journal: Journal, lines: Iterable[Mapping[str, Any]]) -> None:
        whole = [*lines]

        def half() -> None:
            journal._file.write(b"".join(map(dump_line, whole))[:20])

        dying(half, lambda: append(journal, whole))

    patch.setattr(Store, "write", dying_write)
    patch.setattr(Journal, "append", dying_append)
