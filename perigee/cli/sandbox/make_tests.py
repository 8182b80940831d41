"""`perigee sandbox make-tests`: test cases for one problem's folder, or for a folder of many."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from perigee.cli.sandbox.connection import Sandbox, open_console, open_sandbox, read_bytes, wall_seconds
from perigee.cli.sandbox.problem import PROBLEM_FILE, Problem, list_programs, load_problem
from perigee.errors import DataLossError, FailedPreconditionError, InvalidArgumentError
from perigee.files import write_atomically
from perigee.rpc import ChannelOptions
from perigee.sandbox.compare import Comparison, Tolerance
from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.testgen.making import GenerationContext, OnProgress, make_cases
from perigee.testgen.plan import Plan, Program, compare_by
from perigee.testgen.plan import Problem as GeneratedProblem
from perigee.testgen.selection import AGREES, Drop, Selection
from perigee.testgen.store import SUMMARY_FILE, Store, check_names, dump_json, write_suite

GENERATOR_FILE = "generator.py"
KNOWN_FOLDER = "known"
GENERATOR_LANGUAGE = "python-generator"
UNUSABLE = "unusable"


@dataclass(frozen=True)
class Decision:
    """Decision on one problem's folder: a selection, or the error that prevented one."""

    folder: Path
    known: Sequence[Program] = ()
    selection: Selection | None = None
    error: str = ""

    @property
    def kind(self) -> str:
        """kept, the reason why it was dropped, or unusable."""
        if self.selection is None:
            return UNUSABLE
        return self.selection.drop or "kept"

    @property
    def reason(self) -> str:
        """Reason as a sentence."""
        return self.error if self.selection is None else self.selection.reason


def find_problems(folder: Path) -> list[Path]:
    """Returns the folder itself when it is a problem's, else the problems' folders in it by name.

    Raises InvalidArgumentError when there is none.
    """
    if (folder / PROBLEM_FILE).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{PROBLEM_FILE}") if not path.parent.name.startswith("."))
    if not found:
        hint = f"holds no {PROBLEM_FILE}, nor does a folder in it" if folder.is_dir() else "is no folder"
        raise InvalidArgumentError.for_field(str(folder), f"{hint}; name a problem's folder")
    return found


def read_fraction(option: str, text: str) -> Fraction:
    """Reads a fraction such as 0.7 or 7/10, exactly. Raises InvalidArgumentError naming the option."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise InvalidArgumentError.for_field(option, f"{text!r} is no fraction; write 0.7 or 7/10") from error


async def make_tests(
    sandbox: Sandbox, folder: Path, plan: Plan, generator_language: str, progress: OnProgress
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
            selection = refusal
        else:
            context = GenerationContext(sandbox.client, store, _wall_seconds(sandbox, generated), progress)
            selection = await make_cases(generated, plan, context)
        write_suite(folder, known, plan, selection, store)
    return Decision(folder, known, selection)


async def make_many(folders: Sequence[Path], make: Callable[[Path], Awaitable[Decision]]) -> AsyncIterator[Decision]:
    """Decides on each folder in turn; an unusable one does not stop the others."""
    for folder in folders:
        try:
            yield await make(folder)
        except (InvalidArgumentError, FailedPreconditionError, DataLossError) as error:
            yield Decision(folder, error=error.message)


def refuse(problem: Problem) -> Selection | None:
    """Drops a problem whose outputs cannot be compared with each other; returns None for others.

    Raises InvalidArgumentError when the problem's programs do not read standard input.
    """
    section = problem.section
    if section.function:
        path = problem.folder / PROBLEM_FILE
        raise InvalidArgumentError.for_field(
            f"{path}: function", "cases are made for programs that read standard input"
        )
    needs = "a checker" if section.checker.kind == "program" else "an interactor" if section.interactor else ""
    return Selection([], Drop.NEEDS_CHECKER, f"needs {needs}: agreement can't be tested") if needs else None


def read_generated(problem: Problem, plan: Plan, generator_language: str) -> GeneratedProblem:
    """Reads the generator and the known solutions. Raises InvalidArgumentError naming what is missing."""
    generator_path = problem.folder / GENERATOR_FILE
    generator = Program(GENERATOR_FILE, generator_language, read_bytes(generator_path))
    known = [problem.read_program(path) for path in list_programs(problem.folder / KNOWN_FOLDER, "known solution")]
    if len(known) < plan.solutions:
        hint = "add some, or ask for fewer with --solutions"
        raise InvalidArgumentError.for_field(
            str(problem.folder / KNOWN_FOLDER), f"holds {len(known)} known solutions of {plan.solutions}; {hint}"
        )
    checker = problem.section.checker
    is_floats = checker.kind == "floats"
    same = compare_by(Tolerance(**checker.floats.model_dump()) if is_floats else Comparison[checker.comparison.upper()])
    return GeneratedProblem(generator, tuple(known), problem.section.limits.to_proto(), same)


def funnel(decisions: Sequence[Decision], plan: Plan) -> list[tuple[str, int]]:
    """Counts the problems that are left after each step, as section 2.3.5 of the k1.5 report does."""
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
        left = [decision for decision in left if decision.kind not in dropped]
        counts.append((name, len(left)))
    return counts


def write_collection(folder: Path, decisions: Sequence[Decision], plan: Plan) -> None:
    """Writes make-tests.json of a folder of problems."""
    summary = {
        "funnel": dict(funnel(decisions, plan)),
        "problems": {
            decision.folder.name: {"outcome": decision.kind, "reason": decision.reason} for decision in decisions
        },
    }
    write_atomically(folder / SUMMARY_FILE, dump_json(summary))


def exit_code(decisions: Sequence[Decision], is_collection: bool) -> int:
    """0 where the problem is kept, or a verdict was reached on each of many; else 1."""
    if is_collection:
        return int(any(decision.selection is None for decision in decisions))
    return int(decisions[0].kind != "kept")


def _wall_seconds(sandbox: Sandbox, problem: GeneratedProblem) -> dict[str, float]:
    return {
        program.language: wall_seconds(sandbox.find_runtime(program.language, program.name), pb.Limits())
        for program in (problem.generator, *problem.known)
    }


_STAGES = {"inputs": "inputs generated", "runs": "known solutions run"}


class StageProgress(Progress):
    """A bar for each stage of a problem on a terminal; nothing elsewhere."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._stages: dict[str, TaskID] = {}

    def show_stage(self, stage: str, done: int, total: int) -> None:
        """Moves the stage's bar."""
        if stage not in self._stages:
            self._stages[stage] = self.add_task(_STAGES[stage])
        self.update(self._stages[stage], completed=done, total=total)

    def next_problem(self) -> None:
        """Clears the bars."""
        for task in self._stages.values():
            self.remove_task(task)
        self._stages.clear()


def show_decision(console: Console, decision: Decision) -> None:
    """Prints one problem in full: dropped candidates by reason, a row for each solution, the decision."""
    selection = decision.selection
    if selection is not None and selection.cases:
        reasons = Counter(case.dropped for case in selection.cases if case.dropped)
        console.print(f"{len(selection.test_cases)} of {len(selection.cases)} candidates are valid cases")
        for reason, count in reasons.most_common():
            names = [case.name for case in selection.cases if case.dropped == reason]
            console.print(f"  {count} dropped: {escape(reason)} ({', '.join(names[:8])}{', ...' * (count > 8)})")
    if selection is not None and selection.passes:
        console.print(_solution_table(decision))
    console.print(decision_line(decision))


def decision_line(decision: Decision) -> str:
    """Returns a line of markup about one problem."""
    color = {"kept": "green", "unusable": "yellow"}.get(decision.kind, "red")
    return f"{escape(decision.folder.name)}: [{color}]{decision.kind}[/]: {escape(decision.reason)}"


def show_funnel(console: Console, decisions: Sequence[Decision], plan: Plan) -> None:
    """Prints how many problems were left after each step."""
    table = Table(show_header=False)
    table.add_column("step")
    table.add_column("left", justify="right")
    for step, count in funnel(decisions, plan):
        table.add_row(step, str(count))
    console.print(table)


def _solution_table(decision: Decision) -> Table:
    assert decision.selection is not None
    cases = decision.selection.test_cases
    table = Table()
    table.add_column("known solution")
    table.add_column("passes", justify="right")
    table.add_column("fails by")
    for name, count in decision.selection.passes.items():
        failures = Counter(case.results[name] for case in cases if case.results[name] != AGREES)
        row_failures = ", ".join(f"{result} {number}" for result, number in failures.most_common())
        table.add_row(escape(name), f"{count} of {len(cases)}", row_failures)
    return table


async def make_folder_tests(
    address: str, channel: ChannelOptions, folder: Path, plan: Plan, generator_language: str
) -> int:
    """Makes the tests of one problem or of many, prints each decision and the funnel; returns the exit code."""
    folders = find_problems(folder)
    is_collection = folders != [folder]
    console = open_console()
    decisions = []
    try:
        async with open_sandbox(address, channel) as sandbox:
            sandbox.find_runtime(generator_language, "--generator-language")
            with StageProgress(console) as bars:

                async def make(problem: Path) -> Decision:
                    return await make_tests(sandbox, problem, plan, generator_language, bars.show_stage)

                if not is_collection:
                    decisions.append(await make(folder))
                    show_decision(console, decisions[0])
                else:
                    async for decision in make_many(folders, make):
                        decisions.append(decision)
                        bars.next_problem()
                        console.print(decision_line(decision))
    except asyncio.CancelledError:
        print("stopped; the same command continues with what is there", file=sys.stderr)
        raise
    if is_collection:
        write_collection(folder, decisions, plan)
        show_funnel(console, decisions, plan)
    return exit_code(decisions, is_collection)
