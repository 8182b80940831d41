"""Command line of `perigee sandbox`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from perigee.cli.channel import connecting
from perigee.cli.ending import DebugOption, Interrupt, reporting_errors, run_interruptible
from perigee.rpc import ChannelOptions

app = typer.Typer(
    name="sandbox",
    help="Run programs in isolation, judge solutions, make test cases: with a running sandbox, or serve one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# Exit code of judge and make-tests when the sandbox failed; `run` has 125 for it.
SANDBOX_FAILED = 3

AddressOption = Annotated[
    str,
    typer.Option("--address", metavar="HOST:PORT", envvar="PERIGEE_SANDBOX_ADDRESS", help="The sandbox."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
ADDRESS = "127.0.0.1:50056"


@app.command()
@connecting
def run(
    channel: ChannelOptions,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The program's source.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARGS]...", help="Its arguments; after -- when they begin with a dash."),
    ] = None,
    language: Annotated[
        str | None, typer.Option("--language", metavar="NAME", help="A runtime; by the suffix unless set.")
    ] = None,
    stdin: Annotated[
        str | None, typer.Option("--stdin", metavar="FILE|-", help="Standard input; empty by default.")
    ] = None,
    files: Annotated[
        list[str] | None, typer.Option("--file", metavar="PATH", help="A file to place beside the program; repeat.")
    ] = None,
    outputs: Annotated[
        list[str] | None, typer.Option("--output", metavar="PATH", help="A file to fetch after the run; repeat.")
    ] = None,
    output_dir: Annotated[Path, typer.Option("--output-dir", metavar="DIR", help="Where fetched files go.")] = Path(),
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="An environment variable; repeat.")
    ] = None,
    wall_ms: Annotated[int | None, typer.Option("--wall-ms", min=1, help="Wall-clock limit.")] = None,
    cpu_ms: Annotated[int | None, typer.Option("--cpu-ms", min=1, help="CPU limit of all its processes.")] = None,
    memory_mb: Annotated[int | None, typer.Option("--memory-mb", min=1, help="Memory limit in MiB.")] = None,
    processes: Annotated[int | None, typer.Option("--processes", min=1, help="Processes and threads at once.")] = None,
    file_mb: Annotated[int | None, typer.Option("--file-mb", min=1, help="Space for its files in MiB.")] = None,
    output_mb: Annotated[int | None, typer.Option("--output-mb", min=1, help="Output limit in MiB.")] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print wall time, CPU time and memory on standard error.")
    ] = False,
    address: AddressOption = ADDRESS,
    debug: DebugOption = False,
) -> None:
    """Run one program; its output comes as it is written.

    Ends with the program's exit code, 128 + n where signal n ended it, or:

    1 a file could not be fetched or written,
    2 wrong usage,
    124 time limit,
    125 the sandbox failed,
    126 compile error,
    137 memory limit,
    153 output limit.
    """

    with reporting_errors(debug, failure_code=125):
        from perigee.cli.sandbox import run as implementation
        from perigee.cli.sandbox.problem import LimitsSection

        limits = LimitsSection(
            wall_ms=wall_ms,
            cpu_ms=cpu_ms,
            memory_mb=memory_mb,
            processes=processes,
            file_mb=file_mb,
            output_mb=output_mb,
        )
        request = implementation.make_request(
            file, arguments or [], language, stdin, files or [], outputs or [], env or [], limits.to_proto()
        )

        async def work(interrupt: Interrupt) -> int:
            interrupt.end_at_once = implementation.leave
            return await implementation.run(address, channel, request, str(file), output_dir, stats)

        raise typer.Exit(run_interruptible(work))


@app.command()
@connecting
def judge(
    channel: ChannelOptions,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A problem's folder.")],
    solutions: Annotated[
        list[Path] | None, typer.Option("--solution", metavar="FILE", help="Judge just this; repeat.")
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Have the problem's validators check each input.")
    ] = False,
    as_json: JsonOption = False,
    address: AddressOption = ADDRESS,
    debug: DebugOption = False,
) -> None:
    """Judge the solutions of a problem against its tests.

    DIR holds problem.yaml, tests/NAME.in with NAME.out, and solutions/, or is a
    package of Kattis (problem.yaml, data/secret), Polygon (problem.xml) or DMOJ
    (init.yml).

    Solutions should be accepted. One whose name begins with wrong_, slow_, crash_
    or big_ should get that verdict (big_: memory limit) on one test at least; a
    package says by its folders or tags what its solutions should get.

    Ends with 0 when all solutions got what they should, 1 when not, 2 for wrong
    usage, 3 when the sandbox failed.
    """

    with reporting_errors(debug, SANDBOX_FAILED):
        from perigee.cli.sandbox.judge import judge_folder

        raise typer.Exit(
            run_interruptible(lambda _: judge_folder(address, channel, folder, solutions or [], as_json, validate))
        )


@app.command()
@connecting
def swe(
    channel: ChannelOptions,
    task: Annotated[Path, typer.Argument(metavar="TASK", help="A task's file, YAML or JSON.")],
    patch: Annotated[
        Path | None, typer.Option("--patch", metavar="FILE", help="The diff to judge; the task's own unless set.")
    ] = None,
    as_json: JsonOption = False,
    address: AddressOption = ADDRESS,
    debug: DebugOption = False,
) -> None:
    """Judge a patch by the tests of a repository.

    TASK names the repository and the tests that must pass, as SWE-bench does.

    Ends with 0 when the patch is accepted, 1 when not, 2 for wrong usage, 3 when
    the sandbox failed or the tests judge no patch.
    """

    with reporting_errors(debug, SANDBOX_FAILED):
        from perigee.cli.sandbox.swe import judge_patch, make_request

        request = make_request(task, patch)
        raise typer.Exit(run_interruptible(lambda _: judge_patch(address, channel, request, as_json)))


@app.command()
@connecting
def runtimes(
    channel: ChannelOptions, as_json: JsonOption = False, address: AddressOption = ADDRESS, debug: DebugOption = False
) -> None:
    """List the languages with their versions and limits, and what is missing for others."""

    with reporting_errors(debug, SANDBOX_FAILED):
        from perigee.cli.sandbox.judge import list_runtimes

        raise typer.Exit(run_interruptible(lambda _: list_runtimes(address, channel, as_json)))


@app.command("make-tests")
@connecting
def make_tests(
    channel: ChannelOptions,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A problem's folder, or a folder of such folders.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="The candidates' seeds are made from it.")] = 0,
    candidates: Annotated[int, typer.Option("--candidates", min=1, help="Inputs to generate.")] = 50,
    minimum: Annotated[int, typer.Option("--minimum", min=1, help="Valid cases that a problem needs.")] = 40,
    solutions: Annotated[
        int, typer.Option("--solutions", min=2, help="Known solutions that a problem must bring.")
    ] = 10,
    agree_fraction: Annotated[
        str, typer.Option("--agree-fraction", metavar="FRACTION", help="Part of them that must agree on a valid case.")
    ] = "0.7",
    pass_fraction: Annotated[
        str, typer.Option("--pass-fraction", metavar="FRACTION", help="Part of them that must pass all valid cases.")
    ] = "0.9",
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=256, help="Programs sent to the sandbox at once.")] = 8,
    generator_language: Annotated[
        str, typer.Option("--generator-language", metavar="NAME", help="The runtime of generator.py.")
    ] = "python-generator",
    address: AddressOption = ADDRESS,
    debug: DebugOption = False,
) -> None:
    """Make test cases: inputs by generator.py, outputs that known solutions agree on.

    DIR holds problem.yaml, generator.py and known/ with solutions. The generator
    gets an index and a seed as arguments and prints one input.

    Writes tests/ and make-tests.json. A run that was stopped or killed continues
    where it was.

    Ends with 0 when the problem is kept (of many: when each got a verdict), 1 when
    not or when another process works on it, 2 for wrong usage, 3 when the sandbox
    failed.
    """

    with reporting_errors(debug, SANDBOX_FAILED):
        from perigee.cli.sandbox.make_tests import make_folder_tests, read_fraction
        from perigee.testgen.plan import Plan

        plan = Plan(
            seed=seed,
            candidates=candidates,
            minimum=minimum,
            solutions=solutions,
            agree_fraction=read_fraction("--agree-fraction", agree_fraction),
            pass_fraction=read_fraction("--pass-fraction", pass_fraction),
            jobs=jobs,
        )
        plan.check()
        raise typer.Exit(
            run_interruptible(lambda _: make_folder_tests(address, channel, folder, plan, generator_language))
        )


image_app = typer.Typer(no_args_is_help=True)
app.add_typer(image_app, name="image", help="Build images of runtimes, which requests choose by name.")
FolderOption = Annotated[Path, typer.Option("--folder", metavar="DIR", help="The sandbox's images_path.")]
IMAGES = Path("/var/lib/perigee/images")


@image_app.command("build")
def build_image(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe of `image list`, or a YAML file of yours.")],
    folder: FolderOption = IMAGES,
    archive: Annotated[
        Path | None,
        typer.Option("--archive", metavar="FILE", help="A toolchain's archive, where the recipe asks for it."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option("--suite", metavar="NAME", help="Debian's release; the host's by default.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Build an image from Debian's packages, as root, with mmdebstrap; a sandbox offers it when it starts next."""

    with reporting_errors(debug):
        from services.sandbox.languages import images

        print(images.build_image(name, folder, archive, suite))


@image_app.command("list")
def list_images(folder: FolderOption = IMAGES, debug: DebugOption = False) -> None:
    """List the recipes, and which of them are built."""

    with reporting_errors(debug):
        from services.sandbox.languages import images

        built = {image.name for image in images.find_images(folder)}
        for name in sorted({*images.find_recipes(), *built}):
            print(f"{name:20}{'built' if name in built else ''}")


@app.command()
def serve(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="gRPC; 0 takes a free one.")] = 50056,
    http_port: Annotated[int, typer.Option("--http-port", min=0, max=65535, help="HTTP.")] = 8056,
    slots: Annotated[
        int | None, typer.Option("--slots", min=1, help="Programs that run at once; the number of cores by default.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the configuration; repeat.")
    ] = None,
) -> None:
    """Serve a sandbox in the foreground, on loopback; elsewhere (--set server.host=...) it needs PERIGEE_TOKEN."""
    become_service(service_command(port, http_port, slots, overrides or []))


def service_command(port: int, http_port: int, slots: int | None, overrides: Sequence[str]) -> list[str]:
    """Returns the command of the service; overrides come last, so that they win."""
    settings = [f"server.port={port}", f"http.port={http_port}"]
    settings += [f"slots={slots}"] if slots is not None else []
    command = [sys.executable, "-m", "services.sandbox"]
    for setting in (*settings, *overrides):
        command += ["--set", setting]
    return command


def become_service(command: list[str]) -> None:
    """Replaces this process by the service, which then gets its signals and gives its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)
