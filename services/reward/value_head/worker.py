"""The process that scores responses for the value-head verifier: a crash, or a kill, costs the service nothing.

It speaks JSON lines: {"id", "sequences": [token ids, ...]} on standard input; on standard output {"status": "ready"}
once, then {"id", "status": "scored", "scores": [...]} with null for a score that is no number, or {"id", "status":
"failed", "reason", "retryable"}. It ends when standard input does.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perigee.errors import PerigeeError

if TYPE_CHECKING:
    from services.reward.value_head.network import BatchScorer


def main() -> None:
    """Serves until standard input ends; arguments are folder, device and threads."""
    folder, device, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    # Whatever the libraries print must not reach the service's pipe.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Collections would walk what is there already, again and again, for a fifth of the time that loading takes.
    gc.disable()
    import torch

    from services.reward.value_head.network import BatchScorer, choose_device

    torch.set_num_threads(threads)
    try:
        scorer = BatchScorer(folder, choose_device(device))
    except PerigeeError as error:
        print(f"value head: {error.message}", file=sys.stderr)
        raise SystemExit(1) from error
    gc.freeze()
    gc.enable()
    write_line(replies, {"status": "ready"})
    for line in sys.stdin:
        request = json.loads(line)
        if "cancel" not in request:  # a batch cannot be taken back
            write_line(replies, answer(scorer, request["sequences"]) | {"id": request["id"]})


def answer(scorer: BatchScorer, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Returns the reply to one request."""
    import torch

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
