"""Runs the programs both ways and prints what differs."""

from __future__ import annotations

import argparse
import asyncio
import difflib
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from services.sandbox.config import SandboxConfig
from services.sandbox.languages.catalog import Catalog, find_python, load_catalog
from tests.differential.programs import KNOWN, RECORDED, Ending, Program, find_programs, run_plainly, run_sandboxed
from tests.fixtures.sandbox import running_sandbox

_AT_ONCE = 2


async def compare(programs: list[Program], catalog: Catalog) -> dict[str, tuple[Ending, Ending]]:
    """Returns how each program ended, under the plain interpreter and in the sandbox."""
    turn = asyncio.Semaphore(_AT_ONCE)
    endings = {}
    with tempfile.TemporaryDirectory() as folder:
        async with running_sandbox(Path(folder), slots=_AT_ONCE) as client:

            async def run(program: Program) -> None:
                runtime = catalog.find(program.language)
                assert runtime is not None
                async with turn:
                    endings[program.name] = (await run_plainly(runtime, program), await run_sandboxed(client, program))

            async with asyncio.TaskGroup() as group:
                for program in programs:
                    group.create_task(run(program))
    return endings


def describe(name: str, plain: Ending, sandboxed: Ending) -> str:
    """Returns the difference of two endings."""
    lines = [f"--- {name}"]
    for field in Ending._fields:
        before, after = (str(getattr(ending, field)) for ending in (plain, sandboxed))
        if before != after:
            changes = difflib.unified_diff(
                before.splitlines(), after.splitlines(), "plain", "sandbox", n=1, lineterm=""
            )
            lines += [f"  {field}:", *(f"    {line[:300]}" for line in list(changes)[2:40])]
    return "\n".join(lines)


def main() -> None:
    """Compares, or records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", nargs="?", default="")
    parser.add_argument("--record", action="store_true", help="record the endings of the Python programs")
    arguments = parser.parse_args()
    catalog = load_catalog(SandboxConfig())
    programs = [program for program in find_programs(arguments.prefix) if catalog.find(program.language)]
    endings = asyncio.run(compare(programs, catalog))
    different = {name: pair for name, pair in sorted(endings.items()) if pair[0] != pair[1]}
    for name, pair in different.items():
        print(f"--- {name}: {KNOWN[name]}" if name in KNOWN else describe(name, *pair))
    ran, differ, known = (
        Counter(name.split("/")[0] for name in names) for names in (endings, different, different.keys() & KNOWN)
    )
    for language in sorted(ran):
        print(f"{language}: {ran[language]} programs, {differ[language]} differ, {known[language]} of them explained")
    if arguments.record:
        digests = {name: plain.digest() for name, (plain, _) in endings.items() if name.startswith("python/")}
        if arguments.prefix:
            digests = json.loads(RECORDED.read_text())["digests"] | digests
        digests = dict(sorted(digests.items()))
        RECORDED.write_text(json.dumps({"version": find_python("", None).version, "digests": digests}, indent=1) + "\n")
    sys.exit(bool(different.keys() - KNOWN))


if __name__ == "__main__":
    main()
