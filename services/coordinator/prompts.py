"""Prompts: the problems of prompt files and data sets, as token ids that the base model is asked with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perigee.errors import InvalidArgumentError
from perigee.image_sources import ImageReader, ImageStore
from perigee.reward.items import PromptLine, looks_at_images
from perigee.reward.scoring import MAX_BATCH_BYTES
from perigee.reward.sources import SPLITS_FILE, STATE_FILE, Columns, image_base, read_source
from services.coordinator.run_config import ImagesConfig, PromptSource, RunConfig
from services.kit.chat import PromptEncoder
from services.kit.storage import is_file, is_url, join, local_file, local_folder, read_file

DATA_SUFFIXES = (".parquet", ".jsonl")


@dataclass(frozen=True)
class Prompt:
    """Problem with its ground truth, and its token ids, special tokens included; an image is one, its placeholder."""

    line: PromptLine
    token_ids: tuple[int, ...]
    source: int = 0
    """Number of the source that it came from."""
    image_tokens: int = 0
    """Tokens that its images add to their placeholders."""

    @property
    def id(self) -> str:
        """Id in the prompt file."""
        return self.line.id

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return len(self.token_ids) + self.image_tokens

    @property
    def domain(self) -> str:
        """Domain, by which accuracies are reported."""
        return self.line.domain


def read_prompts(
    sources: Sequence[PromptSource],
    field: str,
    encoder: PromptEncoder,
    max_response_tokens: int,
    images: ImagesConfig = ImagesConfig(),
    store: ImageStore | None = None,
) -> dict[str, Prompt]:
    """Returns the prompts of all sources by id, in their order, tokenized; `field` is the key that named them.

    Images are checked, and kept by `store` where there is one. Raises InvalidArgumentError naming file, line and field
    of malformed lines, a repeated id, or a prompt that leaves less than `max_response_tokens` of the model's context.
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
            make_image_reader(source.path, images, store),
        )
        encodings = encoder.encode(
            [line.asked for line in lines], [line.place for line in lines], images=[line.images for line in lines]
        )
        for line, token_ids in zip(lines, encodings, strict=True):
            if (first := prompts.get(line.id)) is not None:
                raise InvalidArgumentError.for_field(
                    f"{line.place}: id", f"{line.id!r} is that of {first.line.place}, too"
                )
            check_images(line, images)
            added = len(encoder.expand(token_ids, line.images, line.place)) - len(token_ids)
            prompts[line.id] = prompt = Prompt(line, tuple(token_ids), number, added)
            check_room(prompt, encoder.model.context_tokens, max_response_tokens)
    return prompts


def check_images(line: PromptLine, images: ImagesConfig) -> None:
    """Raises InvalidArgumentError for more images than a prompt may have, and for more than a judge can be sent."""
    size = sum(image.size_bytes for image in line.images)
    if len(line.images) > images.max_per_prompt:
        raise InvalidArgumentError.for_field(
            f"{line.place}: images",
            f"are {len(line.images)}, more than the {images.max_per_prompt} of run.images.max_per_prompt",
        )
    if size > MAX_BATCH_BYTES and looks_at_images(line.item):
        raise InvalidArgumentError.for_field(
            f"{line.place}: images",
            f"have {size:,} bytes, and a judge is sent {MAX_BATCH_BYTES:,} at most: shrink them",
        )


def make_image_reader(path: str, images: ImagesConfig, store: ImageStore | None = None) -> ImageReader:
    """Returns what reads the images that the lines of a file or folder name, a path or a URL."""
    return ImageReader(image_base(path), images.limits, images.allow_urls, store, read_file)


def read_problems(
    config: RunConfig, encoder: PromptEncoder, store: ImageStore | None = None
) -> tuple[dict[str, Prompt], dict[str, Prompt]]:
    """Returns a run's prompts and its held-out problems: those of their own sources, or a part of the prompts.

    Raises what `read_prompts` raises, and InvalidArgumentError for a part that leaves one side empty.
    """
    heldout, cap = config.heldout, config.rollout.max_response_tokens
    evaluation_cap = config.evaluation.max_response_tokens or cap
    prompts = read_prompts(config.prompts, "run.prompts", encoder, cap, config.images, store)
    if heldout.sources:
        others = read_prompts(heldout.sources, "run.heldout", encoder, evaluation_cap, config.images, store)
        return prompts, others
    # The same question twice is on one side.
    questions = list(dict.fromkeys(prompt.line.question for prompt in prompts.values()))
    count = heldout.count or round(len(questions) * (heldout.fraction or 0))
    if not 0 < count < len(questions):
        raise InvalidArgumentError.for_field(
            "run.heldout", f"takes {count} of {len(questions)} different prompts, and each side needs one at least"
        )
    order = np.random.default_rng(heldout.seed).permutation(len(questions))
    chosen = {questions[index] for index in order[:count]}
    sides: tuple[dict[str, Prompt], dict[str, Prompt]] = ({}, {})
    for prompt in prompts.values():
        sides[prompt.line.question in chosen][prompt.id] = prompt
    for prompt in sides[True].values():
        check_room(prompt, encoder.model.context_tokens, evaluation_cap)
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


def check_room(prompt: Prompt, context_tokens: int, max_response_tokens: int) -> None:
    """Raises InvalidArgumentError for a prompt without tokens, or one too long for the model's context."""
    where = f"{prompt.line.place}: prompt {prompt.id}"
    if not prompt.token_ids:
        raise InvalidArgumentError.for_field(where, "has no tokens in the model's vocabulary")
    if prompt.tokens + max_response_tokens > context_tokens:
        images = len(prompt.line.images)
        added = f" ({prompt.image_tokens + images} of them of {images} images)" if images else ""
        raise InvalidArgumentError.for_field(
            where,
            f"has {prompt.tokens} tokens{added}, which with a response of {max_response_tokens} pass the model's "
            f"context of {context_tokens}: shorten it or lower run.rollout.max_response_tokens",
        )
