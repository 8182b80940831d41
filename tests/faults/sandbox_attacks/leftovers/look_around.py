"""Looks for what another job has left."""

import ctypes
import json
import math
import os
import socket
import sys

libc = ctypes.CDLL(None, use_errno=True)
for folder, expected in (("/tmp", []), ("/box", ["main.py"]), ("/dev/shm", [])):
    if os.listdir(folder) != expected:
        print(folder, os.listdir(folder))
if libc.shmget(0x5E5A, ctypes.c_size_t(0), 0) >= 0 or libc.semget(0x5E5A, 0, 0) >= 0 or libc.msgget(0x5E5A, 0) >= 0:
    print("interprocess communication")
if libc.mq_open(b"/mine", os.O_RDWR) >= 0:
    print("a message queue")
try:
    socket.socket(socket.AF_UNIX).connect("\0perigee-left")
    print("a socket")
except OSError:
    pass
others = {int(name) for name in os.listdir("/proc") if name.isdigit()} - {1, os.getpid()}
if others:
    print("processes", others)
if "MINE" in os.environ or "/tmp" in sys.path:
    print("environment")
if len("abc") != 3 or json.dumps([1]) != "[1]" or not hasattr(math, "sqrt"):
    print("patched modules")
print("held")
