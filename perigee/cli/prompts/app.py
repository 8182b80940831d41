"""The commands of `perigee prompts`."""

from __future__ import annotations

import typer

prompts_app = typer.Typer(no_args_is_help=True)


@prompts_app.callback()
def group() -> None:
    pass
