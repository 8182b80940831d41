"""The command `perigee sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from perigee.cli.channel import connecting
from perigee.cli.ending import DebugOption, Interrupt, reporting_errors, run_interruptible
from perigee.cli.eval.app import (
    ChatOption,
    ConcurrencyOption,
    DtypeOption,
    EndpointOption,
    KeyOption,
    MaxTokensOption,
    PlainOption,
    RewardOption,
    RunsOption,
    SeedOption,
    TemperatureOption,
)
from perigee.cli.prompts.app import AnswerAfterOption, DefaultsOption, RenamesOption, SplitOption
from perigee.errors import InvalidArgumentError
from perigee.rpc import ChannelOptions


@connecting
def sample(
    channel: ChannelOptions,
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="JSON Lines, parquet, or a folder of datasets.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of samples, selections and report.")],
    target: Annotated[
        str | None, typer.Argument(metavar="MODEL_OR_RUN", help="A model folder, its URL, or a finished run.")
    ] = None,
    endpoint: EndpointOption = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME|DIR", help="The model's name at the endpoint, or a model folder."),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option("--samples", metavar="FILE", help="Select of these judged samples; no model is asked."),
    ] = None,
    number: Annotated[int, typer.Option("-n", min=1, help="Responses to each prompt.")] = 8,
    selections: Annotated[
        list[str] | None,
        typer.Option("--select", help="shortest, pairs or all; repeat. With --cot all unless set, else shortest."),
    ] = None,
    cot: Annotated[
        str | None,
        typer.Option("--cot", metavar="FILE", help="Ask in these words around {prompt}; default: for long reasoning."),
    ] = None,
    reject_wrong: Annotated[
        bool, typer.Option("--reject-wrong/--keep-wrong", help="In pairs: reject longer wrong responses.")
    ] = True,
    reject_longer: Annotated[
        float,
        typer.Option("--reject-longer", min=0, help="In pairs: reject correct ones so many times longer; 0: none."),
    ] = 1.5,
    temperature: TemperatureOption = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.01, max=1, help="Of the samples.")] = None,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="First prompts only.")] = None,
    renames: RenamesOption = None,
    defaults: DefaultsOption = None,
    answer_after: AnswerAfterOption = "",
    split: SplitOption = None,
    api_key: KeyOption = None,
    chat: ChatOption = True,
    concurrency: ConcurrencyOption = 64,
    dtype: DtypeOption = "auto",
    reward: RewardOption = None,
    runs_dir: RunsOption = Path("runs"),
    plain: PlainOption = False,
    debug: DebugOption = False,
) -> None:
    """Draw responses to prompts, have them judged, and select training data; the same command again resumes."""
    with reporting_errors(debug):
        from rich.console import Console

        from perigee.cli.eval.model import Endpoint
        from perigee.cli.eval.responses import ModelOptions
        from perigee.cli.eval.suites import SamplingSettings
        from perigee.cli.prompts.candidates import make_columns
        from perigee.cli.sample import run as command
        from perigee.cli.sample.selection import PairRules

        at = Endpoint(endpoint, model, chat, api_key=api_key) if endpoint and model else None
        folder = target if endpoint or model is None else model
        given = {"top_p": top_p, "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        drawn: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        check_source(endpoint, model, target, samples)
        options = command.SampleOptions(
            prompts=prompts,
            columns=make_columns(renames or [], defaults or [], answer_after, split),
            out=out,
            select=check_selections(selections or ["all" if cot else "shortest"], reject_wrong or reject_longer > 0),
            rules=PairRules(reject_wrong, reject_longer or None),
            sampling=SamplingSettings(greedy=False, samples=number, **drawn),
            model=ModelOptions(folder, at, chat, runs_dir, concurrency, dtype, reward, channel, plain),
            cot=cot,
            samples=samples,
            limit=limit,
        )

        async def work(interrupt: Interrupt) -> int:
            await command.sample(options, Console(), interrupt)
            return 0

        if code := run_interruptible(work):
            typer.echo("stopped; the same command goes on", err=True)
            raise typer.Exit(code)


def check_source(endpoint: str | None, model: str | None, target: str | None, samples: Path | None) -> None:
    """Raises InvalidArgumentError unless the samples come from one place."""
    if endpoint is not None and model is None:
        raise InvalidArgumentError.for_field("--endpoint", "needs the model's name there: --model NAME")
    folder = model if endpoint is None else None
    if sum(each is not None for each in (endpoint, folder, target, samples)) != 1:
        raise InvalidArgumentError.for_field(
            "MODEL_OR_RUN", "give one of: a model folder or run, --endpoint URL with --model NAME, --samples FILE"
        )


def check_selections(kinds: list[str], has_rules: bool) -> list[str]:
    """Returns what is selected, each once. Raises InvalidArgumentError for what is unknown, or can only be empty."""
    known = ("shortest", "pairs", "all")
    if unknown := [kind for kind in kinds if kind not in known]:
        raise InvalidArgumentError.for_field("--select", f"{unknown[0]} is unknown; choose from {', '.join(known)}")
    if "pairs" in kinds and not has_rules:
        raise InvalidArgumentError.for_field("--reject-longer", "is 0, and --keep-wrong leaves no response to reject")
    return list(dict.fromkeys(kinds))
