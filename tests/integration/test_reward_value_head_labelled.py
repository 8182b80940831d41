"""A value head that the command trains on the labelled set and the service serves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perigee.buffer.v1.buffer_pb2 import VERDICT_CORRECT
from perigee.reward.v1 import reward_pb2 as pb
from services.reward.config import ValueHeadConfig
from services.reward.value_head.folder import read_description
from services.reward.value_head.training import area_under_curve
from tests.fixtures.cli import run_perigee
from tests.fixtures.labelled import LABELLED
from tests.fixtures.reward import running_reward, score
from tests.fixtures.value_head import CONTEXT, write_lines

SETTINGS = ("device=cpu", "threads=1", f"max_tokens={CONTEXT}", "batch_size=32", "learning_rate=2e-3")


def split_by_question() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines with a reference, without and with every fifth question."""
    lines = [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if isinstance(line.get("reference"), str)]
    held_out = set(sorted({line["question"] for line in lines})[::5])
    kept = [line for line in lines if line["question"] not in held_out]
    return kept, [line for line in lines if line["question"] in held_out]


def make_items(lines: Sequence[dict[str, Any]]) -> list[pb.ScoreItem]:
    return [
        pb.ScoreItem(
            id=line["id"],
            prompt=line["question"],
            response=line["response"],
            value_head=pb.ValueHeadVerifier(reference=line["reference"]),
        )
        for line in lines
    ]


@pytest.mark.timeout(300)  # trains a model
async def test_a_value_head_trained_on_the_labelled_set_judges_questions_that_it_has_not_seen(
    tmp_path: Path, value_head_backbone: Path
) -> None:
    training, held_out = split_by_question()
    write_lines(tmp_path / "data.jsonl", training)
    write_lines(tmp_path / "held_out.jsonl", held_out)
    ended = await run_perigee(
        *("reward", "train", "--data", str(tmp_path / "data.jsonl"), "--eval-data", str(tmp_path / "held_out.jsonl")),
        *("--backbone", str(value_head_backbone), "--out", str(tmp_path / "out"), "--loss", "both", "--epochs", "6"),
        *(word for setting in SETTINGS for word in ("--set", setting)),
    )
    assert ended.code == 0, ended.stderr
    folder = tmp_path / "out" / "model"
    found = read_description(folder).evaluation
    assert found["responses"] == len(held_out)
    history = json.loads((tmp_path / "out" / "evaluations.json").read_text())
    assert history[-1]["training_loss"] < history[0]["training_loss"]

    items = make_items(held_out)
    config = ValueHeadConfig(path=str(folder), device="cpu", reward="probability", max_batch_items=16)
    async with running_reward(value_head=config) as client:
        outcomes = {outcome.id: outcome for outcome in await score(client, items)}
    assert [outcome.reason for outcome in outcomes.values() if not outcome.HasField("reward")] == []
    correct = np.array([line["label"] == "correct" for line in held_out])
    rewards = np.array([outcomes[line["id"]].reward for line in held_out])
    verdicts = np.array([outcomes[line["id"]].verdict == VERDICT_CORRECT for line in held_out])
    # A random model of two layers that has seen a thousand responses six times: better than chance, which is 0.5
    # give or take 0.03, and no more is asked.
    assert area_under_curve(rewards, correct) == pytest.approx(found["auc"], abs=2e-3)
    assert found["auc"] > 0.58
    assert np.mean(verdicts == correct) == pytest.approx(found["accuracy"], abs=0.02)
