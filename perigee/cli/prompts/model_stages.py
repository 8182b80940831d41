"""The two stages that ask a model: how hard a prompt is, and whether its answer can be guessed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from perigee.cli.prompts.asking import AskOptions, Inquiry, ask
from perigee.cli.prompts.settings import SamplingSettings
from perigee.cli.prompts.stages import Produce
from perigee.curation.findings import Decision, Finding, Question
from perigee.curation.pass_rates import SampleCounts, decide_difficulty, decide_guessing, least_judged
from perigee.reward.items import PromptLine
from perigee.reward.scoring import ScoreClient
from perigee.rollout.client import RolloutClient
from services.kit.hf import encode_prompts

TOO_LONG = "too long for the model"


@dataclass(frozen=True)
class AskedModel:
    """The model that is asked, and what judges its answers."""

    workers: Sequence[RolloutClient]
    reward: ScoreClient
    tokenizer: Tokenizer
    context_tokens: int
    policy_version: int
    unavailable_s: float


@dataclass(frozen=True)
class ModelStage:
    """What is asked about each prompt, and what the answers decide."""

    name: str
    samples: int
    max_tokens: int
    render: Callable[[PromptLine], str]
    """From a prompt's line to the text that the model continues."""
    given: Callable[[PromptLine], str]
    """What of the answer the text holds already."""
    decide: Callable[[str, SampleCounts], Finding]


def difficulty_stage(settings: SamplingSettings) -> ModelStage:
    """Difficulty = 1 - pass rate."""
    least = least_judged(settings.samples, settings.min_judged)

    def decide(question_id: str, counts: SampleCounts) -> Finding:
        return decide_difficulty(
            question_id, counts, min_judged=least, trivial_pass_rate=settings.trivial_pass_rate
        )  # fmt: skip

    return ModelStage(
        "difficulty", settings.samples, settings.response_tokens, lambda line: line.item.prompt, lambda line: "", decide
    )


def guessing_stage(settings: SamplingSettings) -> ModelStage:
    """A right guess without reasoning drops the prompt."""
    least = least_judged(settings.guesses, settings.min_judged)

    def render(line: PromptLine) -> str:
        template = settings.guess_template.replace("{answer_marker}", line.item.answer_marker)
        return template.replace("{prompt}", line.item.prompt).rstrip("\n")

    def given(line: PromptLine) -> str:
        # A template that ends with the marker leaves the bare answer to the model.
        return line.item.answer_marker if render(line).endswith(line.item.answer_marker) else ""

    def decide(question_id: str, counts: SampleCounts) -> Finding:
        return decide_guessing(question_id, counts, min_judged=least)

    return ModelStage("guessing", settings.guesses, settings.guess_tokens, render, given, decide)


def ask_about(
    stage: ModelStage,
    model: AskedModel,
    lines: Mapping[str, PromptLine],
    settings: SamplingSettings,
    seed: int,
) -> Produce:
    """The stage's findings, some prompts at a time."""
    options = AskOptions(
        policy_version=model.policy_version,
        temperature=settings.temperature,
        seed=seed,
        stage=stage.name,
        unavailable_s=model.unavailable_s,
    )

    async def produce(questions: Sequence[Question]) -> AsyncIterator[Sequence[Finding]]:
        inquiries, too_long = make_inquiries(stage, model, [lines[question.id] for question in questions])
        yield too_long
        async for counts in ask(model.workers, model.reward, inquiries, options):
            yield [stage.decide(question_id, found) for question_id, found in counts.items()]

    return produce


def make_inquiries(
    stage: ModelStage, model: AskedModel, lines: Sequence[PromptLine]
) -> tuple[list[Inquiry], list[Finding]]:
    """What to ask, and the prompts that the model's context has no room for."""
    encodings = encode_prompts(model.tokenizer, [stage.render(line) for line in lines])
    inquiries: list[Inquiry] = []
    too_long: list[Finding] = []
    for line, token_ids in zip(lines, encodings, strict=True):
        tokens = len(token_ids)
        if not 0 < tokens <= model.context_tokens - stage.max_tokens:
            too_long.append(Finding(line.id, Decision.ASIDE, TOO_LONG, {"prompt_tokens": tokens}))
            continue
        inquiries.append(Inquiry(line.id, token_ids, stage.samples, stage.max_tokens, line.item, stage.given(line)))
    return inquiries, too_long
