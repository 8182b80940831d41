"""Runs a program that gets SIGTERM when the process that started it dies, however that dies.

Elsewhere than on Linux it only runs the program.

    python die_with_parent.py PARENT_PID PROGRAM ARGUMENT...

The request survives exec, and making it here spares the parent a `preexec_fn`, unsafe in a process with threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(sys.argv[1]):
            sys.exit("the parent died before the program began")
    os.execv(sys.argv[2], sys.argv[2:])
