"""Starts a rollout worker: `python -m services.rollout --config recipe.yaml`."""

import gc

from services.kit.config import load_config
from services.kit.server import run
from services.rollout.config import RolloutConfig
from services.rollout.fork_server import start_fork_server


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    config = load_config(RolloutConfig)
    start_fork_server(config)
    # It imports numpy, whose threads would stand in the way of the fork.
    from services.rollout.service import lifespan

    try:
        run(config, lifespan)
    finally:
        # The interpreter's last collection would walk everything that the engine imported, for seconds.
        gc.freeze()


# Processes that a GPU's engine spawns import this module again: without the guard they would start a second service.
if __name__ == "__main__":
    main()
