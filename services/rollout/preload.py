"""Imports everything that the process of an engine needs: seconds of CPU time, no thread, no device."""

import gc
import importlib

from vllm.platforms import current_platform

WORKER = "vllm.v1.worker.cpu_worker" if current_platform.is_cpu() else "vllm.v1.worker.gpu_worker"

# Collections would walk what is there already, again and again, for a quarter of the time.
gc.disable()
for module in ("services.rollout.vllm_engine", "vllm.v1.engine.core", WORKER):
    importlib.import_module(module)
# A collection would write to pages that forked processes share.
gc.freeze()
gc.enable()
