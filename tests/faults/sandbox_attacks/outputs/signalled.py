"""Prints the answer and dies by a signal."""

import os
import signal

print("1 2", flush=True)
os.kill(os.getpid(), signal.SIGSEGV)
