"""What the sandbox costs, how many jobs it carries, and how well it measures.

    python bench/sandbox.py [start] [throughput] [accuracy] [soak] [gateway] [--quick] [--jobs 20000] [--lean bash]

start: an empty job from start to result, against a bare process and a bare crun container. throughput: jobs per second
and core at 2 and 8 jobs at once. accuracy: limits, peak memory and CPU time against programs of known use. soak: growth
over many jobs. gateway: HTTP against gRPC. Alternatives take turns within one run; each part writes its figures to
bench/results/sandbox-PART.json. As root, with crun: the services are real ones, on loopback, and share the cores with
this client.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import sandbox_accuracy
import sandbox_gateway
import sandbox_soak
import sandbox_start
import sandbox_throughput
import uvloop
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from sandbox_service import EMPTY

from perigee.errors import PerigeeError

# Of a table that is not printed to a terminal.
WIDTH = 140
Rows = Sequence[tuple[str, ...]]
Result = tuple[Rows, dict[str, Any]]


async def start(arguments: argparse.Namespace, folder: Path) -> Result:
    """The row of start latencies."""
    turns, block = (4, 5) if arguments.quick else (20, 10)
    starts = await sandbox_start.measure_starts(folder, arguments.lean, turns, block)
    return sandbox_start.table_of(starts), sandbox_start.to_json(starts)


async def throughput(arguments: argparse.Namespace, folder: Path) -> Result:
    """The row of sustained throughput."""
    turns, seconds = (2, 2.0) if arguments.quick else (5, 5.0)
    lean, results = await sandbox_throughput.measure_throughput(folder, arguments.lean, (2, 8), turns, seconds)
    return sandbox_throughput.table_of(lean, results), sandbox_throughput.to_json(lean, results)


async def accuracy(arguments: argparse.Namespace, folder: Path) -> Result:
    """The row of accuracies."""
    results, missing = await sandbox_accuracy.measure_accuracy(folder, 1 if arguments.quick else 5)
    return sandbox_accuracy.table_of(results, missing), sandbox_accuracy.to_json(results, missing)


async def soak(arguments: argparse.Namespace, folder: Path) -> Result:
    """The row of growth over many jobs."""
    jobs = arguments.jobs or (1000 if arguments.quick else 20_000)
    result = await sandbox_soak.measure_soak(folder, jobs, arguments.concurrency, arguments.lean)
    return sandbox_soak.table_of(result), sandbox_soak.to_json(result)


async def gateway(arguments: argparse.Namespace, folder: Path) -> Result:
    """The row of HTTP against gRPC."""
    turns, block = (4, 10) if arguments.quick else (20, 25)
    result = await sandbox_gateway.measure_gateway(folder, turns, block)
    return sandbox_gateway.table_of(result), sandbox_gateway.to_json(result)


PARTS: dict[str, Callable[[argparse.Namespace, Path], Awaitable[Result]]] = {
    part.__name__: part for part in (start, throughput, accuracy, soak, gateway)
}


async def measure(name: str, arguments: argparse.Namespace, machine: dict[str, object]) -> Rows:
    """Measures one part with services of its own, and writes its figures."""
    with tempfile.TemporaryDirectory(prefix="perigee-bench-") as folder:
        rows, figures = await PARTS[name](arguments, arguments.work / name if arguments.work else Path(folder))
    path = arguments.out / f"sandbox-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, "quick": arguments.quick, **figures}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    return rows


def print_table(name: str, rows: Rows, machine: dict[str, object]) -> None:
    """Prints what was measured, what it is to be, and from what."""
    title = f"sandbox, {name}: {machine['cores']} cores of {machine['processor']}"
    table = Table("", "measured", "target", "from", title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def main() -> None:
    """Measures the parts that are named, all of them unless any is."""
    parser = argparse.ArgumentParser(description="Measures the sandbox.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="few turns and jobs: about three minutes for all")
    parser.add_argument("--jobs", type=int, help="jobs of the soak; 20000 unless set, 1000 when quick")
    parser.add_argument("--concurrency", type=int, default=2, help="jobs of the soak at once")
    lean = "language of the smallest container; the fastest one unless set"
    parser.add_argument("--lean", choices=sorted(EMPTY), help=lean)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the figures")
    work = "new folder for the services' state and logs, kept; else a temporary one"
    parser.add_argument("--work", type=Path, help=work)
    arguments = parser.parse_args()
    machine = describe_machine("crun", "/usr/bin/python3", "gcc")
    failed = []
    for name in arguments.parts or PARTS:
        try:
            print_table(name, uvloop.run(measure(name, arguments, machine)), machine)
        except (PerigeeError, RuntimeError, OSError) as error:
            failed.append(name)
            print(f"sandbox, {name}: not measured: {error or type(error).__name__}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
