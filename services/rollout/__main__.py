"""Starts a rollout worker: `python -m services.rollout --config recipe.yaml`."""

import gc

from services.kit.config import load_config
from services.kit.server import run
from services.rollout.config import RolloutConfig
from services.rollout.service import lifespan


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    try:
        run(load_config(RolloutConfig), lifespan)
    finally:
        # The interpreter's last collection would walk everything that the engine imported, for seconds.
        gc.freeze()


# The engine's process is spawned and imports this module again: without the guard it would start a second service.
if __name__ == "__main__":
    main()
