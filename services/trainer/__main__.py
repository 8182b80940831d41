"""Starts the trainer: `python -m services.trainer --config RECIPE`.

One process serves and trains; several are torchrun's workers, of which rank 0 serves and the others follow it.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path

from perigee.errors import PerigeeError
from services.kit.config import load_config
from services.kit.hf import fetch_model
from services.kit.process import die_with_parent
from services.trainer.config import TrainerConfig


def main() -> None:
    """Checks the model before any process is started, then becomes a rank."""
    # Read by torch when it is loaded. OpenMP threads that spin while they wait slow training down several times when
    # other services share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    config = load_config(TrainerConfig)
    if config.network_interface is not None:
        os.environ |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), config.network_interface)
    if config.visible_devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = config.visible_devices
    # A GPU with several queues may begin the computation behind a collective before it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Megatron warns of every accelerator library that is absent.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    try:
        # Before ranks are started, which find the copy of a URL; a rank that was started by others makes its own.
        model = fetch_model(config.model, "trainer.model", config.rope, weights=True)
        config = config.model_copy(update={"model": model})
        if "RANK" not in os.environ:
            from services.trainer.hf import read_model_shape

            read_model_shape(Path(config.model))
            launch(config, sys.argv[1:])
        become_rank(config)
    except PerigeeError as error:
        print(f"trainer: {error.message}", file=sys.stderr)
        raise SystemExit(1) from error


def become_rank(config: TrainerConfig) -> None:
    """Serves as rank 0, or follows it as another rank; returns when the trainer ends."""
    if config.world > 1:
        # The ranks die with torchrun, so that none is orphaned.
        die_with_parent(os.getppid())
    # Collections would walk what is there already, again and again, and the one before an offload need not, either.
    gc.disable()
    import_module("services.trainer.preload")
    if os.environ["RANK"] == "0":
        from services.kit.server import run
        from services.trainer.service import lifespan

        serve = partial(run, config, lifespan)
    else:
        from services.trainer.engine import follow

        serve = partial(follow, config)
    gc.freeze()
    gc.enable()
    serve()


def launch(config: TrainerConfig, arguments: list[str]) -> None:
    """Makes this process rank 0 of one, or replaces it with torchrun, which starts this module again in each rank."""
    if config.world == 1:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        return
    if config.nodes == 1:
        # A host name need not resolve, and on one machine the ranks speak over loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.execv(sys.executable, [sys.executable, *torchrun_arguments(config), "-m", "services.trainer", *arguments])


def torchrun_arguments(config: TrainerConfig) -> list[str]:
    """Returns how Python starts torchrun for the processes of this machine."""
    arguments = ["-m", "torch.distributed.run", "--nproc-per-node", str(config.world // config.nodes)]
    if config.nodes == 1:
        return [*arguments, "--standalone"]
    arguments += ["--nnodes", str(config.nodes), "--node-rank", str(config.node_rank)]
    return [*arguments, "--master-addr", str(config.master_address), "--master-port", str(config.master_port)]


if __name__ == "__main__":
    main()
