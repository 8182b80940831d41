"""`perigee sandbox make-tests`: test cases for one problem's folder, or for a folder of many."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from perigee.cli.sandbox.connection import Sandbox, wall_seconds
from perigee.cli.sandbox.problem import PROBLEM_FILE, Problem, list_programs, load_problem
from perigee.cli.sandbox.reading import read_bytes
from perigee.errors import DataLossError, FailedPreconditionError, InvalidArgumentError
from perigee.files import write_atomically
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen import comparison
from perigee.testgen.making import Progress, Workshop, make_cases
from perigee.testgen.plan import Plan, Program
from perigee.testgen.plan import Problem as GeneratedProblem
from perigee.testgen.store import Store
from perigee.testgen.suite import SUMMARY_FILE, check_names, dump_json, write_suite
from perigee.testgen.verdicts import Drop, Verdict

GENERATOR_FILE = "generator.py"
KNOWN_FOLDER = "known"
GENERATOR_LANGUAGE = "python-generator"
UNUSABLE = "unusable"
_COMPARISONS: dict[str, comparison.Comparison] = {
    "exact": comparison.same_bytes,
    "tokens": comparison.same_tokens,
    "lines": comparison.same_lines,
    "unordered_lines": comparison.same_unordered_lines,
    "unordered_tokens": comparison.same_unordered_tokens,
}


@dataclass(frozen=True)
class Decision:
    """What became of one problem's folder: a verdict, or why none could be reached."""

    folder: Path
    known: Sequence[Program] = ()
    verdict: Verdict | None = None
    error: str = ""

    @property
    def outcome(self) -> str:
        """kept, why it was dropped, or unusable."""
        if self.verdict is None:
            return UNUSABLE
        return self.verdict.drop or "kept"

    @property
    def reason(self) -> str:
        """In words."""
        return self.error if self.verdict is None else self.verdict.reason


def find_problems(folder: Path) -> list[Path]:
    """The folder itself when it is a problem's, else the problems' folders in it by name.

    Raises InvalidArgumentError when there is none.
    """
    if (folder / PROBLEM_FILE).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{PROBLEM_FILE}") if not path.parent.name.startswith("."))
    if not found:
        hint = f"holds no {PROBLEM_FILE}, nor does a folder in it" if folder.is_dir() else "is no folder"
        raise InvalidArgumentError.of(str(folder), f"{hint}; name a problem's folder")
    return found


def read_share(option: str, text: str) -> Fraction:
    """A share such as 0.7 or 7/10, exactly. Raises InvalidArgumentError naming the option."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise InvalidArgumentError.of(option, f"{text!r} is no share; write 0.7 or 7/10") from error


async def make_tests(
    sandbox: Sandbox, folder: Path, plan: Plan, generator_language: str, progress: Progress
) -> Decision:
    """Makes the test cases of one problem and writes them to its folder.

    Raises InvalidArgumentError when the folder cannot be used, FailedPreconditionError while another process works on
    it, DataLossError when its state is damaged, UnavailableError when the sandbox fails.
    """
    problem = load_problem(folder)
    refusal = refuse(problem)
    generated = read_generated(problem, plan, generator_language) if refusal is None else None
    known = generated.known if generated else ()
    with Store(folder) as store:
        check_names(folder, plan, store)
        if generated is None:
            assert refusal is not None
            verdict = refusal
        else:
            workshop = Workshop(sandbox.client, store, _wall_seconds(sandbox, generated), progress)
            verdict = await make_cases(generated, plan, workshop)
        write_suite(folder, known, plan, verdict, store)
    return Decision(folder, known, verdict)


async def make_many(folders: Sequence[Path], make: Callable[[Path], Awaitable[Decision]]) -> AsyncIterator[Decision]:
    """Decides on each folder in turn; one that cannot be used holds up none of the others."""
    for folder in folders:
        try:
            yield await make(folder)
        except (InvalidArgumentError, FailedPreconditionError, DataLossError) as error:
            yield Decision(folder, error=error.message)


def refuse(problem: Problem) -> Verdict | None:
    """The verdict on a problem whose outputs cannot be compared with each other; None where they can.

    Raises InvalidArgumentError when the problem's programs do not read standard input.
    """
    section = problem.section
    if section.function:
        path = problem.folder / PROBLEM_FILE
        raise InvalidArgumentError.of(f"{path}: function", "cases are made for programs that read standard input")
    needs = "a checker" if section.checker.kind == "program" else "an interactor" if section.interactor else ""
    return Verdict([], Drop.NEEDS_CHECKER, f"needs {needs}: agreement can't be tested") if needs else None


def read_generated(problem: Problem, plan: Plan, generator_language: str) -> GeneratedProblem:
    """The generator and the known solutions. Raises InvalidArgumentError naming what is missing."""
    generator_path = problem.folder / GENERATOR_FILE
    generator = Program(GENERATOR_FILE, generator_language, read_bytes(generator_path))
    known = [problem.read_program(path) for path in list_programs(problem.folder / KNOWN_FOLDER, "known solution")]
    if len(known) < plan.solutions:
        hint = "add some, or ask for fewer with --solutions"
        raise InvalidArgumentError.of(
            str(problem.folder / KNOWN_FOLDER), f"holds {len(known)} known solutions of {plan.solutions}; {hint}"
        )
    checker = problem.section.checker
    same = _COMPARISONS[checker.comparison]
    if checker.kind == "floats":
        same = comparison.same_floats(checker.floats.absolute, checker.floats.relative)
    return GeneratedProblem(generator, tuple(known), problem.section.limits.to_proto(), same)


def funnel(decisions: Sequence[Decision], plan: Plan) -> list[tuple[str, int]]:
    """How many problems are left after each step, as section 2.3.5 of the k1.5 report counts them."""
    steps = (
        ("problems", ()),
        ("usable", (UNUSABLE,)),
        ("without a special checker", (Drop.NEEDS_CHECKER,)),
        (f"with {plan.minimum} valid cases of {plan.candidates}", (Drop.TOO_FEW_CASES,)),
        ("kept: enough solutions pass all cases", (Drop.SOLUTIONS_DIFFER,)),
    )
    left = list(decisions)
    counts = []
    for name, dropped in steps:
        left = [decision for decision in left if decision.outcome not in dropped]
        counts.append((name, len(left)))
    return counts


def write_collection(folder: Path, decisions: Sequence[Decision], plan: Plan) -> None:
    """Writes make-tests.json of a folder of problems."""
    summary = {
        "funnel": dict(funnel(decisions, plan)),
        "problems": {
            decision.folder.name: {"outcome": decision.outcome, "reason": decision.reason} for decision in decisions
        },
    }
    write_atomically(folder / SUMMARY_FILE, dump_json(summary))


def exit_code(decisions: Sequence[Decision], is_collection: bool) -> int:
    """0 where the problem is kept, or a verdict was reached on each of many; else 1."""
    if is_collection:
        return int(any(decision.verdict is None for decision in decisions))
    return int(decisions[0].outcome != "kept")


def _wall_seconds(sandbox: Sandbox, problem: GeneratedProblem) -> dict[str, float]:
    return {
        program.language: wall_seconds(sandbox.find_runtime(program.language, program.name), pb.Limits())
        for program in (problem.generator, *problem.known)
    }
