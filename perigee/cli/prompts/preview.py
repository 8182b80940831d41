"""`perigee prompts preview`: the first prompts as the model will see them, and how a response to them is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from perigee.buffer.v1 import buffer_pb2
from perigee.cli.recipe import RECIPE_FILE, check_script, find_recipe, load_recipe
from perigee.cli.run_folder import RunFolder
from perigee.cli.train import prepare_data
from perigee.config import validate
from perigee.errors import InvalidArgumentError
from perigee.reward.client import RewardClient
from perigee.reward.scoring import score_items
from perigee.reward.v1 import reward_pb2
from services.coordinator.prompts import Prompt, read_prompts
from services.coordinator.run_config import RunConfig
from services.kit.chat import PromptEncoder, open_encoder
from services.kit.hf import fetch_model, open_model_folder
from services.kit.server import serving
from services.reward.__main__ import lifespan
from services.reward.config import RewardConfig

RECIPE_SUFFIXES = (".yaml", ".yml")
# What a run section needs beside its prompts.
_REST = {"heldout": {"fraction": 0.5}, "iterations": 0, "rollout": {"max_response_tokens": 1}}


async def read_preview(
    source: Path,
    reading: Mapping[str, Any],
    asking: Mapping[str, Any],
    model: str | None,
    overrides: Sequence[str],
    scratch: Path,
) -> tuple[PromptEncoder, list[Prompt]]:
    """Returns the encoder and the prompts of a recipe, or of a file; `reading` and `asking` have a file's keys.

    A recipe's script makes its data in `scratch`. Raises InvalidArgumentError naming what is wrong with recipe, model
    or prompts, and an option that has no use.
    """
    reading, asking = ({key: value for key, value in each.items() if value} for each in (reading, asking))
    if source.suffix in RECIPE_SUFFIXES or (source / RECIPE_FILE).is_file():
        if given := [*reading, *asking]:
            raise InvalidArgumentError.for_field(given[0], "stands in the recipe: --set changes it there")
        recipe = load_recipe(find_recipe(source), overrides)
        if "run" not in recipe.values:
            raise InvalidArgumentError.for_field(f"{source}: run", "is required to show prompts")
        check_script(recipe)
        folder = RunFolder(scratch)
        folder.create()
        recipe = recipe.expand(folder)
        await prepare_data(folder, recipe)
        run = validate(RunConfig, recipe.values["run"], source.name, "run")
        model = model or next(
            (found for name in ("run", "rollout", "trainer") if (found := recipe.values.get(name, {}).get("model"))),
            None,
        )
    elif overrides:
        raise InvalidArgumentError.for_field("--set", f"changes keys of a recipe, and {source} is none")
    else:
        run = validate(RunConfig, {**_REST, **asking, "prompts": {"path": str(source), **reading}}, str(source), "")
    if model is None:
        raise InvalidArgumentError.for_field("--model", "is required: its tokenizer and template make the prompts")
    encoder = open_encoder(open_model_folder(fetch_model(model, "--model"), "--model"), run.chat_message())
    prompts = read_prompts(run.prompts, "run.prompts", encoder, run.rollout.max_response_tokens, run.images)
    return encoder, list(prompts.values())


async def show_preview(encoder: PromptEncoder, prompts: Sequence[Prompt], count: int, response: str | None) -> None:
    """Prints the first prompts token by token, and the verdict on a response to each, the stated reference if None."""
    shown = prompts[:count]
    console = Console()
    stops = " ".join(_show_token(encoder, token) for token in encoder.model.stop_token_ids)
    lengths = sorted(prompt.tokens for prompt in prompts)
    console.print(
        f"{len(prompts):,} prompts, {lengths[0]:,} to {lengths[-1]:,} tokens; a response ends with {stops}",
        highlight=False,
        markup=False,
    )
    if encoder.template is not None and not encoder.uses_template(shown[0].line.asked):
        console.print("The model has a chat template, which is not applied to text: chat: always applies it.")
    verdicts = await judge([make_item(prompt, response) for prompt in shown])
    for prompt in shown:
        templated = "with" if encoder.uses_template(prompt.line.asked) else "without"
        console.print()
        head = f"{prompt.id} ({prompt.domain}), {prompt.tokens:,} tokens, {templated} the chat template"
        console.print(Text(f"{head}{name_images(prompt)}", style="bold"))
        console.print(Text(" ".join(_show_token(encoder, token) for token in prompt.token_ids)), soft_wrap=True)
        console.print(Text(describe_verdict(prompt, response, verdicts.get(prompt.id))), soft_wrap=True)


def name_images(prompt: Prompt) -> str:
    """Returns size and digest of a prompt's images, for people."""
    return "".join(f", image of {each.width} x {each.height} ({each.digest[:12]})" for each in prompt.line.images)


def make_item(prompt: Prompt, response: str | None) -> reward_pb2.ScoreItem:
    """Returns the item of a response, of the stated reference if None."""
    item = reward_pb2.ScoreItem()
    item.CopyFrom(prompt.line.item)
    item.id, item.response = prompt.id, state_reference(prompt.line.item) if response is None else response
    return item


def state_reference(item: reward_pb2.ScoreItem) -> str:
    """Returns a response that states the reference, after the marker or in a box; nothing where there is no text."""
    verifier = getattr(item, str(item.WhichOneof("verifier")))
    reference = getattr(verifier, "reference", "") or next(iter(getattr(verifier, "references", ())), "")
    if not reference:
        return ""
    boxed = f"\\boxed{{{reference}}}" if item.WhichOneof("verifier") == "math" else reference
    return item.answer_marker + reference if item.answer_marker else boxed


async def judge(items: Sequence[reward_pb2.ScoreItem]) -> dict[str, reward_pb2.ScoreResponse]:
    """Returns verdicts by id, of a reward service in this process; items without a response are left out."""
    async with serving(RewardConfig(), lifespan) as app, RewardClient.connect(app.address) as reward:
        return {each.id: each async for each in score_items(reward, [item for item in items if item.response])}


def describe_verdict(prompt: Prompt, response: str | None, verdict: reward_pb2.ScoreResponse | None) -> str:
    """Returns a sentence on how a response is judged."""
    name = prompt.line.item.WhichOneof("verifier")
    if verdict is None:
        return f"judged by {name}; no reference to state: --response gives one to judge"
    text = state_reference(prompt.line.item) if response is None else response
    outcome = buffer_pb2.Verdict.Name(verdict.verdict).removeprefix("VERDICT_").lower()
    because = f": {verdict.reason}" if verdict.reason else ""
    return f"judged by {name}: {text!r} is {outcome}{because}"


def _show_token(encoder: PromptEncoder, token: int) -> str:
    """Returns a token's text between quotes, and its id."""
    return f"{encoder.tokenizer.decode([token], skip_special_tokens=False)!r}:{token}"
