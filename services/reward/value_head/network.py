"""The network of a value head, its losses, and its way to and from a folder.

A Hugging Face backbone with a linear layer on the hidden state of the last token. The losses are sums, so that
micro-batches add up to the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import AutoModel
from transformers.utils import logging

from perigee.errors import InvalidArgumentError
from services.reward.value_head.folder import (
    HEAD_FILE,
    Description,
    copy_tokenizer,
    read_description,
    write_description,
    writing_folder,
)

# It speaks of the missing language-model head and draws progress bars into the log.
logging.set_verbosity_error()
logging.disable_progress_bar()


class ValueHead(nn.Module):
    """Scores: the log-odds that a response is right."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.backbone.config.use_cache = False
        self.head = nn.Linear(backbone.config.get_text_config().hidden_size, 1)
        # Small, so that training begins at a probability near a half.
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids_NT: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
        """Returns scores [N] in float32 of sequences that are padded on the right."""
        hidden_NTD = self.backbone(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
        last_N = mask_NT.sum(dim=1) - 1
        hidden_ND = hidden_NTD[torch.arange(len(last_N), device=last_N.device), last_N]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            scores_N: torch.Tensor = self.head(hidden_ND.float()).squeeze(-1)
        return scores_N


def load_backbone(folder: Path, dtype: torch.dtype) -> Any:
    """Returns the model of a folder without its language-model head; downloads nothing and runs no code of the folder.

    Raises InvalidArgumentError naming the folder, also when weights are missing in it.
    """
    try:
        backbone, info = AutoModel.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise InvalidArgumentError(f"{folder} cannot be loaded as a Hugging Face model: {text}") from error
    # transformers would fill them with random numbers. A pooler is not used.
    if missing := [name for name in sorted(info["missing_keys"]) if not name.startswith("pooler.")]:
        raise InvalidArgumentError(f"{folder} holds no weights for {missing[0]} and {len(missing) - 1} others")
    return backbone


def choose_device(name: str) -> torch.device:
    """Returns the device of a name; auto takes a GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def save_value_head(network: ValueHead, tokenizer: Path, description: Description, target: Path) -> None:
    """Writes network, tokenizer (from the folder `tokenizer`) and description as folder `target`.

    Raises ResourceExhaustedError naming the folder when the disk refuses.
    """
    with writing_folder(target) as staging:
        network.backbone.save_pretrained(staging)
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in network.head.state_dict().items()}
        save_file(head, staging / HEAD_FILE)
        copy_tokenizer(tokenizer, staging)
        write_description(staging, description)


def load_value_head(folder: Path, device: torch.device, dtype: torch.dtype) -> ValueHead:
    """Returns the network of a folder, ready to score.

    Raises InvalidArgumentError naming the file.
    """
    network = ValueHead(load_backbone(folder, dtype))
    path = folder / HEAD_FILE
    try:
        network.head.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InvalidArgumentError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error
    return network.to(device).eval()


def pad(
    sequences: Sequence[NDArray[np.int32]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids [N, T] padded on the right, and the mask [N, T] that is 1 on real tokens."""
    longest = max(len(sequence) for sequence in sequences)
    ids_NT = np.full((len(sequences), longest), pad_token_id, dtype=np.int64)
    mask_NT = np.zeros((len(sequences), longest), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids_NT[row, : len(sequence)] = sequence
        mask_NT[row, : len(sequence)] = 1
    return torch.from_numpy(ids_NT).to(device), torch.from_numpy(mask_NT).to(device)


class BatchScorer:
    """A loaded value head."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._pad_token_id = read_description(folder).pad_token_id
        self._network: ValueHead = load_value_head(folder, device, dtype)
        self._device = device

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Returns the scores of token sequences, in one forward pass."""
        rows = [np.array(sequence, dtype=np.int32) for sequence in sequences]
        scores: list[float] = self._network(*pad(rows, self._pad_token_id, self._device)).tolist()
        return scores


def pointwise_loss(scores_N: torch.Tensor, correct_N: torch.Tensor) -> torch.Tensor:
    """Returns the sum over responses of -log p(label), where the score is the log-odds that the response is right."""
    return binary_cross_entropy_with_logits(scores_N, correct_N.to(scores_N.dtype), reduction="sum")


def pairwise_loss(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> torch.Tensor:
    """Returns the sum over pairs of -log sigmoid(chosen - rejected), after Bradley and Terry (1952)."""
    return -logsigmoid(chosen_P - rejected_P).sum()
