"""Starts a rollout worker: `python -m services.rollout --config recipe.yaml`."""

from services.kit.config import load_config
from services.kit.server import run
from services.rollout.config import RolloutConfig
from services.rollout.lifespan import lifespan


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    run(load_config(RolloutConfig), lifespan)


# The engine's process is spawned and imports this module again: without the guard it would start a second service.
if __name__ == "__main__":
    main()
