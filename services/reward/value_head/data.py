"""Examples and settings of the training of a value head: labelled responses from JSON Lines, split by question, as
tokens, as pairs of a right and a wrong one, and as steps of similar length. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from perigee.errors import InvalidArgumentError
from perigee.reward.items import read_lines
from services.kit.config import Model
from services.kit.hf import ModelFolder, open_model_folder
from services.reward.value_head.folder import Encoder, load_tokenizer

Loss = Literal["pointwise", "pairwise", "both"]
# Verdicts, as files of outcomes and of labelled items have them.
VERDICTS = {"correct": True, "wrong": False, "ungradable": False}
# Steps whose units are sorted by length together.
WINDOW_STEPS = 32
# Settings that change nothing that is computed; of the files it is the content that counts.
_FREE = {"data", "eval_data", "backbone", "out", "resume", "threads", "checkpoint_every_steps"}


class TrainingConfig(Model):
    """Settings of `perigee reward train`."""

    data: str
    """JSON Lines: question, reference, response, label; or question, reference, chosen, rejected."""
    backbone: str
    """Folder of the Hugging Face model to start from."""
    out: str
    """Folder to write to: the best model so far is `model` in it."""
    eval_data: str | None = None
    """Examples to evaluate on; a share of the questions of `data` unless set."""
    eval_share: float = Field(0.05, gt=0, lt=1)
    """Share of the questions that is held out."""
    loss: Loss = "both"
    """pointwise: right or wrong, one by one; pairwise: right before wrong, in pairs; both: their sum."""
    pairwise_weight: float = Field(1.0, gt=0)
    """Weight of the pairwise loss in `both`."""
    epochs: int = Field(1, ge=1)
    """Passes over the examples."""
    batch_size: int = Field(64, ge=1)
    """Responses, or pairs, of one step."""
    max_tokens: int = Field(2048, ge=8)
    """Longest input; longer responses lose their beginning."""
    max_microbatch_tokens: int = Field(16_384, ge=1)
    """Tokens of one forward pass, padding included; a step accumulates gradients over as many as it takes."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak rate of AdamW; it falls to 0 in a straight line."""
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises."""
    weight_decay: float = Field(0.01, ge=0)
    """Decay of matrices; vectors have none."""
    max_gradient_norm: float = Field(1.0, gt=0)
    """Longer gradients are cut to this norm."""
    eval_every_steps: int | None = Field(None, ge=1)
    """Steps between evaluations; an epoch unless set."""
    patience: int = Field(3, ge=1)
    """Evaluations without a better one after which training stops."""
    checkpoint_every_steps: int = Field(500, ge=1)
    """Steps between checkpoints; there is one at each evaluation, too."""
    seed: int = Field(0, ge=0)
    """Seed of split, pairs, order, head and dropout."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")
    """cpu, cuda or cuda:1; a GPU computes in bfloat16 with float32 weights, a CPU in float32."""
    threads: int | None = Field(None, ge=1)
    """Threads on a CPU; torch's choice unless set."""
    gradient_checkpointing: bool = False
    """Compute activations twice to save memory."""
    resume: bool = False
    """Go on from the last checkpoint in `out`."""


class LabelledResponse(BaseModel):
    """A line {"question", "reference", "response", "label"}; the label is true, 1 or "correct" for a right response."""

    model_config = ConfigDict(frozen=True)

    question: str
    reference: str
    response: str
    label: bool

    @field_validator("label", mode="before")
    @classmethod
    def _read_verdict(cls, label: Any) -> Any:
        return VERDICTS.get(label, label) if isinstance(label, str) else label


class Preference(BaseModel):
    """A line {"question", "reference", "chosen", "rejected"}: the chosen response is right, the rejected one wrong."""

    model_config = ConfigDict(frozen=True)

    question: str
    reference: str
    chosen: str
    rejected: str


Example = LabelledResponse | Preference


@dataclass(frozen=True)
class ResponseSet:
    """Responses as tokens, which of them are right, and pairs (right, wrong) of responses to the same question."""

    tokens: list[NDArray[np.int32]]
    correct_N: NDArray[np.bool_]
    pairs: list[tuple[int, int]]

    def units(self, loss: Loss) -> list[tuple[int, ...]]:
        """Returns the units of a step of training: single responses, pairs, or pairs and what is in none."""
        if loss == "pairwise":
            return list(self.pairs)
        paired = {index for pair in self.pairs for index in pair} if loss == "both" else set()
        singles = [(index,) for index in range(len(self.tokens)) if index not in paired]
        return [*self.pairs, *singles] if loss == "both" else list(singles)


@dataclass(frozen=True)
class Prepared:
    """Responses to train on and to evaluate on, as tokens, and how they were made."""

    encoder: Encoder
    pad_token_id: int
    training: ResponseSet
    evaluation: ResponseSet
    units: list[tuple[int, ...]]
    fingerprint: str


def prepare(config: TrainingConfig) -> Prepared:
    """Reads and encodes all data.

    Raises InvalidArgumentError naming what is wrong with a file or a setting.
    """
    model = open_model_folder(config.backbone, "backbone")
    context = model.config.get("max_position_embeddings")
    if context is not None and config.max_tokens > int(context):
        raise InvalidArgumentError.for_field("max_tokens", f"the backbone reads at most {context} tokens")
    encoder = Encoder(load_tokenizer(model.path), config.max_tokens, _token_id(model, "eos_token_id"))
    examples = read_examples(Path(config.data))
    if config.eval_data is None:
        training, evaluation = split_by_question(examples, config.eval_share, config.seed)
    else:
        training, evaluation = examples, read_examples(Path(config.eval_data))
    training_set = encode_examples(training, encoder, config.seed)
    evaluation_set = encode_examples(evaluation, encoder, config.seed)
    if evaluation_set.correct_N.all() or not evaluation_set.correct_N.any():
        raise InvalidArgumentError.for_field(
            "eval_share", "the examples to evaluate on are all right or all wrong; raise it, or give eval_data"
        )
    units = training_set.units(config.loss)
    if not units:
        raise InvalidArgumentError.for_field("loss", "pairwise needs a question that has a right and a wrong response")
    pad_token_id = _token_id(model, "pad_token_id")
    return Prepared(
        encoder,
        0 if pad_token_id is None else pad_token_id,
        training_set,
        evaluation_set,
        units,
        _fingerprint(config, [training, evaluation], model.config),
    )


def read_examples(path: Path) -> list[Example]:
    """Returns the examples of a file; keys that are not known are left alone.

    Raises InvalidArgumentError naming file and line.
    """
    examples = [_read_line(place, line) for place, line in read_lines(path, "data")]
    if not examples:
        raise InvalidArgumentError.for_field("data", f"{path} holds no example")
    return examples


def split_by_question(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Returns examples to train on and to evaluate on; no question is in both.

    Raises InvalidArgumentError when there are not two questions.
    """
    questions = list(dict.fromkeys(example.question for example in examples))
    if len(questions) < 2:
        raise InvalidArgumentError.for_field("data", "at least two different questions are needed, one to evaluate on")
    count = min(max(1, round(len(questions) * share)), len(questions) - 1)
    chosen = np.random.default_rng(seed).permutation(len(questions))[:count]
    held_out = {questions[index] for index in chosen}
    return (
        [example for example in examples if example.question not in held_out],
        [example for example in examples if example.question in held_out],
    )


def encode_examples(examples: Iterable[Example], encoder: Encoder, seed: int) -> ResponseSet:
    """Returns all responses as tokens.

    Labelled ones are paired within their question, each right and each wrong one at least once; where there are more of
    one kind, those of the other come several times.
    """
    tokens: list[NDArray[np.int32]] = []
    correct: list[bool] = []
    pairs: list[tuple[int, int]] = []
    by_question: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def add(example: Example, response: str, label: bool) -> int:
        ids = encoder.encode(example.question, example.reference, response)
        tokens.append(np.array(ids, dtype=np.int32))
        correct.append(label)
        return len(tokens) - 1

    for example in examples:
        if isinstance(example, Preference):
            pairs.append((add(example, example.chosen, True), add(example, example.rejected, False)))
        else:
            kinds = by_question.setdefault((example.question, example.reference), ([], []))
            kinds[not example.label].append(add(example, example.response, example.label))
    generator = np.random.default_rng(seed)
    for right, wrong in by_question.values():
        if right and wrong:
            count = max(len(right), len(wrong))
            rights, wrongs = (np.resize(generator.permutation(kind), count).tolist() for kind in (right, wrong))
            pairs += zip(rights, wrongs, strict=True)
    return ResponseSet(tokens, np.array(correct, dtype=np.bool_), pairs)


def draw_steps(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Returns an epoch's steps of unit indices: shuffled, sorted by length in windows, and the steps shuffled again."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths)).tolist()
    window = WINDOW_STEPS * batch_size
    steps: list[list[int]] = []
    for begin in range(0, len(order), window):
        part = sorted(order[begin : begin + window], key=lambda index: lengths[index])
        steps += [part[first : first + batch_size] for first in range(0, len(part), batch_size)]
    return [steps[index] for index in generator.permutation(len(steps))]


def split_by_tokens(
    indices: Sequence[int], lengths: Sequence[int], sequences: Sequence[int], max_tokens: int
) -> Iterator[list[int]]:
    """Yields micro-batches of at most `max_tokens` tokens, padding included; a unit that is larger is one by itself.

    `lengths` holds the longest sequence of each unit, `sequences` how many it has.
    """
    batch: list[int] = []
    rows = 0
    for index in sorted(indices, key=lambda index: lengths[index]):
        # Sorted: this one is the longest so far.
        if batch and (rows + sequences[index]) * lengths[index] > max_tokens:
            yield batch
            batch, rows = [], 0
        batch.append(index)
        rows += sequences[index]
    if batch:
        yield batch


def _fingerprint(config: TrainingConfig, examples: Sequence[Sequence[Example]], model: dict[str, Any]) -> str:
    settings = {key: value for key, value in config.model_dump().items() if key not in _FREE}
    digest = hashlib.blake2b(json.dumps([settings, model], sort_keys=True).encode(), digest_size=16)
    for part in examples:
        digest.update(b"part")
        for example in part:
            digest.update(example.model_dump_json().encode())
    return digest.hexdigest()


def _token_id(model: ModelFolder, name: str) -> int | None:
    """Returns a special token of the model; None when neither of its files names it."""
    value = model.generation.get(name)
    if value is None:
        value = model.config.get(name)
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None else int(value)


def _read_line(where: str, line: str) -> Example:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InvalidArgumentError.for_field("data", f"{where} is not JSON: {error}") from error
    is_preference = isinstance(value, dict) and "chosen" in value
    try:
        return Preference.model_validate(value) if is_preference else LabelledResponse.model_validate(value)
    except ValidationError as error:
        detail = error.errors()[0]
        field = f"{detail['loc'][0]}: " if detail["loc"] else ""
        raise InvalidArgumentError.for_field(
            "data",
            f"{where}: {field}{detail['msg']}; a line holds question, reference, response and label, or question, "
            "reference, chosen and rejected",
        ) from error
