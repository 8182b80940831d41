"""The commands that show tables: connect, do the work, print what came out, give the exit code."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from perigee.cli.sandbox import judge, make_tests, tables
from perigee.cli.sandbox.connection import open_sandbox
from perigee.cli.sandbox.make_tests_view import MakingView, decision_line, show_decision, show_funnel
from perigee.cli.sandbox.problem import load_problem
from perigee.testgen.plan import Plan


async def list_runtimes(address: str, as_json: bool) -> int:
    """Prints the runtimes."""
    console = tables.open_console()
    async with open_sandbox(address) as sandbox:
        if as_json:
            console.print_json(data=tables.runtimes_json(sandbox.runtimes))
        else:
            console.print(tables.runtime_table(sandbox.runtimes))
    return 0


async def judge_folder(address: str, folder: Path, chosen: Sequence[Path], as_json: bool) -> int:
    """Prints a table per solution as it is judged, then a line for each."""
    problem = load_problem(folder)
    solutions, tests = judge.read_solutions(problem, chosen), problem.read_tests()
    console = tables.open_console()
    judgements = []
    async with open_sandbox(address) as sandbox:
        async for judgement in judge.judge(sandbox, problem, solutions, tests):
            judgements.append(judgement)
            if not as_json:
                tables.show_judgement(console, judgement, tests)
    if as_json:
        console.print_json(data=judge.to_json(problem, tests, judgements))
    else:
        for judgement in judgements:
            console.print(tables.judgement_line(judgement))
    return judge.exit_code(judgements)


async def make_folder_tests(address: str, folder: Path, plan: Plan, generator_language: str) -> int:
    """Prints what was decided on each problem, and what is left of many."""
    folders = make_tests.find_problems(folder)
    is_collection = folders != [folder]
    console = tables.open_console()
    try:
        async with open_sandbox(address) as sandbox:
            sandbox.find_runtime(generator_language, "--generator-language")
            with MakingView(console) as view:

                async def make(problem: Path) -> make_tests.Decision:
                    return await make_tests.make_tests(sandbox, problem, plan, generator_language, view.advance)

                if not is_collection:
                    decision = await make(folder)
                    decisions = [decision]
                    show_decision(console, decision)
                else:
                    decisions = []
                    async for decision in make_tests.make_many(folders, make):
                        decisions.append(decision)
                        view.next_problem()
                        console.print(decision_line(decision))
    except asyncio.CancelledError:
        print("stopped; the same command goes on with what is there", file=sys.stderr)
        raise
    if is_collection:
        make_tests.write_collection(folder, decisions, plan)
        show_funnel(console, decisions, plan)
    return make_tests.exit_code(decisions, is_collection)
