"""A rollout worker that ends each response at a lognormal length, drawn by its trajectory's id.

    python -m bench.forced_lengths MEDIAN SIGMA --config RECIPE ...

All else is as it is: the engine samples every token, and only the end of a segment is moved to the length, where the
response stops. Trajectories of the same id have the same length.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections.abc import AsyncGenerator

from perigee.buffer.v1 import buffer_pb2
from services.kit.config import load_config
from services.kit.server import run
from services.rollout.config import RolloutConfig
from services.rollout.fork_server import start_fork_server


def draw_length(trajectory_id: str, median: float, sigma: float) -> int:
    """Returns the response tokens of a trajectory."""
    return max(1, round(random.Random(trajectory_id).lognormvariate(math.log(median), sigma)))


def force_lengths(median: float, sigma: float) -> None:
    """Has the rollout service in this process extend trajectories to their lengths at most."""
    from services.rollout import extend
    from services.rollout.engine import Engine
    from services.rollout.segment import Segment, SegmentSettings, generate_segment

    def generate(engine: Engine, segment: Segment, settings: SegmentSettings) -> AsyncGenerator[buffer_pb2.Chunk, None]:
        length = draw_length(segment.item_id, median, sigma)
        if length <= segment.end_tokens:
            segment.end_tokens, segment.end_reason = length, buffer_pb2.END_REASON_STOP
        return generate_segment(engine, segment, dataclasses.replace(settings, stop_token_ids=()))

    extend.generate_segment = generate  # type: ignore[attr-defined]


def main() -> None:
    """Serves as the service's own `main` does."""
    median, sigma, *arguments = sys.argv[1:]
    config = load_config(RolloutConfig, arguments)
    start_fork_server(config)
    # It imports numpy, whose threads would stand in the way of the fork.
    from services.rollout.service import lifespan

    force_lengths(float(median), float(sigma))
    run(config, lifespan)


# A process that a GPU's engine spawns imports this module again.
if __name__ == "__main__":
    main()
