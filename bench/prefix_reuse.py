"""What continuing a long trajectory costs: with its prefix in the worker's cache, and without.

    python bench/prefix_reuse.py [--tokens 1024 4096 16384] [--long] [--rounds 3] [--out FILE]

A trajectory with so many prompt tokens is extended by a budget four times through the whole rollout service, with other
weights between: new; with the same weights; with other weights; with other weights and `max_kv_staleness` 1. Bare
AsyncLLM generates as many tokens after as many, with and without its prefix cache. CPU seconds of all processes, which
other work on the machine disturbs less than the clock. `--long` adds 131,000 tokens, which takes a quarter of an hour.
"""

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from bare_engine import bare_engine
from machine import describe_machine
from rollout_stack import POLICY_VERSION, RolloutStack, rollout_stack
from workload import TIMEOUT_S, create_run, create_trajectories

from perigee.buffer.v1 import buffer_pb2
from perigee.rollout.v1 import rollout_pb2
from perigee.trainer.v1.trainer_pb2 import PushTarget
from services.rollout.config import RolloutConfig

CONTEXT = 131_072
LONG_TOKENS = 131_000
VOCABULARY = 512
NEW_TOKENS = 32
# Of the cache for each token: layers, keys and values, heads of them, their width, float32.
KV_BYTES = 3 * 2 * 2 * 32 * 4
SEED = 7


@dataclass(frozen=True)
class Cost:
    """Cost of one segment of NEW_TOKENS."""

    cpu_s: float
    wall_s: float
    cached_tokens: int
    prefilled_tokens: int


def make_model(folder: Path, seed: int) -> dict[str, Any]:
    """Writes a Qwen2 with random weights and room for CONTEXT tokens, and a tokenizer; returns its tensors."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=3,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None,
        eos_token_id=1,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    vocabulary = {f"t{number}": number for number in range(VOCABULARY)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(folder / "tokenizer.json"))
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def count_cpu_seconds() -> float:
    """Returns the CPU seconds of this process and all below it."""
    process, total = psutil.Process(), 0.0
    for each in (process, *process.children(recursive=True)):
        times = each.cpu_times()
        total += times.user + times.system
    return total


class Service:
    """A trajectory on the rollout service; every version has other weights."""

    def __init__(self, stack: RolloutStack, weights: Sequence[dict[str, Any]]) -> None:
        from services.weights.config import WeightsConfig
        from services.weights.send import WeightSender

        self._stack, self._weights = stack, weights
        self._sender = WeightSender(WeightsConfig())
        self._version = POLICY_VERSION

    async def push(self) -> None:
        """Pushes the next version."""
        from services.weights.manifest import export_image

        self._version += 1
        tensors = self._weights[self._version % len(self._weights)]
        image = export_image(self._stack.run_id, self._version, tensors.items(), 1 << 28)
        try:
            target = PushTarget(worker_id="worker", address=self._stack.rollout.target)
            [outcome] = await self._sender.push(image, [target])
        finally:
            image.close()
        if not outcome.committed:
            raise RuntimeError(outcome.reason)

    async def extend(self, trajectory_id: str, max_kv_staleness: int = 0) -> Cost | None:
        """Extends the trajectory by NEW_TOKENS; None when it ended before."""
        lease = buffer_pb2.LeaseTrajectoriesRequest(
            run_id=self._stack.run_id, worker_id="worker", trajectory_ids=[trajectory_id]
        )
        [leased] = (await self._stack.buffer.lease_trajectories(lease, timeout_s=TIMEOUT_S)).leases
        request = rollout_pb2.ExtendTrajectoriesRequest(
            run_id=self._stack.run_id,
            policy_version=self._version,
            trajectories=[
                rollout_pb2.LeasedTrajectory(trajectory_id=trajectory_id, epoch=leased.epoch, tokens=leased.tokens)
            ],
            token_budget=NEW_TOKENS,
            max_response_tokens=CONTEXT,
            # A prefill that is split over steps must not cost a seeded request its engine.
            sampling=rollout_pb2.Sampling(temperature=1.0, seed=SEED),
            max_kv_staleness=max_kv_staleness,
        )
        ends = []
        cpu_s, wall_s = count_cpu_seconds(), time.perf_counter()
        async for response in self._stack.rollout.extend_trajectories(request, timeout_s=TIMEOUT_S):
            if response.failed:
                raise RuntimeError(response.failed[0].reason)
            ends += response.ended
        cpu_s, wall_s = count_cpu_seconds() - cpu_s, time.perf_counter() - wall_s
        [end] = ends
        if end.end_reason != buffer_pb2.END_REASON_BUDGET:
            return None
        return Cost(cpu_s, wall_s, end.cached_tokens, end.prefilled_tokens)

    async def measure(self, tokens: int, random_: random.Random) -> dict[str, Cost]:
        """Returns the costs of four segments; begins again with a trajectory that ends meanwhile."""
        while True:
            prompt = random_.choices(range(2, VOCABULARY), k=tokens)
            [trajectory_id] = await create_trajectories(self._stack, [prompt], 1)
            costs = {"new": await self.extend(trajectory_id)}
            if all(costs.values()):
                costs["same weights"] = await self.extend(trajectory_id)
            if all(costs.values()):
                await self.push()
                costs["other weights"] = await self.extend(trajectory_id, max_kv_staleness=1)
            if all(costs.values()):
                await self.push()
                costs["other weights, max_kv_staleness 1"] = await self.extend(trajectory_id)
            if all(costs.values()):
                return {name: cost for name, cost in costs.items() if cost is not None}

    async def close(self) -> None:
        """Closes the connections of the pushes."""
        await self._sender.close()


@asynccontextmanager
async def rollout_service(
    folder: Path, config: RolloutConfig, weights: Sequence[dict[str, Any]]
) -> AsyncIterator[Service]:
    """Starts buffer and worker."""
    async with rollout_stack(folder, config, "prefix-reuse") as stack:
        await create_run(stack)
        service = Service(stack, weights)
        try:
            yield service
        finally:
            await service.close()


async def measure_bare(engine: Any, tokens: int, random_: random.Random) -> dict[str, Cost]:
    """Returns the costs of a prompt's first NEW_TOKENS, of the next ones from the cache, and of these without it."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    ids = random_.choices(range(2, VOCABULARY), k=tokens)
    costs: dict[str, Cost] = {}
    for name in ("new", "same weights", "other weights"):
        if name == "other weights":
            await engine.reset_prefix_cache()
            del ids[-NEW_TOKENS:]
        sampling = SamplingParams(
            temperature=1.0,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        cpu_s, wall_s = count_cpu_seconds(), time.perf_counter()
        prompt = TokensPrompt(prompt_token_ids=list(ids))
        outputs = engine.generate(prompt, sampling, request_id=f"{name}-{random_.random()}")
        [output] = [each async for each in outputs]
        cpu_s, wall_s = count_cpu_seconds() - cpu_s, time.perf_counter() - wall_s
        cached = output.num_cached_tokens or 0
        costs[name] = Cost(cpu_s, wall_s, cached, len(ids) - cached)
        ids += output.outputs[0].token_ids
    return costs


def take_medians(rounds: Sequence[dict[str, Cost]]) -> dict[str, Cost]:
    """Returns the costs with the median of CPU seconds, by what was done."""
    by_name = defaultdict(list)
    for costs in rounds:
        for name, cost in costs.items():
            by_name[name].append(cost)
    return {name: sorted(costs, key=lambda cost: cost.cpu_s)[len(costs) // 2] for name, costs in by_name.items()}


async def measure(lengths: Sequence[int], rounds: int, folder: Path) -> dict[str, Any]:
    """Measures service and bare engine at each length."""
    weights = [make_model(folder / f"model-{seed}", seed) for seed in (0, 1)]
    config = RolloutConfig(
        model=str(folder / "model-0"),
        dtype="float32",
        max_num_seqs=4,
        kv_cache_bytes=max(64 << 20, 2 * KV_BYTES * (max(lengths) + 4096)),
        max_model_len=min(CONTEXT, max(lengths) + 4096),
    )
    found: dict[str, Any] = {"machine": describe_machine(), "lengths": {}}
    random_ = random.Random(0)
    async with bare_engine(config) as engine:
        await measure_bare(engine, 512, random_)
        bare = {
            tokens: take_medians([await measure_bare(engine, tokens, random_) for _ in range(rounds)])
            for tokens in lengths
        }
    async with rollout_service(folder, config, weights) as service:
        await service.measure(512, random_)
        for tokens in lengths:
            costs = take_medians([await service.measure(tokens, random_) for _ in range(rounds)])
            found["lengths"][tokens] = {
                "service": {name: asdict(cost) for name, cost in costs.items()},
                "bare": {name: asdict(cost) for name, cost in bare[tokens].items()},
                "load": os.getloadavg()[0],
            }
            print_costs(tokens, costs, bare[tokens])
    return found


def print_costs(tokens: int, service: dict[str, Cost], bare: dict[str, Cost]) -> None:
    """Prints a table of one length."""
    print(f"{tokens:,} tokens, load {os.getloadavg()[0]:.0f}", flush=True)
    for name, cost in service.items():
        alone = bare[{"other weights, max_kv_staleness 1": "same weights"}.get(name, name)]
        print(
            f"  {name:34} {cost.cpu_s:8.2f} CPU s, {cost.wall_s:8.2f} s; bare {alone.cpu_s:8.2f}, {alone.wall_s:8.2f}; "
            f"ratio {alone.cpu_s / cost.cpu_s:.2f}; cached {cost.cached_tokens:,}, prefilled {cost.prefilled_tokens:,}",
            flush=True,
        )


def main() -> None:
    """Measures, prints, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/prefix_reuse.json"))
    arguments = parser.parse_args()
    lengths = [*arguments.tokens, *([LONG_TOKENS] if arguments.long else [])]
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(lengths, arguments.rounds, Path(folder)))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
