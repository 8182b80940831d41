"""Value heads to and from folders."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from perigee.errors import InvalidArgumentError
from services.reward.value_head.folder import (
    HEAD_FILE,
    Description,
    copy_tokenizer,
    write_description,
    writing_folder,
)
from services.reward.value_head.network import ValueHead, load_backbone


def save_value_head(network: ValueHead, tokenizer: Path, description: Description, target: Path) -> None:
    """Writes network, tokenizer (from the folder `tokenizer`) and description as folder `target`.

    Raises ResourceExhaustedError naming the folder when the disk refuses.
    """
    with writing_folder(target) as aside:
        network.backbone.save_pretrained(aside)
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in network.head.state_dict().items()}
        save_file(head, aside / HEAD_FILE)
        copy_tokenizer(tokenizer, aside)
        write_description(aside, description)


def load_value_head(folder: Path, device: torch.device, dtype: torch.dtype) -> ValueHead:
    """The network of a folder, ready to score.

    Raises InvalidArgumentError naming the file.
    """
    network = ValueHead(load_backbone(folder, dtype))
    path = folder / HEAD_FILE
    try:
        network.head.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InvalidArgumentError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error
    return network.to(device).eval()
