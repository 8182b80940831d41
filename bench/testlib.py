"""testlib's own tests (https://github.com/MikeMirzayanov/testlib, tests/) run in the sandbox: its checkers, generators,
validators and interactor are compiled there, run with the same arguments, and are to exit and to print as it expects.
Then its checkers and interactor judge a submission, and each of its exit codes gives its verdict.

    python bench/testlib.py CHECKOUT [--address HOST:PORT]
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox_service import sandbox_client

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb

CALL_S = 300.0
COMPILER = pb.Limits(wall_ms=110_000, cpu_ms=60_000)
RUN = re.compile(
    r'^\s*bash ../scripts/test-ref (?P<ref>\S+) "?\$VALGRIND"? ./(?P<program>\S+)(?P<rest>.*)$', re.MULTILINE
)
# Ends of a checker, the points of a test of 10, and what it should get.
ENDINGS = {
    'quitf(_ok, "fine")': ("ACCEPTED", 10.0),
    'quitf(_wa, "bad")': ("WRONG_ANSWER", 0.0),
    'quitf(_pe, "bad")': ("WRONG_ANSWER", 0.0),
    'quitf(_dirt, "more")': ("WRONG_ANSWER", 0.0),
    'quitf(_unexpected_eof, "less")': ("WRONG_ANSWER", 0.0),
    'quitf(_fail, "own")': ("UNJUDGEABLE", 0.0),
    'quitp(0.5, "half")': ("WRONG_ANSWER", 5.0),
    'quitp(5, "half")': ("WRONG_ANSWER", 5.0),
    'quitp(10, "all")': ("ACCEPTED", 10.0),
    'quitf(_pc(50), "half")': ("WRONG_ANSWER", 5.0),
    'quitf(_pc(0), "none")': ("WRONG_ANSWER", 0.0),
    'quitf(_pc(7), "few")': ("WRONG_ANSWER", 0.7),
    'quitf(_pc(100), "all")': ("ACCEPTED", 10.0),
}


@dataclass(frozen=True)
class Invocation:
    """One run of a test's script."""

    folder: Path
    source: Path
    ref: str
    arguments: list[str]
    stdin: bytes

    def expected(self, name: str) -> str:
        """Returns what the suite expects of one stream, or of the exit code."""
        return " ".join((self.folder / "refs" / self.ref / name).read_text(errors="replace").split())


def read_invocations(checkout: Path) -> Iterator[Invocation]:
    """Yields the runs that the scripts name without loops."""
    for script in sorted((checkout / "tests").glob("test-*/run.sh")):
        folder = script.parent
        for found in RUN.finditer(script.read_text().replace('"$os"', "unix")):
            command, _, redirected = found["rest"].partition("<")
            stdin = folder / redirected.strip().strip('"') if redirected else None
            source = next(folder.rglob(f"{found['program']}.cpp"), None)
            if "$" in found["rest"] or "$" in found["ref"] or source is None:
                continue
            content = b"" if stdin is None else stdin.read_bytes()
            yield Invocation(folder, source, found["ref"], shlex.split(command), content)
        if folder.name.startswith("test-007"):
            for source in sorted((folder / "src").glob("v?.cpp")):
                for path in sorted((folder / "files/unix").glob("input.*")):
                    ref = f"{source.stem}-{path.suffix[1:]}"
                    arguments = ["--testOverviewLogFileName", "stderr"]
                    yield Invocation(folder, source, ref, arguments, path.read_bytes())


async def find_difference(client: SandboxClient, library: pb.File, run: Invocation) -> str:
    """Runs a program of the suite; returns how it differs from what is expected."""
    names = {name for name in run.arguments if (run.folder / name).is_file()}
    sources = (path for path in run.folder.rglob("*") if path.suffix in (".h", ".cpp") and path != run.source)
    names |= {path.relative_to(run.folder).as_posix() for path in sources}
    files = [pb.File(path=name, content=(run.folder / name).read_bytes()) for name in names]
    request = pb.ExecuteRequest(
        language="cpp",
        source=run.source.read_bytes(),
        args=run.arguments,
        stdin=run.stdin,
        files=[library, *files],
        compile_limits=COMPILER,
    )
    response = await client.execute(request, timeout_s=CALL_S)
    found = {
        "exit_code": str(response.exit_code),
        "stdout": " ".join(response.stdout.decode(errors="replace").split()),
        "stderr": " ".join(response.stderr.decode(errors="replace").split()),
    }
    if response.status == pb.STATUS_COMPILE_ERROR:
        return response.compile.stderr.decode(errors="replace")[:300]
    differing = [name for name, text in found.items() if text != run.expected(name)]
    return "; ".join(f"{name}: {found[name][:200]} instead of {run.expected(name)[:200]}" for name in differing)


async def find_wrong_ending(client: SandboxClient, library: pb.File, ending: str) -> str:
    """Judges by a checker that ends so; returns how the verdict or the points differ."""
    source = f'#include "testlib.h"\nint main(int n, char **a) {{ registerTestlibCmd(n, a); {ending}; }}'
    checker = pb.Program(language="cpp", source=source.encode(), files=[library], compile_limits=COMPILER)
    test = pb.TestCase(stdio=pb.StdioTest(), points=10)
    request = pb.JudgeRequest(language="python", source=b"pass", tests=[test], checker=pb.Checker(program=checker))
    [result] = (await client.judge(request, timeout_s=CALL_S)).results
    found = pb.TestVerdict.Name(result.verdict).removeprefix("TEST_VERDICT_"), round(result.points, 6)
    return "" if found == ENDINGS[ending] else f"{found} instead of {ENDINGS[ending]}: {result.reason[:200]}"


async def main() -> int:
    """Prints what differs, and the figures; returns 1 when something does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--address", default="", help="a running sandbox; one is started unless given")
    options = parser.parse_args()
    library = pb.File(path="testlib.h", content=(options.checkout / "testlib.h").read_bytes())
    runs = list(read_invocations(options.checkout))
    wrong = 0
    async with sandbox_client(options.address, slots=2) as client:
        for run in runs:
            if difference := await find_difference(client, library, run):
                wrong += 1
                print(f"{run.folder.name} {run.ref}: {difference}", flush=True)
        for ending in ENDINGS:
            if difference := await find_wrong_ending(client, library, ending):
                wrong += 1
                print(f"{ending}: {difference}", flush=True)
    print(f"{len(runs) + len(ENDINGS) - wrong} of {len(runs) + len(ENDINGS)} as testlib's tests expect")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
