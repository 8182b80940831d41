"""Weights from trainers into engines by pull: log-probabilities, bytes that each process takes, memory of both sides.

    python -m bench.weights_matrix [--hidden 128] [--layers 4] [--dtype float32] [--cases dense-1,dense-2,experts]

Each case starts a trainer of several processes, trains it for two steps, has an engine pull the version, and scores
random sequences there and in an engine of as many processes that vLLM has load the trainer's exported folder by itself:

    dense-1    tensor parallelism 2, pipeline parallelism 2, into an engine of one process
    dense-2    the same, into an engine of tensor parallelism 2
    experts    a mixture of experts on two replicas that divide the experts, into an engine of one process

Prints JSON. `from_one_process` is the difference from such an engine of one process, which adds up in another order.
Bytes are those of the whole checkpoint, of the pull, and of what each process of the engine takes of it. `stall_s` is
how long the engine stood still: for the first load, for one of weights of which all have changed, one matrix has, and
none has. Memory is the growth of the peak, shared pages included, at the first version and at the second: of each rank
while it exports, of the receiving process while it pulls. Exit status 1 when a log-probability is off by more than
1e-5.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load_file

from bench.machine import describe_machine
from bench.rollout_stack import fine_tune, start_service
from perigee.cli.stack import HOST, pick_ports, wait_ready
from perigee.trainer.client import TrainerClient
from perigee.trainer.v1 import trainer_pb2
from perigee.weights.v1 import weights_pb2
from services.rollout import vllm_engine
from services.rollout.config import RolloutConfig
from services.rollout.model import open_policy
from services.rollout.vllm_engine import VllmEngine, join_slices
from services.rollout.worker import score_prompt
from services.weights.config import WeightsConfig
from services.weights.manifest import WeightImage
from services.weights.pieces import place_pieces
from services.weights.receive import WeightReceiver
from tests.fixtures.trainer import VOCABULARY, write_model

RUN = "bench"
LARGEST_DIFFERENCE = 1e-5
LENGTHS = (2, 17, 60, 100)
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Case:
    """A model, the parallel sizes of its trainer, and of the engine."""

    architecture: str
    shape: dict[str, Any]
    trainer: dict[str, int]
    engine: int


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
SPLIT = {"tensor_parallel": 2, "pipeline_parallel": 2}
CASES = {
    "dense-1": Case("Qwen2", {}, SPLIT, 1),
    "dense-2": Case("Qwen2", {}, SPLIT, 2),
    "experts": Case("Qwen3Moe", EXPERTS, {"data_parallel": 2, "expert_parallel": 2}, 1),
}


@dataclass
class Trainer:
    """A trainer in processes of its own."""

    client: TrainerClient
    ranks: Sequence[psutil.Process]
    dataset: Path
    version: int = 0

    async def train(self) -> None:
        """Takes two supervised steps."""
        await fine_tune(self.client, RUN, self.dataset, self.version + 1)
        self.version += 1


@asynccontextmanager
async def running_trainer(folder: Path, model: Path, settings: dict[str, Any]) -> AsyncIterator[Trainer]:
    """Starts the service and its ranks."""
    dataset = folder / "sft.jsonl"
    dataset.write_text("".join(json.dumps({"prompt": f"{i}", "response": "1 2 3"}) + "\n" for i in range(16)))
    [port] = pick_ports(1)
    process = await start_service(
        folder, "trainer", port, settings | {"model": str(model), "run_path": str(folder / "run"), "threads": 1}
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(process.stop)
        await wait_ready(process, f"{HOST}:{port}", "")
        family = psutil.Process(process.pid).children(recursive=True)
        ranks = [each for each in family if "services.trainer" in each.cmdline() and "RANK" in each.environ()]
        client = await stack.enter_async_context(TrainerClient.connect(f"{HOST}:{port}"))
        yield Trainer(client, ranks, dataset)


class PeakGrowth:
    """Growth of the peak memory of a process within a block, bytes."""

    def __init__(self, pid: int) -> None:
        self._process = Path(f"/proc/{pid}")
        self.bytes = 0

    def __enter__(self) -> PeakGrowth:
        # The kernel then begins a new peak.
        (self._process / "clear_refs").write_text("5")
        self._before = self._read("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self._read("VmHWM") - self._before

    def _read(self, field: str) -> int:
        lines = (self._process / "status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


@asynccontextmanager
async def running_engine(model: Path, dtype: str, processes: int, loads: bool = False) -> AsyncIterator[VllmEngine]:
    """Starts an engine, which vLLM has load the model's folder where it `loads`."""
    config = RolloutConfig(
        model=str(model),
        dtype=dtype,
        kv_cache_bytes=64 << 20,
        tensor_parallel_size=processes,  # type: ignore[arg-type]
    )
    engine = VllmEngine(config, open_policy(str(model), None))
    make_arguments = vllm_engine.engine_arguments

    def make_loading_arguments(*arguments: Any) -> Any:
        made = make_arguments(*arguments)
        made.load_format = "auto" if loads else made.load_format
        return made

    vllm_engine.engine_arguments = make_loading_arguments
    try:
        await engine.start()
    finally:
        vllm_engine.engine_arguments = make_arguments
    try:
        if loads:
            # An update of nothing names the version.
            assert engine._llm is not None
            await engine._llm.start_weight_update()
            await engine._llm.finish_weight_update(weight_version="0")
        yield engine
    finally:
        await engine.stop()


async def score(engine: VllmEngine) -> list[float]:
    """Returns the log-probabilities of random sequences."""
    generator = np.random.default_rng(0)
    found: list[float] = []
    for length in LENGTHS:
        found += await score_prompt(engine, generator.integers(0, VOCABULARY, length).tolist())
    return found


async def measure(case: Case, folder: Path, hidden: int, layers: int, dtype: str) -> dict[str, Any]:
    """Runs a case and returns its figures."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 2 * hidden}
    heads = {"num_attention_heads": hidden // 64, "head_dim": 64}
    model = write_model(folder / "model", case.architecture, tied=False, **(sizes | heads | case.shape))
    stalls: list[float] = []

    async def commit(image: WeightImage) -> None:
        stalls.append(await engine.update_weights(image))

    async with AsyncExitStack() as stack:
        trainer = await stack.enter_async_context(running_trainer(folder, model, case.trainer | {"dtype": dtype}))
        engine = await stack.enter_async_context(running_engine(model, dtype, case.engine))
        receiver = WeightReceiver(WeightsConfig(), commit, find_slices=engine.find_slices)
        await receiver.start()
        stack.push_async_callback(receiver.close)
        exporting, receiving = [], []
        for _ in range(2):
            await trainer.train()
            with ExitStack() as growing:
                exporting.append([growing.enter_context(PeakGrowth(rank.pid)) for rank in trainer.ranks])
                request = trainer_pb2.PublishWeightsRequest(run_id=RUN, policy_version=trainer.version)
                published = await trainer.client.publish_weights(request)
            with PeakGrowth(os.getpid()) as growth:
                receiving.append(growth)
                request = weights_pb2.PullRequest(image_id=published.image_id, sources=[published.source])
                pulled = await receiver.Pull(request, None)
        exported = await trainer.client.export_model(trainer_pb2.ExportModelRequest(run_id=RUN, path=f"{folder}/out"))
        found = await score(engine)
        image = receiver.current
        assert image is not None
        matrix = next(i for i, each in enumerate(image.manifest.tensors) if each.name.endswith("down_proj.weight"))
        next(each for each in image.manifest.pieces if each.tensor == matrix).checksum = bytes(16)
        await commit(image)
        await commit(image)
        taken = await count_taken(engine, image.manifest)
    differences = {}
    for processes in sorted({1, case.engine}):
        async with running_engine(Path(exported.path), dtype, processes, loads=True) as engine:
            expected = await score(engine)
        differences[processes] = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    return {
        "largest_difference": differences[case.engine],
        "from_one_process": differences[1],
        "checkpoint_bytes": sum(each.nbytes for each in load_file(f"{exported.path}/{WEIGHTS_FILE}").values()),
        "pulled_bytes": pulled.bytes,
        "taken_bytes": taken,
        "pull_s": round(pulled.transfer_seconds, 3),
        "stall_s": [round(each, 3) for each in stalls],
        "rank_growth_bytes": [[each.bytes for each in growths] for growths in exporting],
        "receiver_growth_bytes": [each.bytes for each in receiving],
    }


async def count_taken(engine: VllmEngine, manifest: weights_pb2.Manifest) -> list[int]:
    """Returns the bytes of the pieces that each process of an engine takes anything of."""
    assert engine._llm is not None
    tensors = weights_pb2.Manifest(tensors=manifest.tensors).SerializeToString()
    found = await engine._llm.collective_rpc("find_slices", args=(tensors,))
    return [place_pieces(manifest, join_slices([each])).total_bytes for each in found]


async def main() -> int:
    """Runs the cases and prints their figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cases", default=",".join(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": describe_machine()}
    largest = 0.0
    for name in options.cases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = await measure(CASES[name], Path(folder), options.hidden, options.layers, options.dtype)
        print(json.dumps({name: results[name]}), file=sys.stderr, flush=True)
        largest = max(largest, results[name]["largest_difference"])
    print(json.dumps(results, indent=2))
    return int(not largest <= LARGEST_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
