"""The command `perigee eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from perigee.cli.channel import connecting
from perigee.cli.ending import DebugOption, Interrupt, reporting_errors, run_interruptible
from perigee.cli.eval.suites import DATA_VARIABLE, DEFAULT_DATA
from perigee.errors import InvalidArgumentError
from perigee.rpc import ChannelOptions

# How a model is reached, and how it is asked.
EndpointOption = Annotated[
    str | None, typer.Option("--endpoint", metavar="URL", help="OpenAI-compatible endpoint, up to /v1.")
]
KeyOption = Annotated[str | None, typer.Option("--api-key", envvar="PERIGEE_EVAL_API_KEY", help="The endpoint's key.")]
ChatOption = Annotated[
    bool, typer.Option("--chat/--completions", help="Ask by chat, or have the model continue the question.")
]
TemperatureOption = Annotated[float | None, typer.Option("--temperature", min=0.01, help="Of the samples.")]
MaxTokensOption = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Response tokens at most.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the samples.")]
ConcurrencyOption = Annotated[int, typer.Option("--concurrency", min=1, max=4096, help="Responses at once.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Type of a local model's weights.")]
RewardOption = Annotated[str | None, typer.Option("--reward", metavar="HOST:PORT", help="A running reward service.")]
RunsOption = Annotated[Path, typer.Option("--runs-dir", envvar="PERIGEE_RUNS_DIR", help="Where runs are.")]
PlainOption = Annotated[bool, typer.Option("--plain", help="Plain lines even on a terminal.")]


@connecting
def evaluate(
    channel: ChannelOptions,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_OR_RUN SUITE... | compare A B",
            help="A model folder, a run or RUN@VERSION, then suites; with --endpoint suites only; or two results.",
        ),
    ],
    endpoint: EndpointOption = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="The model's name there.")] = None,
    api_key: KeyOption = None,
    chat: ChatOption = True,
    data: Annotated[
        Path, typer.Option("--data", envvar=DATA_VARIABLE, metavar="DIR", help="Folder of the suites' data.")
    ] = DEFAULT_DATA,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Results folder; evals/MODEL by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="First problems of each suite only.")] = None,
    greedy: Annotated[bool | None, typer.Option("--greedy/--no-greedy", help="Decode greedily, too.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=0, help="Samples per problem.")] = None,
    temperature: TemperatureOption = None,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = None,
    concurrency: ConcurrencyOption = 64,
    dtype: DtypeOption = "auto",
    reward: RewardOption = None,
    runs_dir: RunsOption = Path("runs"),
    json_out: Annotated[Path | None, typer.Option("--json", help="With compare: write the comparison here.")] = None,
    plain: PlainOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure accuracy on suites of problems; the same command again goes on where it was cut short."""
    with reporting_errors(debug):
        from rich.console import Console

        console = Console()
        if arguments[0] == "compare":
            _compare(arguments[1:], json_out, console)
            return
        if (endpoint is None) != (model is None):
            raise InvalidArgumentError.for_field("--endpoint", "and --model are given together")
        target, suites = (None, arguments) if endpoint else (arguments[0], arguments[1:])
        if not suites:
            from perigee.cli.eval.suites import suite_names

            raise InvalidArgumentError.for_field("SUITE", f"is required; those known are {', '.join(suite_names())}")
        from perigee.cli.eval import run as command
        from perigee.cli.eval.model import Endpoint
        from perigee.cli.eval.responses import ModelOptions

        given: dict[str, Any] = {
            "greedy": greedy, "samples": samples, "temperature": temperature, "max_tokens": max_tokens, "seed": seed
        }  # fmt: skip
        at = Endpoint(endpoint, model, chat, api_key=api_key) if endpoint and model else None
        options = command.EvalOptions(
            model=ModelOptions(target, at, chat, runs_dir, concurrency, dtype, reward, channel, plain),
            suites=suites,
            data_path=data,
            out=out,
            limit=limit,
            sampling={key: value for key, value in given.items() if value is not None},
        )

        async def work(interrupt: Interrupt) -> int:
            await command.evaluate(options, console, interrupt)
            return 0

        if code := run_interruptible(work):
            typer.echo("stopped; the same command goes on", err=True)
            raise typer.Exit(code)


def _compare(folders: list[str], json_out: Path | None, console: Any) -> None:
    import json
    from dataclasses import asdict

    from perigee.cli.eval.results import compare, read_answers, show_comparisons
    from perigee.files import write_atomically

    if len(folders) != 2:
        raise InvalidArgumentError.for_field("compare", "takes two results folders")
    found = compare(*(read_answers(Path(folder)) for folder in folders))
    show_comparisons(found, console)
    if json_out is not None:
        write_atomically(json_out, f"{json.dumps([asdict(each) for each in found], indent=2)}\n".encode())
