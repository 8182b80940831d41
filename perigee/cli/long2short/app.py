"""The command `perigee long2short`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perigee.cli.ending import DebugOption, Interrupt, reporting_errors, run_interruptible


def long2short(
    recipe: Annotated[Path, typer.Argument(help="A recipe with a section long2short, or a folder that holds one.")],
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="STEP", help="Do just this step, after those that it needs; repeat."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the steps; long2short/NAME by default.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the recipe.")
    ] = None,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", envvar="PERIGEE_RUNS_DIR", help="Where runs are.")] = Path(
        "runs"
    ),
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines even on a terminal.")] = False,
    debug: DebugOption = False,
) -> None:
    """Shorten a long model's responses in four ways and compare them; the same command goes on where it was cut."""
    with reporting_errors(debug):
        from rich.console import Console

        from perigee.cli.long2short.pipeline import PipelineOptions, run_pipeline
        from perigee.cli.recipe import find_recipe, load_recipe

        chosen = load_recipe(find_recipe(recipe), overrides or [])
        folder = out or Path("long2short") / chosen.head.name
        options = PipelineOptions(chosen, folder.absolute(), only or [], runs_dir, plain)

        async def work(interrupt: Interrupt) -> int:
            await run_pipeline(options, Console(), interrupt)
            return 0

        if code := run_interruptible(work):
            typer.echo("stopped; the same command goes on", err=True)
            raise typer.Exit(code)
