"""What people see of judgements and runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perigee.cli.metrics import format_seconds
from perigee.cli.sandbox.judge import Judgement, verdict_name
from perigee.cli.sandbox.reading import MIB, megabytes
from perigee.sandbox.v1 import sandbox_pb2 as pb

# Lines in files and pipes are not folded at the 80 columns of a terminal that is not there.
WIDE = 160
REASON_CUT = 60
_GREEN, _RED, _YELLOW = "green", "red", "yellow"


def open_console() -> Console:
    """Standard output as a console."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


def judgement_table(judgement: Judgement, tests: Sequence[pb.TestCase]) -> Table:
    """A row per test."""
    table = Table(title=escape(judgement.solution.name), title_justify="left")
    table.add_column("test")
    table.add_column("verdict")
    for heading in ("wall", "CPU", "memory", "points"):
        table.add_column(heading, justify="right")
    table.add_column("reason")
    for test, result in zip(tests, judgement.response.results, strict=True):
        table.add_row(
            escape(test.name),
            _colored(result.verdict),
            f"{result.wall_ms} ms",
            f"{result.cpu_ms} ms",
            megabytes(result.peak_memory_bytes),
            f"{result.points:g}",
            escape(" ".join(result.reason.split())[:REASON_CUT]),
        )
    return table


def show_judgement(console: Console, judgement: Judgement, tests: Sequence[pb.TestCase]) -> None:
    """The table, and what the compiler said of a program that does not compile."""
    console.print(judgement_table(judgement, tests))
    response = judgement.response
    if response.verdict == pb.TEST_VERDICT_COMPILE_ERROR and response.HasField("compile"):
        spoken = response.compile.stderr or response.compile.stdout
        console.print(spoken.decode(errors="replace").rstrip(), markup=False, soft_wrap=True)


def judgement_line(judgement: Judgement) -> str:
    """One solution in one line of markup."""
    response = judgement.response
    line = (
        f"{escape(judgement.solution.name)}: {_colored(response.verdict)}, "
        f"{response.passed} of {len(response.results)} tests, {response.points:g} of {response.max_points:g} points, "
        f"{format_seconds(response.wall_ms / 1000)}"
    )
    if judgement.expected == pb.TEST_VERDICT_ACCEPTED or judgement.sandbox_failed:
        return line
    expected = verdict_name(judgement.expected)
    if judgement.as_expected:
        return f"{line} [{_GREEN}](as its name says)[/]"
    return f"{line} [{_RED}](its name says {expected})[/]"


def runtime_table(response: pb.ListRuntimesResponse) -> Table:
    """A row per runtime, then one per runtime that cannot be used."""
    table = Table()
    for heading in ("language", "version", "isolation", "offers"):
        table.add_column(heading)
    for heading in ("wall", "CPU", "memory"):
        table.add_column(heading, justify="right")
    for runtime in response.runtimes:
        names = ", ".join([runtime.language, *runtime.aliases])
        offers = {"compiled": runtime.compiled, "sessions": runtime.sessions, "functions": runtime.functions}
        default, maximum = runtime.default_limits, runtime.maximum_limits
        table.add_row(
            escape(names),
            escape(runtime.version),
            escape(runtime.isolation),
            ", ".join(name for name, is_offered in offers.items() if is_offered),
            f"{default.wall_ms / 1000:g} s (max {maximum.wall_ms / 1000:g})",
            f"{default.cpu_ms / 1000:g} s (max {maximum.cpu_ms / 1000:g})",
            f"{default.memory_bytes / MIB:g} MiB (max {maximum.memory_bytes / MIB:g})",
        )
    for missing in response.missing:
        table.add_row(f"[{_YELLOW}]{escape(missing.language)}[/]", f"[{_YELLOW}]missing: {escape(missing.reason)}[/]")
    return table


def runtimes_json(response: pb.ListRuntimesResponse) -> dict[str, Any]:
    """The response for programs; byte counts are strings, as in protobuf's JSON."""
    return MessageToDict(response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _colored(verdict: pb.TestVerdict.ValueType) -> str:
    name = verdict_name(verdict)
    if verdict == pb.TEST_VERDICT_ACCEPTED:
        return f"[{_GREEN}]{name}[/]"
    is_grey = verdict in (pb.TEST_VERDICT_INFRA_ERROR, pb.TEST_VERDICT_SKIPPED, pb.TEST_VERDICT_UNSPECIFIED)
    return f"[{_YELLOW if is_grey else _RED}]{name}[/]"
