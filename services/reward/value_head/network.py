"""The network: a Hugging Face backbone and a linear layer on the hidden state of the last token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel
from transformers.utils import logging

from perigee.errors import InvalidArgumentError

# It speaks of the missing language-model head and draws progress bars into the log.
logging.set_verbosity_error()  # type: ignore[no-untyped-call]
logging.disable_progress_bar()  # type: ignore[no-untyped-call]


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
        """Scores [N] in float32 of sequences that are padded on the right."""
        hidden_NTD = self.backbone(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
        last_N = mask_NT.sum(dim=1) - 1
        hidden_ND = hidden_NTD[torch.arange(len(last_N), device=last_N.device), last_N]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            scores_N: torch.Tensor = self.head(hidden_ND.float()).squeeze(-1)
        return scores_N


def load_backbone(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a folder without its language-model head; nothing is downloaded and no code of the folder is run.

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
    """The device of a name; auto takes a GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
