"""A run's scoring against the real reward service and sandbox."""

from __future__ import annotations

from pathlib import Path

from perigee.buffer.v1 import buffer_pb2
from perigee.reward.client import RewardClient
from perigee.reward.scoring import ScoreJob, read_reward
from perigee.reward.v1 import reward_pb2
from services.coordinator.config import ScoringConfig
from services.coordinator.prompts import read_prompts
from services.coordinator.rewards import score_responses
from services.coordinator.run_config import PromptSource
from services.kit.chat import open_encoder
from services.kit.hf import open_model_folder
from tests.fixtures.coordinator import code_line, math_line, write_lines, write_model_folder


async def test_math_and_code_are_judged_as_they_arrive(coding_reward: RewardClient, tmp_path: Path) -> None:
    encoder = open_encoder(open_model_folder(write_model_folder(tmp_path / "model"), "run.model"))
    parts = [
        {"name": "value", "judged_by": {"verifier": "math", "answer": "3"}},
        {"name": "form", "judged_by": {"verifier": "regex", "pattern": "[0-9]"}},
    ]
    lines = [
        math_line("sum", "1+2=", "3"),
        code_line("inc"),
        {"id": "letter", "prompt": "1+2=?", "verifier": "choice", "answer": "B", "answer_marker": "#"},
        {"id": "both", "prompt": "1+2=", "verifier": "composite", "parts": parts, "answer_marker": "#"},
    ]
    prompts = read_prompts(
        [PromptSource(path=str(write_lines(tmp_path / "p.jsonl", lines)))], "run.prompts", encoder, 16
    )
    outcomes: dict[str, reward_pb2.ScoreResponse] = {}

    async def take(some: list[reward_pb2.ScoreResponse]) -> None:
        outcomes.update({outcome.id: outcome for outcome in some})

    responses = {
        "right": ("sum", "1+2=3#3"),
        "wrong": ("sum", "1+2=4#4"),
        "silent": ("sum", "3"),
        "right-code": ("inc", "#def f(x):return x+1"),
        "wrong-code": ("inc", "#def f(x):return x*2"),
        "broken-code": ("inc", "#def f(x:"),
        "right-letter": ("letter", "#(B)"),
        "half": ("both", "#1+2=3"),
    }
    config = ScoringConfig(batch=2, queue=2, concurrency=2)
    async with score_responses(coding_reward, config, take) as scoring:
        for job_id, (prompt_id, response) in responses.items():
            await scoring.submit(ScoreJob(job_id, response, prompts[prompt_id].line.item))
    correct, wrong = buffer_pb2.VERDICT_CORRECT, buffer_pb2.VERDICT_WRONG
    assert {job_id: (outcome.verdict, read_reward(outcome)) for job_id, outcome in outcomes.items()} == {
        "right": (correct, 1.0),
        "wrong": (wrong, 0.0),
        "silent": (buffer_pb2.VERDICT_UNGRADABLE, 0.0),
        "right-code": (correct, 1.0),
        "wrong-code": (wrong, 0.0),
        "broken-code": (wrong, 0.0),
        "right-letter": (correct, 1.0),
        "half": (wrong, 0.5),
    }
