"""Starts the coordinator: `python -m services.coordinator --config recipe.yaml`."""

from services.coordinator.config import CoordinatorConfig
from services.coordinator.lifespan import lifespan
from services.kit.config import load_config
from services.kit.server import run


def main() -> None:
    """Runs until SIGTERM or SIGINT."""
    run(load_config(CoordinatorConfig), lifespan)


if __name__ == "__main__":
    main()
