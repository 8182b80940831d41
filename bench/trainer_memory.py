"""Memory and time of a training step with a large vocabulary: the head in chunks against logits of all tokens.

A step is forward and backward pass and AdamW on one micro-batch of a model with Qwen3-0.6B's widths and few layers, all
tokens in the loss. Its peak is how far resident memory rises above what the process had before the model was built; of
a process of its own for each vocabulary. What the vocabulary itself needs is taken off: weights, gradients and two
moments of the tied embedding. The forms take turns in one process; times are compared within each round.

    python -m bench.trainer_memory [--tokens 4096] [--vocabulary 151936] [--rounds 3] [--out figures.json]

Takes under five minutes and 14 GiB on two cores that are free. Exit status 1 when the step takes more than 1.25 times
the memory of one with a vocabulary of 1,000, or more than 1.1 times the time of the form with all logits.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.machine import GIB, describe_machine
from perigee.trainer.v1 import trainer_pb2 as pb

HIDDEN = 1024
SMALL_VOCABULARY = 1000
MAX_MEMORY_RATIO = 1.25
MAX_TIME_RATIO = 1.1
SEQUENCES = 4
# The first step makes the moments.
FIRST_TOKENS = 256
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class Step:
    """Peak memory over the start, and seconds by both clocks."""

    peak_gib: float
    wall_s: float
    cpu_s: float


def resident_bytes(field: str) -> int:
    """Returns VmRSS, or VmHWM since its last reset, of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def open_policy(vocabulary: int, layers: int) -> Iterator[Any]:
    """Builds a policy with random weights on this process alone."""
    from services.trainer.hf import read_model_shape
    from services.trainer.megatron.model import Policy
    from services.trainer.megatron.parallel import join_group, leave_group, megatron_on_cpu

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    with tempfile.TemporaryDirectory() as folder, megatron_on_cpu():
        config = CONFIG | {"vocab_size": vocabulary, "num_hidden_layers": layers}
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        shape = read_model_shape(Path(folder))
        policy = Policy(shape, join_group(), torch.float32, shape.max_positions)
        policy.begin_job(pb.Optimizer(learning_rate=1e-5, beta1=0.9, beta2=0.95, max_grad_norm=1.0))
        yield policy
        leave_group()


def take_step(policy: Any, tokens: int, form: str, before: int) -> Step:
    """Takes a step on one micro-batch with the head in `chunks` or `full`; `before` is the memory at the start."""
    from services.trainer.megatron import head, model
    from services.trainer.packing import TokenSequence, make_micro_batches

    class FullHead(head.Head):
        def evaluate(
            self, hidden_TD: torch.Tensor, targets_T: torch.Tensor, trained_T: torch.Tensor, *, with_entropies: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            logits_TV = (hidden_TD @ self.weight_VD.T).float()
            return -F.cross_entropy(logits_TV, targets_T, reduction="none"), torch.zeros(len(targets_T))

    length = tokens // SEQUENCES
    drawn = np.random.default_rng(0).integers(policy.shape.vocabulary, size=(SEQUENCES, length + 1))
    sequences = [TokenSequence(each, np.ones(length, np.bool_)) for each in drawn]
    batches = make_micro_batches([sequences], policy.dims.device)
    vars(model)["Head"] = head.Head if form == "chunks" else FullHead
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    start, cpu = time.monotonic(), time.process_time()
    policy.step(batches, 1.0, lambda found: (-found.logprobs_T.sum() / tokens, None), learning_rate=1e-5)
    wall_s, cpu_s = time.monotonic() - start, time.process_time() - cpu
    return Step((resident_bytes("VmHWM") - before) / GIB, wall_s, cpu_s)


def measure(vocabulary: int, forms: Sequence[str], rounds: int, tokens: int, layers: int) -> dict[str, list[Step]]:
    """Returns the steps of each form, one for each round."""
    import_module("services.trainer.preload")
    before = resident_bytes("VmRSS")
    found: dict[str, list[Step]] = {form: [] for form in forms}
    with open_policy(vocabulary, layers) as policy:
        take_step(policy, FIRST_TOKENS, forms[0], before)
        for number in range(rounds):
            # Each form goes first as often as the other, so that a drift of the machine favours neither.
            for form in forms[:: -1 if number % 2 else 1]:
                found[form].append(take_step(policy, tokens, form, before))
    return found


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    arguments = parse()
    sizes = arguments.rounds, arguments.tokens, arguments.layers
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        small = pool.submit(measure, SMALL_VOCABULARY, ["chunks"], *sizes).result()
        large = pool.submit(measure, arguments.vocabulary, ["chunks", "full"], *sizes).result()
    embedding_gib = 4 * 4 * HIDDEN / GIB

    def rest(steps: Sequence[Step], vocabulary: int) -> float:
        return max(step.peak_gib for step in steps) - embedding_gib * vocabulary

    base = rest(small["chunks"], SMALL_VOCABULARY)
    rounds = list(zip(large["chunks"], large["full"], strict=True))
    ratios = {
        "memory, chunks / small vocabulary": rest(large["chunks"], arguments.vocabulary) / base,
        "memory, full / small vocabulary": rest(large["full"], arguments.vocabulary) / base,
        "wall time, chunks / full": statistics.median(chunks.wall_s / full.wall_s for chunks, full in rounds),
        "CPU time, chunks / full": statistics.median(chunks.cpu_s / full.cpu_s for chunks, full in rounds),
    }
    # CPU seconds below the cores' wall seconds: other work took part in the measurement.
    steps = {"small vocabulary": small["chunks"], **large}
    figures = {
        "machine": describe_machine(),
        "options": {name: getattr(arguments, name) for name in ("tokens", "vocabulary", "layers")},
        "vocabulary_gib": embedding_gib * arguments.vocabulary,
        "steps": {name: [asdict(step) for step in each] for name, each in steps.items()},
        "ratios": ratios,
    }
    text = json.dumps(figures, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    if (
        ratios["memory, chunks / small vocabulary"] > MAX_MEMORY_RATIO
        or ratios["wall time, chunks / full"] > MAX_TIME_RATIO
    ):
        sys.exit(f"at most {MAX_MEMORY_RATIO} of the memory and {MAX_TIME_RATIO} of the time were to be")


if __name__ == "__main__":
    main()
