"""Starts the buffer service."""

from services.buffer.config import BufferConfig
from services.buffer.service import lifespan
from services.kit.config import load_config
from services.kit.server import run


def main() -> None:
    """Serves until SIGTERM."""
    run(load_config(BufferConfig), lifespan)


if __name__ == "__main__":
    main()
