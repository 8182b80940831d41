"""Supervised fine-tuning: reads prompt-response text, and trains on the response tokens in packed micro-batches."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from perigee.errors import InvalidArgumentError
from services.trainer.batches import MicroBatch, TokenSequence, make_micro_batches
from services.trainer.jobs import JobContext, check_finite
from services.trainer.optimizer import AdamW, scheduled_rate
from services.trainer.parallel import Control
from services.trainer.policy import Policy


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Settings of a fine-tuning job. `batch_size` is in examples per step."""

    steps: int
    batch_size: int
    max_tokens_per_microbatch: int
    seed: int
    optimizer: AdamW

    def validate(self) -> None:
        """Raises InvalidArgumentError naming the first field out of range."""
        for field in ("steps", "batch_size", "max_tokens_per_microbatch"):
            if getattr(self, field) < 1:
                raise InvalidArgumentError.of(field, "has to be at least 1")
        self.optimizer.validate()


@dataclass(frozen=True)
class FineTuneProgress:
    """Loss per response token and mean gradient norm since the last report; tokens and seconds since the start."""

    step: int
    steps: int
    loss: float
    gradient_norm: float
    tokens: int
    seconds: float


def read_examples(dataset: Path, tokenizer: Path, eos_token_id: int, max_tokens: int) -> list[TokenSequence]:
    """The examples of a JSON Lines file with "prompt" and "response" text; the response ends with the EOS token.

    Raises InvalidArgumentError naming file and line for a malformed or overlong example.
    """
    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # tokenizers raises plain Exception
        raise InvalidArgumentError(f"{tokenizer} cannot be read as a tokenizer: {error}") from error
    try:
        lines = dataset.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError.of("dataset_path", f"{dataset} cannot be read: {error}") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt, response = _parse_line(dataset, number, line)
        prompt_tokens = encoder.encode(prompt, add_special_tokens=False).ids
        response_tokens = [*encoder.encode(response, add_special_tokens=False).ids, eos_token_id]
        if not prompt_tokens:
            raise InvalidArgumentError.of("dataset_path", f"{dataset} line {number}: the prompt is empty")
        tokens = np.array(prompt_tokens + response_tokens, dtype=np.int64)
        if len(tokens) > max_tokens:
            raise InvalidArgumentError.of(
                "dataset_path",
                f"{dataset} line {number}: {len(tokens)} tokens are more than the context of {max_tokens}",
            )
        trained_T = np.arange(1, len(tokens)) >= len(prompt_tokens)
        examples.append(TokenSequence(tokens, trained_T, np.ones(len(trained_T), np.float32)))
    if not examples:
        raise InvalidArgumentError.of("dataset_path", f"{dataset} holds no example")
    return examples


def fine_tune(
    policy: Policy, control: Control, examples: Sequence[TokenSequence], settings: FineTuning, context: JobContext
) -> FineTuneProgress:
    """Trains the policy on the examples; a collective of all ranks, which get the same arguments and the same result.

    Raises CancelledError or InternalError with the weights half-trained: the caller puts them back.
    """
    policy.begin_job(settings.optimizer)
    layout = policy.layout
    start = time.monotonic()
    tokens, own_loss, loss_tokens, norms = 0, 0.0, 0, list[float]()
    for step, chosen in enumerate(_draw_batches(len(examples), settings), start=1):
        batches = make_micro_batches(
            examples, chosen, settings.max_tokens_per_microbatch, layout.data, layout.data_rank, layout.device
        )
        trained = sum(int(examples[i].trained_T.sum()) for i in chosen)

        def loss(batch: MicroBatch, logprobs_T: torch.Tensor, trained: int = trained) -> tuple[torch.Tensor, Any]:
            value = -(logprobs_T * batch.trained_T).sum()
            return value / trained, float(value.detach())

        rate = scheduled_rate(settings.optimizer, step - 1, settings.steps)
        norm, reports = policy.step(batches, 1.0, loss, rate)
        check_finite("gradient norm", norm)
        norms.append(norm)
        own_loss += sum(reports) if layout.tensor_rank == 0 else 0.0
        loss_tokens += trained
        tokens += sum(len(examples[i].tokens) for i in chosen)
        due = context.check(control)
        if due or step == settings.steps:
            progress = FineTuneProgress(
                step=step,
                steps=settings.steps,
                loss=sum(control.gather(own_loss)) / loss_tokens,
                gradient_norm=float(np.mean(norms)),
                tokens=tokens,
                seconds=time.monotonic() - start,
            )
            if step < settings.steps:
                context.report(progress)
            own_loss, loss_tokens, norms = 0.0, 0, []
    return progress


def _draw_batches(examples: int, settings: FineTuning) -> Iterator[list[int]]:
    """Indices of each step: epochs over all examples, each shuffled anew."""
    generator = np.random.default_rng(settings.seed)
    queue: list[int] = []
    for _ in range(settings.steps):
        while len(queue) < settings.batch_size:
            queue += generator.permutation(examples).tolist()
        yield queue[: settings.batch_size]
        queue = queue[settings.batch_size :]


def _parse_line(dataset: Path, number: int, line: str) -> tuple[str, str]:
    where = f"{dataset} line {number}"
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InvalidArgumentError.of("dataset_path", f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgumentError.of("dataset_path", f"{where} is no JSON object")
    for key in ("prompt", "response"):
        if not isinstance(value.get(key), str):
            raise InvalidArgumentError.of("dataset_path", f"{where}: {key} is missing or no text")
    return value["prompt"], value["response"]
