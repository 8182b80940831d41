"""Gives rollout workers the weights of a model folder, as a trainer would."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perigee.errors import InvalidArgumentError, UnavailableError
from perigee.rpc import ChannelOptions
from perigee.weights.client import WeightReceiverClient

if TYPE_CHECKING:
    import torch

RUN_ID = "curation"
SHARD_BYTES = 256 << 20


async def push_weights(model: Path, addresses: Sequence[str], channel: ChannelOptions) -> None:
    """Pushes the folder's weights to all workers, as policy version 0.

    Raises InvalidArgumentError when the folder has none, UnavailableError naming the workers that did not take them.
    """
    from perigee.trainer.v1.trainer_pb2 import PushTarget
    from services.weights.config import WeightsConfig
    from services.weights.manifest import export_image
    from services.weights.send import WeightSender

    sender = WeightSender(WeightsConfig(), lambda address: WeightReceiverClient(address, channel))
    image = export_image(RUN_ID, 0, _read_tensors(model), SHARD_BYTES)
    try:
        outcomes = await sender.push(image, [PushTarget(worker_id=address, address=address) for address in addresses])
    finally:
        image.close()
        await sender.close()
    if reasons := [f"{outcome.worker_id}: {outcome.reason}" for outcome in outcomes if not outcome.committed]:
        raise UnavailableError(f"the weights of {model} were not taken by {'; '.join(reasons)}")


def _read_tensors(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise InvalidArgumentError.of("--model", f"{model} holds no *.safetensors to push")
    for file in files:
        with safe_open(os.fspath(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no mapping
                yield name, tensors.get_tensor(name)
