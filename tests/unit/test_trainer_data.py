"""Examples out of prompt-response text, with the tokens that a rollout sees; stored trajectories as arrays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from perigee.buffer.client import StoredTrajectory
from perigee.buffer.packing import pack_logprobs, pack_token_ids
from perigee.buffer.v1 import buffer_pb2 as pb
from perigee.errors import FailedPreconditionError
from perigee.trainer.v1.trainer_pb2 import ChatSettings
from services.kit.hf import open_model_folder
from services.trainer.data import read_examples, unpack_trajectory
from tests.fixtures.trainer import CHARACTERS, EOS, write_tokenizer

BOS = CHARACTERS.index("b") + 2


def write_example(folder: Path, prompt: str) -> Path:
    path = folder / "data.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "response": "2"}) + "\n")
    return path


def test_a_prompt_has_bos_exactly_once_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    """Also where the prompt, as rendered by a chat template, begins with it."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": EOS}))
    model = open_model_folder(tmp_path, "trainer.model")
    one, two = (CHARACTERS.index(character) + 2 for character in "12")
    for add_bos, prompt in [(False, "1"), (True, "1"), (True, "b1")]:
        write_tokenizer(tmp_path / "tokenizer.json")
        if add_bos:
            tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
            tokenizer.post_processor = TemplateProcessing(single="b $A", special_tokens=[("b", BOS)])
            tokenizer.save(str(tmp_path / "tokenizer.json"))
        [(example,)] = read_examples(str(write_example(tmp_path, prompt)), model, ChatSettings(), 128)
        prompt_tokens = [BOS, one] if add_bos else [one]
        assert example.tokens.tolist() == [*prompt_tokens, two, EOS]
        # The prediction of token i + 1 is at i: the response and EOS are trained.
        assert np.flatnonzero(example.trained_T).tolist() == [len(prompt_tokens) - 1, len(prompt_tokens)]


STORED = StoredTrajectory(
    trajectory_id="t",
    prompt_token_ids=pack_token_ids([5, 6]),
    token_ids=pack_token_ids([7, 8, 9]),
    logprobs=pack_logprobs([-0.5, -0.25, -1]),
    versions=[pb.VersionSpan(policy_version=3, tokens=1), pb.VersionSpan(policy_version=4, tokens=2)],
    end_reason=pb.END_REASON_STOP,
    epoch=1,
)


def test_every_token_has_its_logprob_and_version() -> None:
    trajectory = unpack_trajectory(STORED)
    assert trajectory.prompt_tokens.tolist() == [5, 6]
    assert trajectory.tokens_T.tolist() == [7, 8, 9]
    assert trajectory.versions_T.tolist() == [3, 4, 4]
    assert trajectory.rollout_logprobs_T.tolist() == [-0.5, -0.25, -1]
    assert trajectory.rollout_logprobs_T.dtype == np.float32


def test_a_partial_trajectory_is_refused() -> None:
    with pytest.raises(FailedPreconditionError, match="has not ended"):
        unpack_trajectory(replace(STORED, end_reason=pb.END_REASON_BUDGET))
