"""Processes of a trainer over several machines."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from services.trainer.__main__ import torchrun_arguments
from services.trainer.config import TrainerConfig


def config(**fields: Any) -> TrainerConfig:
    return TrainerConfig(model="m", run_path="r", data_parallel=4, **fields)


def test_each_machine_starts_its_share_of_the_processes() -> None:
    nodes = config(nodes=2, node_rank=1, master_address="trainer-0", master_port=29501)
    line = " ".join(torchrun_arguments(nodes))
    assert "--nproc-per-node 2 --nnodes 2 --node-rank 1 --master-addr trainer-0 --master-port 29501" in line
    assert "--nproc-per-node 4 --standalone" in " ".join(torchrun_arguments(config()))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"nodes": 3, "master_address": "a"}, "nodes must divide the 4 processes"),
        ({"nodes": 2, "node_rank": 2, "master_address": "a"}, "node_rank must be below nodes"),
        ({"nodes": 2}, "master_address is required"),
    ],
)
def test_nodes_that_cannot_be_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        config(**fields)
