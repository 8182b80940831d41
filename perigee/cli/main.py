"""The commands of `perigee` and how they end: exit code 0, or one line on standard error that says what to do."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from perigee.cli.channel import connecting
from perigee.cli.ending import DebugOption, Interrupt, reporting_errors, run_interruptible
from perigee.cli.eval.app import evaluate
from perigee.cli.long2short.app import long2short
from perigee.cli.merge.app import merge
from perigee.cli.prompts.app import prompts_app
from perigee.cli.reward.app import reward_app
from perigee.cli.sample.app import sample
from perigee.cli.sandbox.app import app as sandbox_app
from perigee.errors import InvalidArgumentError, NotFoundError, PerigeeError
from perigee.rpc import ChannelOptions

app = typer.Typer(
    name="perigee",
    help="Reinforcement-learning post-training of reasoning language models, as independent services.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(sandbox_app)
app.add_typer(reward_app, name="reward", help="Score responses with the reward service, and train its value heads.")
app.add_typer(prompts_app, name="prompts", help="Curate prompt sets.")


RecipeArgument = Annotated[Path | None, typer.Argument(help="A recipe file, or a folder that holds recipe.yaml.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the recipe.")]
RunsOption = Annotated[Path, typer.Option("--runs-dir", envvar="PERIGEE_RUNS_DIR", help="Where run folders are made.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Rollout workers; the recipe's by default.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the run and of its data.")]
PlainOption = Annotated[bool, typer.Option("--plain", help="Plain lines even on a terminal.")]
CoordinatorOption = Annotated[
    str | None, typer.Option("--coordinator", metavar="HOST:PORT", help="The coordinator of a running stack.")
]


@app.command()
def up(
    recipe: RecipeArgument = None,
    workers: WorkersOption = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="SERVICE", help="Start just this; repeat.")
    ] = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = Path("runs"),
    debug: DebugOption = False,
) -> None:
    """Start the local stack and keep it up until Ctrl-C; without a recipe, the services that need no model."""
    with reporting_errors(debug):
        from perigee.cli import train as command
        from perigee.cli.recipe import RECIPE_FILE, build_recipe, find_recipe, load_recipe, open_new_run
        from perigee.cli.view import PlainView

        sets = overrides or []
        path = recipe or (Path(RECIPE_FILE) if Path(RECIPE_FILE).is_file() else None)
        services = command.choose_services(path is not None, only or [])
        chosen = load_recipe(find_recipe(path), sets) if path else build_recipe(Path("--set"), {"name": "up"}, sets)
        run, checked = open_new_run(runs_dir, chosen)

        async def work(interrupt: Interrupt) -> int:
            await command.up(run, checked, services, workers or checked.head.local.workers, PlainView(), interrupt)
            return 0

        code = run_interruptible(work)
        raise typer.Exit(0 if code > 128 else code)  # a signal is how this command ends


def with_seed(overrides: list[str] | None, seed: int | None) -> list[str]:
    """Returns the overrides of a recipe with those of a seed behind them."""
    return [*(overrides or []), *([f"run.seed={seed}", f"trainer.seed={seed}"] if seed is not None else [])]


@app.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, or a folder that holds recipe.yaml.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the data and the prepared recipe.")],
    seed: SeedOption = None,
    overrides: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Make a recipe's data and the recipe that services start with: --config DIR/recipe.yaml."""
    sets = with_seed(overrides, seed)
    with reporting_errors(debug):
        from perigee.cli import train as command
        from perigee.cli.recipe import find_recipe, load_recipe
        from perigee.cli.run_folder import RunFolder

        checked, run = load_recipe(find_recipe(recipe), sets), RunFolder(out.absolute())

        async def work(interrupt: Interrupt) -> int:
            await command.prepare(checked, run)
            print(f"services start with --config {run.recipe_path}; train with: perigee train {run.recipe_path}")
            return 0

        raise typer.Exit(run_interruptible(work))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A folder for the recipe.")],
    model: Annotated[str, typer.Option("--model", metavar="DIR", help="Hugging Face model folder, or its URL.")],
    prompts: Annotated[
        str, typer.Option("--prompts", metavar="PATH", help="Questions with answers: a file, a folder or a URL.")
    ],
    columns: Annotated[
        list[str] | None, typer.Option("--column", metavar="FIELD=COLUMN", help="Take a field from a column; repeat.")
    ] = None,
    answer_after: Annotated[str, typer.Option("--answer-after", help="The answer follows this in its column.")] = "",
    split: Annotated[str | None, typer.Option("--split", help="Split of a saved data set.")] = None,
    verifier: Annotated[str | None, typer.Option("--verifier", help="Verifier of lines that have none.")] = None,
    debug: DebugOption = False,
) -> None:
    """Write a commented recipe for a model folder and a data set."""
    with reporting_errors(debug):
        from perigee.cli.init import init as write_recipe
        from perigee.cli.prompts.candidates import split_pair

        given = {
            "path": prompts,
            "columns": dict(split_pair("--column", pair) for pair in columns or []),
            "answer_after": answer_after,
            "split": split,
            "verifier": verifier,
        }
        for line in write_recipe(folder, model, given):
            print(line)


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, or a folder that holds recipe.yaml.")],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Folder for what the recipe's script makes; kept.")
    ] = None,
    workers: WorkersOption = None,
    seed: SeedOption = None,
    overrides: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Find what is wrong with a recipe, its model and its prompts, and estimate memory, before a service starts."""
    sets = with_seed(overrides, seed)
    with reporting_errors(debug):
        from perigee.cli import train as command
        from perigee.cli.check import check_inputs
        from perigee.cli.recipe import check_script, find_recipe, load_recipe
        from perigee.cli.run_folder import RunFolder

        checked = load_recipe(find_recipe(recipe), sets)
        check_script(checked)

        async def work(interrupt: Interrupt) -> int:
            with tempfile.TemporaryDirectory(prefix="perigee-check-") as folder:
                run = RunFolder((data or Path(folder)).absolute())
                run.create()
                expanded = checked.expand(run)
                await command.prepare_data(run, expanded)
                for line in check_inputs(expanded, workers):
                    print(line)
            return 0

        raise typer.Exit(run_interruptible(work))


@app.command()
@connecting
def train(
    channel: ChannelOptions,
    recipe: RecipeArgument = None,
    resume: Annotated[str | None, typer.Option("--resume", metavar="RUN", help="Go on with this run.")] = None,
    workers: WorkersOption = None,
    seed: SeedOption = None,
    overrides: SetOption = None,
    coordinator: CoordinatorOption = None,
    runs_dir: RunsOption = Path("runs"),
    plain: PlainOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a recipe: start the stack, run to the end, write the report, stop the stack."""
    sets = with_seed(overrides, seed)
    with reporting_errors(debug):
        from perigee.cli import train as command
        from perigee.cli.metrics import read_coordinator
        from perigee.cli.view import open_view

        if coordinator is not None:
            if workers is not None:
                raise InvalidArgumentError.for_field(
                    "--workers", "the stack of --coordinator has workers of its own; leave it out"
                )
            asyncio.run(read_coordinator(coordinator, channel))  # before anything is made for a stack that is not there
        options = command.TrainOptions(recipe, resume, sets, runs_dir, workers, coordinator, channel)
        run, checked = command.open_run(options)

        async def work(interrupt: Interrupt) -> int:
            with open_view(plain) as view:
                await command.train(options, run, checked, view, interrupt)
            return 0

        again = f"perigee train --resume {run.run_id}" + ("" if runs_dir == Path("runs") else f" --runs-dir {runs_dir}")
        try:
            code = run_interruptible(work)
        except InvalidArgumentError:  # what is wrong stays wrong when the run goes on
            raise
        except PerigeeError as error:
            raise type(error)(f"{error.message}; go on with: {again}") from error
        if code:
            print(f"stopped; go on with: {again}", file=sys.stderr)
            raise typer.Exit(code)
        from perigee.report.page import write_report

        page = write_report(run.path)
        for line in page.headline:
            print(line)
        print(f"report: {page.path}")


@app.command()
@connecting
def status(
    channel: ChannelOptions,
    coordinator: CoordinatorOption = None,
    runs_dir: RunsOption = Path("runs"),
    debug: DebugOption = False,
) -> None:
    """Show services, workers and the run of the newest stack, or of the coordinator named."""
    with reporting_errors(debug):
        from perigee.cli.metrics import read_coordinator, status_lines
        from perigee.cli.run_folder import find_stack

        addresses: dict[str, str] = {}
        if coordinator is None:
            found = find_stack(runs_dir)
            if found is None:
                raise NotFoundError(
                    f"no stack runs below {runs_dir}; name one with --coordinator, or start one: perigee up RECIPE"
                )
            addresses = dict(found[1].addresses)
            coordinator = addresses.get("coordinator")

        async def work() -> list[str]:
            lines = []
            if addresses:
                from perigee.cli.stack import health_lines

                lines += await health_lines(addresses, channel)
            return lines + (status_lines(await read_coordinator(coordinator, channel)) if coordinator else [])

        for line in asyncio.run(work()):
            print(line)


@app.command()
@connecting
def worker(
    channel: ChannelOptions,
    recipe: RecipeArgument = None,
    coordinator: CoordinatorOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = Path("runs"),
    debug: DebugOption = False,
) -> None:
    """Start a rollout worker on this machine that joins the run of the newest stack, or of the coordinator named."""
    with reporting_errors(debug):
        from perigee.cli import worker as command
        from perigee.cli.metrics import read_coordinator
        from perigee.cli.recipe import build_recipe, find_recipe, load_recipe
        from perigee.cli.run_folder import find_stack
        from perigee.cli.view import PlainView

        sets, folder, is_of_run = overrides or [], runs_dir.absolute() / "workers", False
        if coordinator is None:
            found = find_stack(runs_dir)
            if found is None or "coordinator" not in found[1].addresses:
                raise NotFoundError(f"no stack below {runs_dir} has a coordinator; name one: --coordinator HOST:PORT")
            coordinator = found[1].addresses["coordinator"]
            if recipe is None:
                recipe, folder, is_of_run = found[0].recipe_path, found[0].logs_path, True
        chosen = load_recipe(find_recipe(recipe), sets) if recipe else build_recipe(Path("--set"), {}, sets)
        command.export_credentials(channel)
        status = asyncio.run(read_coordinator(coordinator, channel))
        spec = command.plan_worker(coordinator, status, chosen.values.get("rollout") or {}, folder, is_of_run, channel)

        async def work(interrupt: Interrupt) -> int:
            await command.work(spec, coordinator, channel, PlainView(), interrupt)
            return 0

        code = run_interruptible(work)
        raise typer.Exit(0 if code > 128 else code)  # a signal is how this command ends


@app.command()
def doctor(
    recipe: RecipeArgument = None,
    probes: Annotated[
        list[str] | None,
        typer.Option("--probe", metavar="HOST:PORT", help="Metrics port of a service that runs; repeat."),
    ] = None,
    overrides: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Check what services need on this machine and between machines; says what to do, exit code 1 for a problem."""
    with reporting_errors(debug):
        from perigee.cli.doctor import examine, read_configs

        found = []
        for finding in examine(read_configs(recipe, overrides or []), probes or []):
            found.append(finding)
            print(finding)
        raise typer.Exit(1 if any(finding.level == "problem" for finding in found) else 0)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run's id, its folder, or latest.")] = "latest",
    runs_dir: RunsOption = Path("runs"),
    debug: DebugOption = False,
) -> None:
    """Write report.html of a run anew from its records."""
    with reporting_errors(debug):
        from perigee.cli.run_folder import find_run
        from perigee.report.page import write_report

        print(write_report(find_run(runs_dir, run).path).path)


@app.command()
def choose(
    run: Annotated[str, typer.Argument(help="A run's id, its folder, or latest.")] = "latest",
    max_loss: Annotated[
        float, typer.Option("--max-loss", help="Sampled accuracy that a version may have less than the best one.")
    ] = 0.02,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="Write the recipe of a phase for shorter answers from there."),
    ] = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = Path("runs"),
    debug: DebugOption = False,
) -> None:
    """Choose the evaluated checkpoint with the shortest responses at nearly the best accuracy."""
    with reporting_errors(debug):
        from perigee.cli.choose import choose_checkpoint, write_short_recipe
        from perigee.cli.run_folder import find_run

        if overrides and recipe is None:
            raise InvalidArgumentError.for_field("--set", "changes the recipe that --recipe FILE writes")
        found = find_run(runs_dir, run)
        choice, folder = choose_checkpoint(found, max_loss)
        if recipe is not None:
            write_short_recipe(found, folder, overrides or [], recipe)
        for line in choice.lines():
            print(line)
        print(f"model: {folder}")
        if recipe is not None:
            print(f"train it with: perigee train {recipe}")


@app.command()
def samples(
    run: Annotated[str, typer.Argument(help="A run's id, its folder, or latest.")] = "latest",
    verdict: Annotated[
        str | None,
        typer.Option("--verdict", help="correct, wrong, ungradable, failed, or a kind: right, capped, repeated."),
    ] = None,
    domain: Annotated[str | None, typer.Option("--domain", help="Domain of the prompts.")] = None,
    iteration: Annotated[int | None, typer.Option("--iteration", min=0, help="Only of this iteration.")] = None,
    evaluation: Annotated[
        str | None, typer.Option("--evaluation", help="baseline, periodic or final; any; none: of training only.")
    ] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="The newest so many.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    runs_dir: RunsOption = Path("runs"),
    debug: DebugOption = False,
) -> None:
    """Show responses of a run: the prompt as the model saw it, the response, and how it was judged."""
    with reporting_errors(debug):
        import json

        from perigee.cli.run_folder import find_run
        from perigee.report.samples import KINDS, SampleFilter, read_samples, text_lines, to_line

        verdicts = (*KINDS, "correct")
        for name, value, known in (
            ("--verdict", verdict, verdicts),
            ("--evaluation", evaluation, ("baseline", "periodic", "final", "any", "none")),
        ):
            if value is not None and value not in known:
                raise InvalidArgumentError.for_field(name, f"{value} is unknown; choose from {', '.join(known)}")
        path = find_run(runs_dir, run).path
        chosen = SampleFilter(verdict, domain, iteration, evaluation)
        found = [sample for sample in read_samples(path) if chosen.matches(sample)][-count:]
        if not found:
            raise NotFoundError(f"{path}/samples.jsonl has no such response; leave out a filter, or wait for more")
        for sample in found:
            lines = [json.dumps(to_line(sample), ensure_ascii=False)] if as_json else text_lines(sample)
            print("\n".join(lines))


# After the commands around a run, which `perigee --help` lists first.
app.command("eval")(evaluate)
app.command()(sample)
app.command()(merge)
app.command()(long2short)


if __name__ == "__main__":
    app()
