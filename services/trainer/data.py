"""Training data: trajectories from the buffer, and prompt-response examples from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from perigee.buffer.client import BufferClient, StoredTrajectory
from perigee.errors import FailedPreconditionError, InvalidArgumentError
from services.kit.hf import encode_prompts, open_tokenizer
from services.kit.storage import local_file
from services.trainer.packing import TokenSequence


class Example(BaseModel):
    """Prompt and response of a line."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Trajectory:
    """A prompt and T response tokens, each with the rollout's log-probability and its policy version."""

    prompt_tokens: npt.NDArray[np.int64]
    tokens_T: npt.NDArray[np.int64]
    rollout_logprobs_T: npt.NDArray[np.float32]
    versions_T: npt.NDArray[np.int64]


async def read_trajectories(
    buffer: BufferClient, run_id: str, trajectory_ids: Sequence[str], timeout_s: float
) -> dict[str, Trajectory]:
    """Reads whole trajectories by id; `timeout_s` bounds each call of the buffer.

    Raises FailedPreconditionError for one that has not ended, DataLossError for one whose pieces do not fit together.
    """
    stored = buffer.read_trajectories(run_id, trajectory_ids, with_logprobs=True, timeout_s=timeout_s)
    return {each.trajectory_id: unpack_trajectory(each) async for each in stored}


def unpack_trajectory(stored: StoredTrajectory) -> Trajectory:
    """Returns a finished trajectory as arrays; raises FailedPreconditionError for one that has not ended."""
    if not stored.finished:
        raise FailedPreconditionError(
            f"trajectory {stored.trajectory_id} has not ended; only complete groups are trained"
        )
    return Trajectory(
        prompt_tokens=np.frombuffer(stored.prompt_token_ids, dtype="<u4").astype(np.int64),
        tokens_T=np.frombuffer(stored.token_ids, dtype="<u4").astype(np.int64),
        rollout_logprobs_T=np.frombuffer(stored.logprobs, dtype="<f4"),
        versions_T=np.repeat(
            np.array([span.policy_version for span in stored.versions], dtype=np.int64),
            np.array([span.tokens for span in stored.versions], dtype=np.int64),
        ),
    )


def read_examples(name: str, model: Path, eos_token_id: int, max_tokens: int) -> list[TokenSequence]:
    """Returns the examples of a JSON Lines file with "prompt" and "response" text, by the tokenizer of `model`.

    `name` is a path or a URL.

    A prompt has the tokens that it has in a rollout, BOS included; EOS follows each response. Raises
    InvalidArgumentError naming file and line for a malformed or overlong example.
    """
    tokenizer = open_tokenizer(model, "trainer.model")
    dataset = local_file(name, "dataset_path")
    lines = _read_lines(dataset)
    if not lines:
        raise InvalidArgumentError.for_field("dataset_path", f"{dataset} holds no example")
    prompts = encode_prompts(tokenizer, [line.prompt for _, line in lines])
    responses = tokenizer.encode_batch([line.response for _, line in lines], add_special_tokens=False)
    examples = []
    for (where, _), prompt_tokens, response in zip(lines, prompts, responses, strict=True):
        if not prompt_tokens:
            raise InvalidArgumentError.for_field("dataset_path", f"{where}: the prompt is empty")
        tokens = np.array([*prompt_tokens, *response.ids, eos_token_id], dtype=np.int64)
        if len(tokens) > max_tokens:
            raise InvalidArgumentError.for_field(
                "dataset_path", f"{where}: {len(tokens)} tokens are more than the context of {max_tokens}"
            )
        examples.append(TokenSequence(tokens, np.arange(1, len(tokens)) >= len(prompt_tokens)))
    return examples


def _read_lines(dataset: Path) -> list[tuple[str, Example]]:
    """Returns where each example is, and the example."""
    try:
        lines = dataset.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError.for_field("dataset_path", f"{dataset} cannot be read: {error}") from error
    places = ((f"{dataset} line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    return [(where, _parse_line(where, line)) for where, line in places]


def _parse_line(where: str, line: str) -> Example:
    try:
        return Example.model_validate_json(line)
    except ValidationError as error:
        problem = error.errors()[0]
        path = ".".join(map(str, problem["loc"]))
        reason = f"{where}: {path or 'the line'}: {problem['msg']}"
        raise InvalidArgumentError.for_field("dataset_path", reason) from error
