"""The commands of `perigee prompts`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from perigee.cli.channel import connecting
from perigee.cli.ending import DebugOption, Interrupt, reporting_errors, run_interruptible
from perigee.rpc import ChannelOptions

RenamesOption = Annotated[
    list[str] | None,
    typer.Option("--column", "--rename", metavar="FIELD=COLUMN", help="Take a field from a column; repeat."),
]
DefaultsOption = Annotated[
    list[str] | None, typer.Option("--default", metavar="FIELD=TEXT", help="Value where there is none; repeat.")
]
AnswerAfterOption = Annotated[str, typer.Option("--answer-after", help="The answer follows this in its column.")]
SplitOption = Annotated[str | None, typer.Option("--split", help="Split of a saved DatasetDict, or of a folder.")]
ChatMode = Literal["auto", "always", "never"]
CHAT = typer.Option("--chat", help="Apply the chat template: auto, the default, to messages alone.")
SystemPromptOption = Annotated[str, typer.Option("--system-prompt", help="First message of each chat.")]
InstructionOption = Annotated[str, typer.Option("--instruction", help="Follows the last text of the user.")]

prompts_app = typer.Typer(no_args_is_help=True)


@prompts_app.command()
def preview(
    source: Annotated[Path, typer.Argument(metavar="RECIPE|FILE", help="A recipe, or prompts in any form.")],
    model: Annotated[str | None, typer.Option("--model", help="Model folder or URL; the recipe's when unset.")] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Prompts to show.")] = 3,
    response: Annotated[
        str | None, typer.Option("--response", help="A response to judge; the reference, stated, when unset.")
    ] = None,
    renames: RenamesOption = None,
    defaults: DefaultsOption = None,
    answer_after: AnswerAfterOption = "",
    split: SplitOption = None,
    chat: Annotated[ChatMode | None, CHAT] = None,
    system_prompt: SystemPromptOption = "",
    instruction: InstructionOption = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe; repeat.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Show prompts as the model will see them, token by token, and how a response is judged."""
    with reporting_errors(debug):
        from perigee.cli.prompts.candidates import split_pair
        from perigee.cli.prompts.preview import read_preview, show_preview

        columns = dict(split_pair("--column", pair) for pair in renames or [])
        values = dict(split_pair("--default", pair) for pair in defaults or [])
        reading = {"columns": columns, "defaults": values, "answer_after": answer_after, "split": split}
        asking = {"chat": chat, "system_prompt": system_prompt, "instruction": instruction}

        async def work(interrupt: Interrupt) -> int:
            with tempfile.TemporaryDirectory(prefix="perigee-preview-") as folder:
                read = await read_preview(source, reading, asking, model, overrides or [], Path(folder))
                await show_preview(*read, count, response)
            return 0

        raise typer.Exit(run_interruptible(work))


@prompts_app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="IN", help="JSON Lines, parquet, or a folder of datasets.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The prompt file to write.")],
    format_name: Annotated[str | None, typer.Option("--format", help="Of all records; by columns if unset.")] = None,
    split: SplitOption = None,
    most_tests: Annotated[int, typer.Option("--max-tests", min=1, help="Tests of a problem; the first ones.")] = 1000,
    debug: DebugOption = False,
) -> None:
    """Turn a published set of programming problems into prompts with tests.

    Reads LeetCode, LiveCodeBench, APPS, TACO, HumanEval, MBPP, HumanEval+ and MBPP+.

    Ends with 0 when every record became a prompt, 1 when some did not.
    """
    with reporting_errors(debug):
        from perigee.cli.prompts.formats import import_set
        from perigee.files import write_lines

        found = import_set(source, format_name, split, most_tests)
        write_lines(out, found.lines)
        formats = ", ".join(f"{name} {count}" for name, count in found.formats.items())
        typer.echo(f"{len(found.lines)} prompts in {out}" + (f" ({formats})" if formats else ""))
        if found.tests_left_out:
            typer.echo(f"{found.tests_left_out} tests left out: beyond the first {most_tests} of a problem")
        for reason, places in sorted(found.places.items(), key=lambda pair: -len(pair[1])):
            typer.echo(
                f"{len(places)} records left out: {reason} ({', '.join(places[:3])}{', ...' * (len(places) > 3)})"
            )
        raise typer.Exit(1 if found.places else 0)


@prompts_app.command()
@connecting
def curate(
    channel: ChannelOptions,
    source: Annotated[Path, typer.Argument(metavar="IN", help="JSON Lines, parquet, or a folder of datasets.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the curation; the same one is resumed.")],
    renames: RenamesOption = None,
    defaults: DefaultsOption = None,
    answer_after: AnswerAfterOption = "",
    split: SplitOption = None,
    near_duplicates: Annotated[
        float, typer.Option("--near-duplicates", min=0, max=1, help="Jaccard similarity of near duplicates; 0 is off.")
    ] = 0.7,
    keep_question_kinds: Annotated[
        bool, typer.Option("--keep-question-kinds", help="Keep multiple-choice, true-or-false and proof questions.")
    ] = False,
    rollout: Annotated[
        list[str] | None, typer.Option("--rollout", metavar="HOST:PORT", help="A rollout worker to ask; repeat.")
    ] = None,
    reward: Annotated[
        str, typer.Option("--reward", envvar="PERIGEE_REWARD_ADDRESS", metavar="HOST:PORT", help="The reward service.")
    ] = "127.0.0.1:50055",
    model: Annotated[Path | None, typer.Option("--model", help="Hugging Face folder of the worker's model.")] = None,
    push: Annotated[bool, typer.Option("--push", help="Give the workers the weights of --model first.")] = False,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers per prompt.")] = 10,
    temperature: Annotated[float, typer.Option("--temperature", min=0.01, help="Of answers and guesses.")] = 1.0,
    response_tokens: Annotated[int, typer.Option("--response-tokens", min=1, help="Tokens of an answer.")] = 1024,
    trivial: Annotated[
        float, typer.Option("--trivial", min=0, max=1, help="Drop prompts solved at least this often.")
    ] = 1.0,
    keep_trivial: Annotated[bool, typer.Option("--keep-trivial", help="Drop no prompt for being easy.")] = False,
    min_judged: Annotated[
        float, typer.Option("--min-judged", min=0, max=1, help="Share of samples that must be judged.")
    ] = 0.8,
    guesses: Annotated[int, typer.Option("--guesses", min=0, help="Guesses per prompt; 0 is off.")] = 8,
    guess_tokens: Annotated[int, typer.Option("--guess-tokens", min=1, help="Tokens of a guess.")] = 32,
    guess_template: Annotated[
        Path | None, typer.Option("--guess-template", help="File with {prompt} and {answer_marker}.")
    ] = None,
    buckets: Annotated[int, typer.Option("--buckets", min=1, help="Buckets of difficulty.")] = 5,
    cap: Annotated[int | None, typer.Option("--cap", min=1, help="Prompts kept per domain and bucket.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of samples and draws.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what OUT holds.")] = False,
    chat: Annotated[ChatMode, CHAT] = "auto",
    system_prompt: SystemPromptOption = "",
    instruction: InstructionOption = "",
    unavailable_s: Annotated[float, typer.Option("--outage", min=0, help="Seconds a service may be away.")] = 60.0,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines even on a terminal.")] = False,
    debug: DebugOption = False,
) -> None:
    """Curate a prompt set: duplicates, kinds of questions, domains, difficulty, guessing, balance."""

    with reporting_errors(debug):
        from perigee.cli.prompts.candidates import make_columns
        from perigee.cli.prompts.curate import CurateCommand, ModelAccess, run_curate
        from perigee.cli.prompts.sampling import CurationSettings, read_template
        from perigee.config import validate
        from perigee.trainer.v1.trainer_pb2 import ChatSettings

        sampling = {
            "samples": samples,
            "temperature": temperature,
            "response_tokens": response_tokens,
            "trivial_pass_rate": None if keep_trivial else trivial,
            "guesses": guesses,
            "guess_tokens": guess_tokens,
            "min_judged": min_judged,
            **read_template(guess_template),
        }
        values = {
            "near_duplicates": near_duplicates,
            "drop_question_kinds": not keep_question_kinds,
            "sampling": sampling if rollout else None,
            "buckets": buckets,
            "cap": cap,
            "seed": seed,
        }
        settings = validate(CurationSettings, values, "settings", "")
        columns = make_columns(renames or [], defaults or [], answer_after, split)
        asking = ChatSettings(mode=chat, system_prompt=system_prompt, instruction=instruction)
        access = ModelAccess(rollout or [], reward, model, push, channel, unavailable_s, asking)
        raise typer.Exit(run_curate(CurateCommand(source, out, columns, settings, access, restart, plain)))
