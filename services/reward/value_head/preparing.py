"""What a training needs before its first step: the encoder, the responses, and a name for all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perigee.errors import InvalidArgumentError
from services.reward.value_head.data import Example, ResponseSet, encode_examples, read_examples, split_by_question
from services.reward.value_head.template import Encoder, load_tokenizer
from services.reward.value_head.training_config import TrainingConfig

# They change nothing that is computed; of the files it is the content that counts.
_FREE = {"data", "eval_data", "backbone", "out", "resume", "threads", "checkpoint_every_steps"}


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
    backbone = Path(config.backbone)
    model = _read_json(backbone / "config.json")
    context = model.get("max_position_embeddings")
    if context is not None and config.max_tokens > int(context):
        raise InvalidArgumentError.of("max_tokens", f"the backbone reads at most {context} tokens")
    tokenizer = load_tokenizer(backbone)
    encoder = Encoder(tokenizer, config.max_tokens, _token_id(backbone, model, "eos_token_id"))
    examples = read_examples(Path(config.data))
    if config.eval_data is None:
        training, evaluation = split_by_question(examples, config.eval_share, config.seed)
    else:
        training, evaluation = examples, read_examples(Path(config.eval_data))
    training_set = encode_examples(training, encoder, config.seed)
    evaluation_set = encode_examples(evaluation, encoder, config.seed)
    if evaluation_set.correct_N.all() or not evaluation_set.correct_N.any():
        raise InvalidArgumentError.of(
            "eval_share", "the examples to evaluate on are all right or all wrong; raise it, or give eval_data"
        )
    units = training_set.units(config.loss)
    if not units:
        raise InvalidArgumentError.of("loss", "pairwise needs a question that has a right and a wrong response")
    pad_token_id = _token_id(backbone, model, "pad_token_id")
    return Prepared(
        encoder,
        0 if pad_token_id is None else pad_token_id,
        training_set,
        evaluation_set,
        units,
        _fingerprint(config, [training, evaluation], model),
    )


def _fingerprint(config: TrainingConfig, examples: Sequence[Sequence[Example]], model: dict[str, Any]) -> str:
    settings = {key: value for key, value in config.model_dump().items() if key not in _FREE}
    digest = hashlib.blake2b(json.dumps([settings, model], sort_keys=True).encode(), digest_size=16)
    for part in examples:
        digest.update(b"part")
        for example in part:
            digest.update(example.model_dump_json().encode())
    return digest.hexdigest()


def _token_id(backbone: Path, model: dict[str, Any], name: str) -> int | None:
    """A special token of the model, from generation_config.json or config.json; None when neither names it."""
    generation = backbone / "generation_config.json"
    value = _read_json(generation).get(name) if generation.exists() else None
    if value is None:
        value = model.get(name)
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None else int(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError(
            f"{path} cannot be read ({error.strerror}): is this a Hugging Face folder?"
        ) from error
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgumentError(f"{path} holds no JSON object")
    return value
