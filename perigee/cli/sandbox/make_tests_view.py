"""What people see of `perigee sandbox make-tests`: progress while it works, then what was decided and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from perigee.cli.sandbox.make_tests import Decision, funnel
from perigee.testgen.plan import Plan
from perigee.testgen.verdicts import AGREES

_STAGES = {"inputs": "inputs generated", "runs": "known solutions run"}


class MakingView:
    """Bars on a terminal; elsewhere nothing, and the results alone are printed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def advance(self, stage: str, done: int, total: int) -> None:
        """Moves the stage's bar."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(_STAGES[stage])
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def next_problem(self) -> None:
        """Clears the bars."""
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()


def show_decision(console: Console, decision: Decision) -> None:
    """One problem in full: dropped candidates by reason, a row per solution, the verdict."""
    verdict = decision.verdict
    if verdict is not None and verdict.cases:
        reasons = Counter(case.dropped for case in verdict.cases if case.dropped)
        console.print(f"{len(verdict.test_cases)} of {len(verdict.cases)} candidates are valid cases")
        for reason, count in reasons.most_common():
            names = [case.name for case in verdict.cases if case.dropped == reason]
            console.print(f"  {count} dropped: {escape(reason)} ({', '.join(names[:8])}{', ...' * (count > 8)})")
    if verdict is not None and verdict.passes:
        console.print(_solution_table(decision))
    console.print(decision_line(decision))


def decision_line(decision: Decision) -> str:
    """One problem in one line of markup."""
    color = {"kept": "green", "unusable": "yellow"}.get(decision.outcome, "red")
    return f"{escape(decision.folder.name)}: [{color}]{decision.outcome}[/]: {escape(decision.reason)}"


def show_funnel(console: Console, decisions: Sequence[Decision], plan: Plan) -> None:
    """How many problems were left after each step."""
    table = Table(show_header=False)
    table.add_column("step")
    table.add_column("left", justify="right")
    for step, count in funnel(decisions, plan):
        table.add_row(step, str(count))
    console.print(table)


def _solution_table(decision: Decision) -> Table:
    assert decision.verdict is not None
    cases = decision.verdict.test_cases
    table = Table()
    table.add_column("known solution")
    table.add_column("passes", justify="right")
    table.add_column("fails by")
    for name, count in decision.verdict.passes.items():
        failures = Counter(case.results[name] for case in cases if case.results[name] != AGREES)
        row_failures = ", ".join(f"{result} {number}" for result, number in failures.most_common())
        table.add_row(escape(name), f"{count} of {len(cases)}", row_failures)
    return table
