"""The process that scores responses for the value-head verifier: a crash, or a kill, costs the service nothing.

It speaks JSON lines: {"id", "sequences": [token ids, ...]} on standard input; on standard output {"status": "ready"}
once, then {"id", "status": "scored", "scores": [...]} with null for a score that is no number, or {"id", "status":
"failed", "reason", "retryable"}. It ends when standard input does.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perigee.errors import PerigeeError
from services.reward.value_head.folder import read_description
from services.reward.value_head.network import ValueHead, choose_device, load_value_head, pad


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


def main() -> None:
    """Serves until standard input ends; arguments are folder, device and threads."""
    folder, device, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    # Whatever the libraries print must not reach the service's pipe.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    try:
        scorer = BatchScorer(folder, choose_device(device))
    except PerigeeError as error:
        print(f"value head: {error.message}", file=sys.stderr)
        raise SystemExit(1) from error
    write_line(replies, {"status": "ready"})
    for line in sys.stdin:
        request = json.loads(line)
        if "cancel" not in request:  # a batch cannot be taken back
            write_line(replies, answer(scorer, request["sequences"]) | {"id": request["id"]})


def answer(scorer: BatchScorer, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Returns the reply to one request."""
    try:
        scores = scorer.score(sequences)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return {"status": "failed", "reason": f"the model ran out of memory: {error}"[:300], "retryable": True}
    except (RuntimeError, IndexError) as error:  # how torch refuses what it is given
        return {"status": "failed", "reason": f"the model failed: {error}"[:300], "retryable": False}
    return {"status": "scored", "scores": [score if math.isfinite(score) else None for score in scores]}


def write_line(stream: Any, value: dict[str, Any]) -> None:
    """Writes one JSON line, at once."""
    stream.write(json.dumps(value) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
