"""The commands of `perigee reward`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

reward_app = typer.Typer(no_args_is_help=True)

SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="A=B", help="Set any other setting; repeat.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]


@reward_app.command()
def train(
    data: Annotated[
        Path,
        typer.Option("--data", help="JSON Lines: question, reference, and response and label, or chosen and rejected."),
    ],
    backbone: Annotated[Path, typer.Option("--backbone", help="Folder of the Hugging Face model to start from.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write to; the model is `model` in it.")],
    eval_data: Annotated[
        Path | None, typer.Option("--eval-data", help="Examples to evaluate on; a share of --data by default.")
    ] = None,
    loss: Annotated[str, typer.Option("--loss", help="pointwise, pairwise or both.")] = "both",
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the examples.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of all that is drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    overrides: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Train a value head: a model whose score tells right responses from wrong ones."""
    from perigee.cli.main import _end

    values = {
        "data": str(data),
        "backbone": str(backbone),
        "out": str(out),
        "eval_data": None if eval_data is None else str(eval_data),
        "loss": loss,
        "epochs": epochs,
        "seed": seed,
        "resume": resume,
    }

    def work() -> int:
        from perigee.cli.reward.train import train_value_head

        return train_value_head(values, overrides or [])

    _end(work, debug)
