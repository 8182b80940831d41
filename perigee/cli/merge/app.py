"""The command `perigee merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perigee.cli.ending import DebugOption, reporting_errors
from perigee.errors import InvalidArgumentError


def merge(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL MODEL...", help="Model folders, URLs, finished runs, or RUN@VERSION."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the merged model.")],
    method: Annotated[str, typer.Option("--method", help="linear, slerp, ties or task_arithmetic.")] = "linear",
    weights: Annotated[
        list[float] | None,
        typer.Option("--weight", metavar="W", help="Weight of a model, in their order; 1 by default."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="What all were trained from; for ties, task_arithmetic."),
    ] = None,
    scale: Annotated[
        float | None, typer.Option("--lambda", help="Factor of what is added to the base; 1 by default.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Fraction of each task vector that ties keeps; 0.2 by default.")
    ] = None,
    allow_different_templates: Annotated[
        bool,
        typer.Option(
            "--allow-different-templates", help="Chat templates and special tokens may differ; the first model's count."
        ),
    ] = False,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", envvar="PERIGEE_RUNS_DIR", help="Where runs are.")] = Path(
        "runs"
    ),
    debug: DebugOption = False,
) -> None:
    """Merge models of one shape into one, shard by shard; the same command again finds it done."""
    with reporting_errors(debug):
        from perigee.cli.merge.folders import plan_merge, write_merged
        from perigee.cli.merge.methods import BASED, MergeSettings

        given = weights or [1.0] * len(models)
        if len(given) != len(models):
            raise InvalidArgumentError.for_field("--weight", f"is given {len(given)} times for {len(models)} models")
        if scale is not None and method not in BASED:
            raise InvalidArgumentError.for_field("--lambda", f"is for {' and '.join(BASED)} only")
        if density is not None and method != "ties":
            raise InvalidArgumentError.for_field("--density", "is for ties only")
        numbers = {key: value for key, value in (("scale", scale), ("density", density)) if value is not None}
        settings = MergeSettings(method, tuple(given), **numbers)  # type: ignore[arg-type]  # checked there
        plan = plan_merge(models, base, settings, runs_dir, not allow_different_templates)
        write_merged(plan, out, print)
        print(out)
