"""PID 1 of a crun container: the agent, with the socket as standard input and the cgroup's files as descriptors 3 to
6.
"""

from __future__ import annotations

import os
import socket
import sys

from . import kernel
from .agent import become_agent
from .child import Confinement
from .limits import HOME
from .seccomp import build_filter
from .usage import UsageFiles

FIRST_USAGE_DESCRIPTOR = 3


def main() -> None:
    """Arguments: the slot's user id, the cgroup version."""
    uid, version = int(sys.argv[1]), int(sys.argv[2])
    kernel.drop_bounding_capabilities()
    usage = UsageFiles(version, *range(FIRST_USAGE_DESCRIPTOR, FIRST_USAGE_DESCRIPTOR + 4))
    confinement = Confinement(HOME, uid, build_filter(), bound_address_space=False, fresh_mounts=True)
    become_agent(socket.socket(fileno=os.dup(0)), confinement, usage, resident=False)
