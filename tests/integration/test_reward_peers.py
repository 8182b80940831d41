"""verl's and OpenRLHF's own code on a real reward service, where they are installed."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from perigee.errors import UnavailableError
from perigee.reward.adapters.verl import compute_scores
from perigee.reward.client import RewardClient
from tests.fixtures.reward import running_gateway, running_reward

# Judged in the sandbox, of which there is none here: nobody knows.
CODE = {"verifier": "code", "language": "python", "function": "f", "tests": [{"arguments": [1], "expected": 1}]}
ROWS = [
    ("openai/gsm8k", "The sum is #### 18", "18", 1.0),
    ("openai/gsm8k", "The sum is #### 17", "18", 0.0),
    ("openai/gsm8k", "no answer", "18", 0.0),
    ("trivia", "#### the Seine", "Seine", 1.0),
    ("trivia", "#### 18", json.dumps({"math": {"reference": "18"}}), 1.0),
]


class Letters:
    """A tokenizer of one token per character, as far as the reward managers use one."""

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids.tolist()))


def make_verl_manager(name: str, address: str) -> Any:
    """verl's reward manager with the configuration that examples/clients/verl shows."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import load_reward_manager

    verifier = {"openai/gsm8k": "math", "trivia": "short_answer"}
    kwargs = {"address": address, "verifier": verifier, "answer_marker": "####"}
    function = {"path": "pkg://perigee.reward.adapters.verl", "name": name, "reward_kwargs": kwargs}
    manager = {"source": "register", "name": "naive"}
    config = OmegaConf.create({"reward": {"custom_reward_function": function, "reward_manager": manager}})
    return load_reward_manager(config, Letters())


def make_verl_data(source: str, solution: str, truth: Any) -> Any:
    """One row as verl's agent loop hands it to a reward manager; the response is padded."""
    import numpy as np
    from verl import DataProto

    ids = torch.tensor([[*map(ord, solution), 0, 0]])
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    fields = {
        "data_source": np.array([source], dtype=object),
        "reward_model": np.array([{"ground_truth": truth, "style": "rule"}], dtype=object),
        "extra_info": np.array([{"question": "How many?"}], dtype=object),
    }
    return DataProto.from_dict({"responses": ids, "attention_mask": mask}, non_tensors=fields)


@pytest.mark.parametrize("name", ["compute_score", "compute_score_async"])
async def test_verls_reward_manager_takes_its_scores_from_the_service(reward: RewardClient, name: str) -> None:
    pytest.importorskip("verl", reason="needs verl")
    manager = make_verl_manager(name, reward.target)
    for source, solution, truth, score in ROWS:
        result = await manager.run_single(make_verl_data(source, solution, truth))
        assert result["reward_score"] == score, (source, solution)
        assert set(result["reward_extra_info"]) == {"score", "acc", "pred"}
    async with running_reward(sandbox_address="127.0.0.1:9", code={"timeout_s": 0.1}) as lame:
        manager = make_verl_manager(name, lame.target)
        with pytest.raises(UnavailableError, match="could not be judged and has no score"):
            await manager.run_single(make_verl_data("openai/gsm8k", "#### x", json.dumps(CODE)))


async def test_verls_batch_manager_takes_its_scores_from_the_service(reward: RewardClient) -> None:
    pytest.importorskip("verl", reason="needs verl")
    from verl import DataProto
    from verl.workers.reward_manager.batch import BatchRewardManager

    length = max(len(row[1]) for row in ROWS)
    rows = [make_verl_data(source, solution.ljust(length), truth) for source, solution, truth, _ in ROWS]
    data = DataProto.concat(rows)
    data.batch["prompts"] = data.batch["responses"][:, :0]
    verifier = {"openai/gsm8k": "math", "trivia": "short_answer"}
    kwargs = {"address": reward.target, "verifier": verifier, "answer_marker": "####"}
    manager = BatchRewardManager(Letters(), 0, compute_scores, **kwargs)
    found = await asyncio.to_thread(manager, data, True)
    # A response's score stands at its last token.
    assert found["reward_tensor"].sum(dim=1).tolist() == [row[3] for row in ROWS]
    assert found["reward_tensor"][:, length - 1].tolist() == [row[3] for row in ROWS]
    assert found["reward_extra_info"]["acc"] == [row[3] for row in ROWS]


def load_openrlhf_agent(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of OpenRLHF's executors alone: its package imports what only runs on GPUs."""
    package = importlib.util.find_spec("openrlhf")
    if package is None or package.origin is None:
        pytest.skip("needs openrlhf")
    logs = SimpleNamespace(init_logger=logging.getLogger)
    monkeypatch.setitem(sys.modules, "openrlhf.utils.logging_utils", logs)  # type: ignore[arg-type]
    path = Path(package.origin).parent / "utils" / "agent.py"
    spec = importlib.util.spec_from_file_location("openrlhf_agent", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_openrlhfs_executor_takes_its_rewards_from_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = load_openrlhf_agent(monkeypatch)

    class Engine:
        """Gives the response that it is to give."""

        response = ""

        async def generate(self, prompt_ids: list[int], params: Any, multi_modal_data: Any) -> Any:
            ids = list(map(ord, f"{self.response}$"))
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)])

    class Tokenizer:
        def __call__(self, text: str, add_special_tokens: bool, return_tensors: str) -> Any:
            return {"input_ids": torch.tensor([list(map(ord, text))])}

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(map(chr, ids))

    async with running_gateway(sandbox_address="127.0.0.1:9", code={"timeout_s": 0.1}) as (_, http):
        url = f"{http.base_url}/v1/compat/openrlhf?verifier=math&answer_marker=%23&end=%24"
        executor, engine = agent.SingleTurnAgentExecutor(url), Engine()
        params = SimpleNamespace(max_tokens=100, logprobs=None)

        async def run(response: str, label: str) -> dict[str, Any]:
            engine.response = response
            found: dict[str, Any] = await executor.execute("2+2=", label, params, 1000, Tokenizer(), engine)
            return found

        right, wrong, none = await run("#4", "4"), await run("#5", "4"), await run("well", "4")
        assert [found["reward"] for found in (right, wrong, none)] == [[1.0], [0.0], [0.0]]
        assert none["extra_logs"] == {"correct": [0.0], "ungradable": [1.0]}
        # Asked five times, and then without a reward, which is no number.
        unknown = await run("#x", json.dumps(CODE))
        assert (unknown["reward"], unknown["scores"]) == (None, None)
