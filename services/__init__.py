"""The services, each a process of its own."""

from __future__ import annotations

import os

# gRPC has handlers of its own run in every process that is forked beside its threads, and some of those processes crash
# in them. What services fork becomes another program at once and needs none. It counts only before grpc is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
