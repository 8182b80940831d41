"""The commands of `perigee reward`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perigee.cli.channel import connecting
from perigee.cli.ending import DebugOption, reporting_errors
from perigee.rpc import ChannelOptions

reward_app = typer.Typer(no_args_is_help=True)

SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="A=B", help="Set any other setting; repeat.")]


@reward_app.command()
@connecting
def score(
    channel: ChannelOptions,
    file: Annotated[Path, typer.Argument(help="JSON Lines with an item to score a line.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where outcomes go; FILE.scored.jsonl by default.")] = None,
    address: Annotated[
        str, typer.Option("--address", envvar="PERIGEE_REWARD_ADDRESS", metavar="HOST:PORT", help="The reward service.")
    ] = "127.0.0.1:50055",
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is scored; score the rest and what FAILED.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget earlier outcomes.")] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, max=1024, help="Items per call.")] = 64,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, max=64, help="Calls at once.")] = 4,
    attempts: Annotated[int, typer.Option("--attempts", min=1, help="Times a FAILED item is tried.")] = 3,
    call_timeout_s: Annotated[float, typer.Option("--call-timeout", min=0.1, help="Seconds of one call.")] = 600.0,
    unavailable_s: Annotated[float, typer.Option("--outage", min=0.0, help="Seconds the service may be away.")] = 60.0,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines even on a terminal.")] = False,
    debug: DebugOption = False,
) -> None:
    """Score the responses of a file; exit code 3 when some could not be judged."""

    with reporting_errors(debug):
        from perigee.cli.reward.score import ScoreCommand, run_score
        from perigee.reward.scoring import ScoringOptions

        options = ScoringOptions(
            batch=batch,
            concurrency=concurrency,
            attempts=attempts,
            call_timeout_s=call_timeout_s,
            unavailable_s=unavailable_s,
        )
        raise typer.Exit(run_score(ScoreCommand(file, out, address, channel, resume, overwrite, plain), options))


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

    with reporting_errors(debug):
        from perigee.cli.reward.train import train_value_head

        raise typer.Exit(train_value_head(values, overrides or []))
