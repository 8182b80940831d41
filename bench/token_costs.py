"""Seconds that tokens cost an engine and a trainer, by position: what `run.rollout.costs` and bench/long_tail.py want.

    python -m bench.token_costs [--model FOLDER] [--lengths 1024 4096 16384] [--batches 1 4 16] [--out costs.json]

Without a folder, the tiny model of examples/arithmetic with random weights. The engine is vLLM by itself with the
arguments of the rollout service: it prefills single sequences of each length, then samples after contexts of those
lengths that its prefix cache has, for one sequence and for more at once. The trainer takes a reference pass and an
optimizer step on single sequences. On a CPU seconds are those that its processes computed, on one thread, which other
work on the machine hardly lengthens; on a GPU those of the clock. The costs are a least-squares fit of relative errors,
the largest of which is printed. Keys of `run.rollout.costs` are printed for batches of `--batch` sequences.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil

from bench.long_tail import MeasuredCosts
from bench.machine import describe_machine

NEW_TOKENS = 64
FIRST_TOKENS = 64
# What an iteration of the arithmetic recipe spends beside rollout and training (docs/performance.md).
OTHER_S = 0.1
Measured = tuple[list[float], float]


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and those that it started."""
    found = psutil.Process()
    return sum(sum(each.cpu_times()[:2]) for each in (found, *found.children(recursive=True)))


async def measure_engine(
    model: Path, lengths: Sequence[int], batches: Sequence[int], clock: Callable[[], float]
) -> tuple[list[Measured], list[Measured]]:
    """Returns rows of (factors of the costs, seconds): of prefills, and of sampling."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    from bench.bare_engine import bare_engine
    from services.rollout.config import RolloutConfig

    longest = max(lengths) + 2 * NEW_TOKENS
    config = RolloutConfig(model=str(model), max_model_len=longest, max_num_seqs=max(batches), kv_cache_bytes=1 << 30)
    # Ids from 5 on: neither special tokens nor beyond a small vocabulary.
    prompts = (5 + np.random.default_rng(0).integers(30, size=(max(batches), max(lengths)))).tolist()
    numbers = iter(range(1 << 20))

    async with bare_engine(config) as engine:

        async def generate(prompt: list[int], new_tokens: int) -> None:
            params = SamplingParams(
                max_tokens=new_tokens,
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            async for _ in engine.generate(TokensPrompt(prompt_token_ids=prompt), params, str(next(numbers))):
                pass

        async def measure(tokens: int, new_tokens: int, batch: int = 1) -> float:
            begin = clock()
            await asyncio.gather(*(generate(prompt[:tokens], new_tokens) for prompt in prompts[:batch]))
            return clock() - begin

        await measure(FIRST_TOKENS, NEW_TOKENS)
        prefills: list[Measured] = []
        samplings: list[Measured] = []
        for tokens in sorted(lengths):
            await engine.reset_prefix_cache()
            prefills.append(([tokens, tokens * tokens / 2], await measure(tokens, 1)))
            for batch in batches:
                # Each sequence has keys and values of its own; less what it costs to sample one token.
                await measure(tokens, 1, batch)
                seconds = await measure(tokens, 1 + NEW_TOKENS, batch) - await measure(tokens, 1, batch)
                sampled = batch * NEW_TOKENS
                samplings.append(([NEW_TOKENS, sampled, sampled * (tokens + NEW_TOKENS / 2)], seconds))
    return prefills, samplings


def measure_trainer(model: Path, lengths: Sequence[int]) -> list[Measured]:
    """Returns rows of (factors, seconds) of a reference pass and a step on one sequence."""
    import torch

    from perigee.trainer.v1 import trainer_pb2 as pb
    from services.trainer.hf import read_model_shape
    from services.trainer.megatron.model import Policy
    from services.trainer.megatron.parallel import join_group, leave_group, megatron_on_cpu
    from services.trainer.packing import TokenSequence, make_micro_batches

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    torch.set_num_threads(1)
    rows: list[Measured] = []
    with megatron_on_cpu():
        shape = read_model_shape(model)
        policy = Policy(shape, join_group(), torch.float32, shape.max_positions)
        policy.begin_job(pb.Optimizer(learning_rate=1e-5, beta1=0.9, beta2=0.95, max_grad_norm=1.0))
        # The first, which is not counted, makes the moments.
        for tokens in (FIRST_TOKENS, *sorted(lengths)):
            drawn = 5 + np.random.default_rng(0).integers(30, size=tokens + 1)
            batches = make_micro_batches([[TokenSequence(drawn, np.ones(tokens, np.bool_))]], policy.dims.device)
            begin = time.process_time()
            policy.evaluate(batches, 1.0)
            policy.step(batches, 1.0, lambda found: (-found.logprobs_T.sum(), None), learning_rate=1e-5)
            rows.append(([tokens, tokens * tokens / 2], time.process_time() - begin))
        leave_group()
    return rows[1:]


def fit(rows: Sequence[Measured]) -> tuple[list[float], float]:
    """Returns the costs, none negative, with the least squared relative errors, and the largest of these."""
    factors = np.array([row for row, _ in rows])
    seconds = np.array([each for _, each in rows])
    scaled = factors / seconds[:, None]
    kept = list(range(factors.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(scaled[:, kept], np.ones(len(rows)), rcond=None)
        if (found >= 0).all():
            break
        kept.pop(int(np.argmin(found)))
    costs = np.zeros(factors.shape[1])
    costs[kept] = found
    return costs.tolist(), float(np.abs(scaled @ costs - 1).max())


def write_tiny_model(folder: Path, context: int) -> None:
    """Writes the arithmetic recipe's model with random weights and a longer context."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "arithmetic"))
    import tiny_model

    tiny_model.write_model(folder, seed=0)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"max_position_embeddings": context}
    path.write_text(json.dumps(config), encoding="utf-8")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measures, fits and prints."""
    arguments = parse()
    clock = cpu_seconds if arguments.clock == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or Path(folder)
        if arguments.model is None:
            write_tiny_model(model, max(arguments.lengths) + 4 * NEW_TOKENS)
        prefills, samplings = asyncio.run(measure_engine(model, arguments.lengths, arguments.batches, clock))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            trainings = pool.submit(measure_trainer, model, arguments.lengths).result()
    prefill, prefill_error = fit(prefills)
    sampling, sampling_error = fit(samplings)
    training, training_error = fit(trainings)
    costs = MeasuredCosts(*sampling, *prefill, *training, OTHER_S)
    figures = {
        "command": " ".join(["python -m bench.token_costs", *sys.argv[1:]]),
        "machine": describe_machine(),
        "costs": asdict(costs),
        "largest_relative_errors": {"prefill": prefill_error, "sampling": sampling_error, "training": training_error},
        "measured": {"prefill": prefills, "sampling": samplings, "training": trainings},
    }
    text = json.dumps(figures, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"run.rollout.costs in batches of {arguments.batch}: {costs.token_costs(arguments.batch)}")


if __name__ == "__main__":
    main()
