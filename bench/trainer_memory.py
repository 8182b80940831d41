"""Memory and time of a training step with a large vocabulary: the head in chunks against logits of all tokens.

Peak memory of an optimizer step (forward, backward, AdamW) is how far the process's resident memory rises above what it
was before the model was built, in a process of its own for each row. What the vocabulary itself needs is taken off:
weights, gradients and two moments of the tied embedding. Times are of steps of both forms in turn, in one process.

    python -m bench.trainer_memory [--tokens 4096] [--vocabulary 151936] [--prompt-share 0] [--out figures.json]

Ends with exit status 1 when the step takes more than 1.25 times the memory of one with a vocabulary of 1,000, or more
than 1.1 times the time of the form with all logits.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.machine import GIB, describe_machine
from perigee.trainer.v1 import trainer_pb2 as pb
from services.trainer.__main__ import import_megatron

SMALL_VOCABULARY = 1000
MAX_MEMORY_RATIO = 1.25
MAX_TIME_RATIO = 1.1
SEQUENCES = 4


def resident_bytes(field: str) -> int:
    """Returns VmRSS, or VmHWM since its last reset, of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def open_policy(vocabulary: int, layers: int) -> Iterator[Any]:
    """Builds a policy of Qwen3-0.6B's widths with random weights, on this process alone."""
    import_megatron()
    from services.trainer.hf import ModelShape
    from services.trainer.megatron.model import Policy
    from services.trainer.megatron.parallel import join_group, leave_group, megatron_on_cpu

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    shape = ModelShape(
        architecture="qwen3",
        layers=layers,
        hidden=1024,
        ffn_hidden=3072,
        heads=16,
        query_groups=8,
        head_width=128,
        vocabulary=vocabulary,
        max_positions=32768,
        norm_epsilon=1e-6,
        qkv_bias=False,
        qk_norm=True,
        tied=True,
        eos_token_id=0,
        inverse_frequencies_D=1e6 ** -(torch.arange(0, 128, 2) / 128),
    )
    with megatron_on_cpu():
        policy = Policy(shape, join_group(1, 1, 1, 0), torch.float32, shape.max_positions)
        policy.begin_job(pb.Optimizer(learning_rate=1e-5, beta1=0.9, beta2=0.95, max_grad_norm=1.0))
        yield policy
        leave_group()


def take_step(policy: Any, tokens: int, prompt_share: float, form: str) -> tuple[float, float]:
    """Takes a step on one micro-batch with the head in `chunks` or `full`; returns wall and CPU seconds."""
    from services.trainer.megatron import head, model
    from services.trainer.packing import TokenSequence, make_micro_batches

    class FullHead(head.Head):
        def logprobs(self, hidden_TD: torch.Tensor, targets_T: torch.Tensor, trained_T: torch.Tensor) -> torch.Tensor:
            logits_TV = (hidden_TD @ self.weight_VD.T).float()
            return -F.cross_entropy(logits_TV, targets_T, reduction="none")

    generator = np.random.default_rng(0)
    length = tokens // SEQUENCES
    trained_T = np.arange(length) >= prompt_share * length
    drawn = generator.integers(policy.shape.vocabulary, size=(SEQUENCES, length + 1))
    batches = make_micro_batches([[TokenSequence(each, trained_T) for each in drawn]], policy.dims.device)
    vars(model)["Head"] = head.Head if form == "chunks" else FullHead
    start, cpu = time.monotonic(), time.process_time()
    policy.step(
        batches,
        1.0,
        lambda batch, logprobs_T: (-(logprobs_T * batch.trained_T).sum() / tokens, None),
        learning_rate=1e-5,
    )
    return time.monotonic() - start, time.process_time() - cpu


def measure_memory(arguments: argparse.Namespace, form: str) -> dict[str, float]:
    """Returns the peak of a step, the vocabulary's own part of it and what the trainer counts, in GiB."""
    import_megatron()
    before = resident_bytes("VmRSS")
    with open_policy(arguments.vocabulary, arguments.layers) as policy:
        # The first step makes the moments.
        take_step(policy, arguments.tokens, arguments.prompt_share, form)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        take_step(policy, arguments.tokens, arguments.prompt_share, form)
        peak = resident_bytes("VmHWM") - before
        own = 4 * 4 * arguments.vocabulary * policy.shape.hidden
        figures = {"peak": peak, "vocabulary": own, "rest": peak - own} | policy.count_copies()
    return {name: round(value / GIB, 3) for name, value in figures.items()}


def measure_time(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Returns the wall and CPU seconds of each step of each form."""
    found: dict[str, dict[str, list[float]]] = {form: {"wall_s": [], "cpu_s": []} for form in ("chunks", "full")}
    with open_policy(arguments.vocabulary, arguments.layers) as policy:
        take_step(policy, arguments.tokens, arguments.prompt_share, "chunks")
        for number in range(arguments.rounds):
            # Each form goes first as often as the other, so that a drift of the machine favours neither.
            for form in list(found)[:: -1 if number % 2 else 1]:
                wall, cpu = take_step(policy, arguments.tokens, arguments.prompt_share, form)
                found[form]["wall_s"].append(round(wall, 2))
                found[form]["cpu_s"].append(round(cpu, 2))
    return found


def run_part(part: str, arguments: argparse.Namespace, vocabulary: int) -> Any:
    """Measures a part in a process of its own."""
    names = ("tokens", "layers", "prompt_share", "rounds")
    options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]
    command = [sys.executable, "-m", "bench.trainer_memory", f"--part={part}", f"--vocabulary={vocabulary}", *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt-share", type=float, default=0.0, help="tokens of each sequence outside the loss")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=("chunks", "full", "time"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measures and prints."""
    arguments = parse()
    if arguments.part:
        part = arguments.part
        print(json.dumps(measure_time(arguments) if part == "time" else measure_memory(arguments, part)))
        return
    vocabulary = arguments.vocabulary
    memory = {
        "small vocabulary": run_part("chunks", arguments, SMALL_VOCABULARY),
        "chunks": run_part("chunks", arguments, vocabulary),
        "full": run_part("full", arguments, vocabulary),
    }
    seconds = run_part("time", arguments, vocabulary)
    ratios = {
        "memory, chunks / small vocabulary": memory["chunks"]["rest"] / memory["small vocabulary"]["rest"],
        "memory, full / small vocabulary": memory["full"]["rest"] / memory["small vocabulary"]["rest"],
    } | {
        f"{clock}, chunks / full": statistics.median(seconds["chunks"][clock])
        / statistics.median(seconds["full"][clock])
        for clock in ("wall_s", "cpu_s")
    }
    # Fewer cores than the machine has: other work took part in the measurement, and wall seconds are of both.
    cores = {
        form: [round(cpu / wall, 2) for wall, cpu in zip(each["wall_s"], each["cpu_s"], strict=True)]
        for form, each in seconds.items()
    }
    figures = {
        "machine": describe_machine(),
        "options": {name: getattr(arguments, name) for name in ("tokens", "vocabulary", "layers", "prompt_share")},
        "memory_gib": memory,
        "seconds": seconds,
        "cores_used": cores,
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
    }
    text = json.dumps(figures, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    if (
        ratios["memory, chunks / small vocabulary"] > MAX_MEMORY_RATIO
        or ratios["wall_s, chunks / full"] > MAX_TIME_RATIO
    ):
        sys.exit(f"at most {MAX_MEMORY_RATIO} of the memory and {MAX_TIME_RATIO} of the time were to be")


if __name__ == "__main__":
    main()
