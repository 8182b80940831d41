"""Prompts: the problems of prompt files and data sets, as token ids that the base model is asked with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perigee.errors import InvalidArgumentError
from perigee.reward.items import PromptLine
from perigee.reward.sources import SPLITS_FILE, STATE_FILE, Columns, read_source
from services.coordinator.run_config import PromptSource, RunConfig
from services.kit.chat import PromptEncoder
from services.kit.storage import is_file, is_url, join, local_file, local_folder

DATA_SUFFIXES = (".parquet", ".jsonl")


@dataclass(frozen=True)
class Prompt:
    """Problem with its ground truth, and its token ids, special tokens included."""

    line: PromptLine
    token_ids: tuple[int, ...]
    source: int = 0
    """Number of the source that it came from."""

    @property
    def id(self) -> str:
        """Id in the prompt file."""
        return self.line.id

    @property
    def domain(self) -> str:
        """Domain, by which accuracies are reported."""
        return self.line.domain


def read_prompts(
    sources: Sequence[PromptSource], field: str, encoder: PromptEncoder, max_response_tokens: int
) -> dict[str, Prompt]:
    """Returns the prompts of all sources by id, in their order, tokenized; `field` is the key that named them.

    Raises InvalidArgumentError naming file, line and field of malformed lines, a repeated id, or a prompt that leaves
    less than `max_response_tokens` of the model's context.
    """
    prompts: dict[str, Prompt] = {}
    names: Counter[str] = Counter()
    for number, source in enumerate(sources):
        name = source.name or Path(source.path).stem
        names[name] += 1
        lines = read_source(
            fetch_source(source, field),
            Columns(source.renames, source.defaults_with_verifier, source.answer_after, source.split),
            field,
            name if names[name] == 1 else f"{name}-{names[name]}",
        )
        encodings = encoder.encode([line.asked for line in lines], [line.place for line in lines])
        for line, token_ids in zip(lines, encodings, strict=True):
            if (first := prompts.get(line.id)) is not None:
                raise InvalidArgumentError.for_field(
                    f"{line.place}: id", f"{line.id!r} is that of {first.line.place}, too"
                )
            check_room(line, token_ids, encoder.model.context_tokens, max_response_tokens)
            prompts[line.id] = Prompt(line, tuple(token_ids), number)
    return prompts


def read_problems(config: RunConfig, encoder: PromptEncoder) -> tuple[dict[str, Prompt], dict[str, Prompt]]:
    """Returns a run's prompts and its held-out problems: those of their own sources, or a part of the prompts.

    Raises what `read_prompts` raises, and InvalidArgumentError for a part that leaves one side empty.
    """
    heldout, cap = config.heldout, config.rollout.max_response_tokens
    evaluation_cap = config.evaluation.max_response_tokens or cap
    prompts = read_prompts(config.prompts, "run.prompts", encoder, cap)
    if heldout.sources:
        return prompts, read_prompts(heldout.sources, "run.heldout", encoder, evaluation_cap)
    # The same question twice is on one side.
    questions = list(dict.fromkeys(prompt.line.item.prompt for prompt in prompts.values()))
    count = heldout.count or round(len(questions) * (heldout.fraction or 0))
    if not 0 < count < len(questions):
        raise InvalidArgumentError.for_field(
            "run.heldout", f"takes {count} of {len(questions)} different prompts, and each side needs one at least"
        )
    order = np.random.default_rng(heldout.seed).permutation(len(questions))
    chosen = {questions[index] for index in order[:count]}
    sides: tuple[dict[str, Prompt], dict[str, Prompt]] = ({}, {})
    for prompt in prompts.values():
        sides[prompt.line.item.prompt in chosen][prompt.id] = prompt
    for prompt in sides[True].values():
        check_room(prompt.line, prompt.token_ids, encoder.model.context_tokens, evaluation_cap)
    return sides


def fetch_source(source: PromptSource, field: str) -> Path:
    """Returns the path of a source's file or folder; of a URL that of a copy, of a saved DatasetDict its split's."""
    url, split = source.path, source.split or ""
    if not is_url(url) or is_file(url, field):
        return local_file(url, field)
    if split and is_file(join(url, SPLITS_FILE), field):
        url = join(url, split)

    def is_wanted(name: str) -> bool:
        is_data = name.startswith(split) and name.endswith(DATA_SUFFIXES)
        return is_data or name in (SPLITS_FILE, STATE_FILE) or name.endswith(".arrow")

    return local_folder(url, field, is_wanted)


def check_room(line: PromptLine, token_ids: Sequence[int], context_tokens: int, max_response_tokens: int) -> None:
    """Raises InvalidArgumentError for a prompt without tokens, or one too long for the model's context."""
    where = f"{line.place}: prompt {line.id}"
    if not token_ids:
        raise InvalidArgumentError.for_field(where, "has no tokens in the model's vocabulary")
    if len(token_ids) + max_response_tokens > context_tokens:
        raise InvalidArgumentError.for_field(
            where,
            f"has {len(token_ids)} tokens, which with a response of {max_response_tokens} pass the model's context of "
            f"{context_tokens}: shorten it or lower run.rollout.max_response_tokens",
        )
