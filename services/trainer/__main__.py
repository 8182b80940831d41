"""Starts the trainer: `python -m services.trainer --config RECIPE`. Rank 0 serves, the others follow it."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from perigee.errors import PerigeeError
from services.kit.config import load_config
from services.trainer.config import TrainerConfig
from services.trainer.launch import die_with_parent, is_launched, launch, prepare_environment


def main() -> None:
    """Checks the model before any process is started, then becomes a rank."""
    prepare_environment()
    config = load_config(TrainerConfig)
    # Megatron warns of every accelerator library that is absent.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    try:
        if not is_launched():
            from services.trainer.hf_config import read_model_shape

            read_model_shape(Path(config.model))
            launch(config, sys.argv[1:])
        die_with_parent()
        if os.environ["RANK"] == "0":
            from services.kit.server import run
            from services.trainer.lifespan import lifespan

            run(config, lifespan)
        else:
            from services.trainer.engine import Engine

            engine = Engine(config)
            engine.follow()
            engine.close()
    except PerigeeError as error:
        print(f"trainer: {error.message}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
