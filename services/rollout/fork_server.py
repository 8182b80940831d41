"""Process that has imported vLLM and forks the engines, which start in a quarter of the CPU time of a new interpreter.

It is the fork server of `multiprocessing`. A service forks it from itself before its first thread, so that one import
serves both; one that was lost is started anew by the next engine, and imports for itself. It ends with the service, and
the engines with it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing import context, forkserver, resource_tracker, util
from pathlib import Path
from typing import Any

from services.kit.process import die_with_parent
from services.rollout.config import RolloutConfig

PRELOAD = "services.rollout.preload"
_SERVER: Any = forkserver._forkserver
_UTIL: Any = util


class EngineProcess(context.ForkServerProcess):
    """Process with the environment that this one has at its start; it dies with the fork server."""

    def start(self) -> None:
        """Forks it; starts a fork server first where none runs."""
        forkserver.set_forkserver_preload([PRELOAD])
        forkserver.ensure_running()
        self._server_pid = _SERVER._forkserver_pid
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        """Runs the target, in the new process."""
        # The fork server lives for as long as somebody holds this pipe: nobody but the service shall.
        os.close(_SERVER._forkserver_alive_fd)
        die_with_parent(self._server_pid)
        # What stays is not written again: the process could not rename itself then.
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        os.environ.update(self._environment.items() - os.environ.items())
        super().run()


class EngineContext(context.ForkServerContext):
    """Context of `multiprocessing` whose processes are engines."""

    Process = EngineProcess


def engine_environment(config: RolloutConfig) -> dict[str, str]:
    """Returns the environment variables that vLLM and its libraries read, some when they are imported."""
    devices = {} if config.visible_devices is None else {"CUDA_VISIBLE_DEVICES": config.visible_devices}
    return devices | {
        "OMP_NUM_THREADS": str(config.engine_threads),
        # Pinned threads of several workers would share a core while others idle.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        # A CPU's kernels are compiled for every shape, and oneDNN would keep a thousand: hundreds of MiB in the end.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32"),
        # Eager engines would still compile the logprob kernels on the first request, for 20 seconds.
        **({"TORCHDYNAMO_DISABLE": "1"} if config.enforce_eager else {}),
    }


def start_fork_server(config: RolloutConfig) -> None:
    """Imports vLLM into this process and forks the server from it; to be called before the first thread.

    SIGTERM and SIGINT end the process at once meanwhile. Where an import has started a thread or taken a GPU, a fork
    would not be sound, and the first engine starts a server that imports for itself.
    """
    os.environ.update(engine_environment(config))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    importlib.import_module(PRELOAD)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if len([*Path("/proc/self/task").iterdir()]) > 1 or sys.modules["torch"].cuda.is_initialized():
        return
    forkserver.set_forkserver_preload([PRELOAD])
    # The server alone is to be forked.
    resource_tracker.ensure_running()
    spawn, _UTIL.spawnv_passfds = _UTIL.spawnv_passfds, _fork_instead
    try:
        forkserver.ensure_running()
    finally:
        _UTIL.spawnv_passfds = spawn


def _fork_instead(path: bytes, command: Sequence[str], keep: Sequence[int]) -> int:
    """Runs the program of a `python -c` in a fork of this process, with the descriptors that it would get."""
    pid = os.fork()
    if pid:
        return pid
    try:
        # The caller's, who is not in this process.
        _SERVER._lock.release()
        # A signal to the service's group, as of Ctrl-C, is for the service, which drains the engines.
        os.setpgrp()
        for low, high in pairwise((2, *sorted(keep), os.sysconf("SC_OPEN_MAX"))):
            os.closerange(low + 1, high)
        exec(command[-1], {})
    finally:
        os._exit(0)
