"""Starts the trainer's processes: one is this process itself, several are torchrun's workers."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from perigee.errors import UnavailableError
from services.trainer.config import TrainerConfig

_PR_SET_PDEATHSIG = 1


def is_launched() -> bool:
    """Whether this process is one of the ranks."""
    return "RANK" in os.environ


def prepare_environment() -> None:
    """Sets what torch reads when it is loaded, so this comes before any import of it."""
    # OpenMP threads that spin while they wait slow training down several times when other services share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def launch(config: TrainerConfig, arguments: list[str]) -> None:
    """Makes this process rank 0 of one, or replaces it with torchrun, which starts this module again in each rank."""
    if config.world == 1:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        return
    # A host name need not resolve, and on one machine the ranks speak over loopback.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.world)]
    os.execv(sys.executable, [*torchrun, "-m", "services.trainer", *arguments])


def die_with_parent() -> None:
    """Has the kernel kill this rank when torchrun dies, so that no rank is orphaned."""
    if os.environ["WORLD_SIZE"] == "1":
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0 or parent == 1:
        raise UnavailableError("torchrun is gone, or the kernel refuses PR_SET_PDEATHSIG")
