"""`perigee sandbox make-tests`: which folders are problems, which are refused, what is left of many."""

from fractions import Fraction
from pathlib import Path

import pytest

from perigee.cli.sandbox.make_tests import (
    Decision,
    exit_code,
    find_problems,
    funnel,
    make_many,
    read_fraction,
    read_generated,
    refuse,
)
from perigee.cli.sandbox.problem import load_problem
from perigee.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError
from perigee.testgen.plan import Plan
from perigee.testgen.selection import Drop, Selection

PLAN = Plan(solutions=2)


def write_problem(folder: Path, text: str = "", known: tuple[str, ...] = ("a.py", "b.cpp")) -> Path:
    (folder / "known").mkdir(parents=True)
    (folder / "problem.yaml").write_text(text)
    (folder / "generator.py").write_text("print(1)")
    for name in known:
        (folder / "known" / name).write_text(name)
    return folder


def test_a_folder_is_a_problem_or_holds_some(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        write_problem(tmp_path / name)
    (tmp_path / "notes").mkdir()
    assert find_problems(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert find_problems(tmp_path / "a") == [tmp_path / "a"]
    with pytest.raises(InvalidArgumentError, match=r"holds no problem.yaml, nor does a folder in it"):
        find_problems(tmp_path / "notes")
    with pytest.raises(InvalidArgumentError, match="is no folder"):
        find_problems(tmp_path / "gone")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("checker: {program: checker.cpp}", "needs a checker: agreement can't be tested"),
        ("interactor: interactor.py", "needs an interactor: agreement can't be tested"),
    ],
)
def test_problems_with_programs_that_judge_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    verdict = refuse(load_problem(write_problem(tmp_path, text)))
    assert verdict is not None
    assert (verdict.drop, verdict.reason) == (Drop.NEEDS_CHECKER, reason)


def test_comparisons_are_not_refused(tmp_path: Path) -> None:
    problem = load_problem(write_problem(tmp_path, "checker: {floats: {absolute: 0.1}}"))
    assert refuse(problem) is None
    generated = read_generated(problem, PLAN, "python-generator")
    assert generated.same(b"1.05", b"1")
    assert not generated.same(b"1.15", b"1")
    languages = {known.name: known.language for known in generated.known}
    assert languages == {"known/a.py": "python", "known/b.cpp": "cpp"}
    assert generated.generator.language == "python-generator"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"known: holds 2 known solutions of 10; add some, or ask for fewer"):
        read_generated(load_problem(write_problem(tmp_path / "few")), Plan(), "python")
    folder = write_problem(tmp_path / "none")
    (folder / "generator.py").unlink()
    with pytest.raises(InvalidArgumentError, match=r"generator.py: cannot be read"):
        read_generated(load_problem(folder), PLAN, "python")
    with pytest.raises(InvalidArgumentError, match="function: cases are made for programs that read standard input"):
        refuse(load_problem(write_problem(tmp_path / "function", "function: f")))


def decided(name: str, drop: Drop | None) -> Decision:
    return Decision(Path(name), selection=Selection([], drop, "because"))


def test_the_funnel_counts_what_is_left() -> None:
    decisions = [
        *(decided(f"c{number}", Drop.NEEDS_CHECKER) for number in range(386)),
        *(decided(f"f{number}", Drop.TOO_FEW_CASES) for number in range(151)),
        *(decided(f"d{number}", Drop.SOLUTIONS_DIFFER) for number in range(140)),
        *(decided(f"k{number}", None) for number in range(323)),
    ]
    assert [count for _, count in funnel(decisions, Plan())] == [1000, 1000, 614, 463, 323]
    assert exit_code(decisions, is_collection=True) == 0
    unusable = Decision(Path("broken"), error="problem.yaml: no")
    assert [count for _, count in funnel([*decisions, unusable], Plan())] == [1001, 1000, 614, 463, 323]
    assert exit_code([*decisions, unusable], is_collection=True) == 1


def test_one_problem_ends_by_its_verdict() -> None:
    assert exit_code([decided("a", None)], is_collection=False) == 0
    assert exit_code([decided("a", Drop.NEEDS_CHECKER)], is_collection=False) == 1


async def test_one_that_cannot_be_used_holds_up_none_but_a_failing_sandbox_all() -> None:
    async def make(folder: Path) -> Decision:
        match folder.name:
            case "wrong":
                raise InvalidArgumentError.for_field("problem.yaml", "no")
            case "taken":
                raise FailedPreconditionError("another make-tests works on this problem")
            case "infra":
                raise UnavailableError("the sandbox failed")
        return decided(folder.name, None)

    folders = [Path(name) for name in ("wrong", "a", "taken", "b", "infra", "c")]
    outcomes = []

    async def collect() -> None:
        async for decision in make_many(folders, make):
            outcomes.append((decision.folder.name, decision.kind, decision.reason))

    with pytest.raises(UnavailableError):
        await collect()
    assert outcomes == [
        ("wrong", "unusable", "problem.yaml: no"),
        ("a", "kept", "because"),
        ("taken", "unusable", "another make-tests works on this problem"),
        ("b", "kept", "because"),
    ]


def test_shares_are_exact() -> None:
    assert read_fraction("--pass-fraction", "0.9") == read_fraction("--pass-fraction", "9/10") == Fraction(9, 10)
    for text in ("most", "1/0", ""):
        with pytest.raises(InvalidArgumentError, match=r"--pass-fraction: .* is no fraction; write 0.7 or 7/10"):
            read_fraction("--pass-fraction", text)
