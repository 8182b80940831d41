"""Leaves processes that go on exchanging a file with a link, and a folder with a linked one, by one atomic call."""

import ctypes
import os
import platform
import sys
import time

RENAMEAT2 = {"x86_64": 316, "aarch64": 276}[platform.machine()]
HERE, EXCHANGE = -100, 2
libc = ctypes.CDLL(None, use_errno=True)
folder, name = os.path.split(sys.argv[1])
os.mkdir("folder")
for path in ("out", f"folder/{name}"):
    with open(path, "w") as file:
        file.write("own")
os.symlink(sys.argv[1], "other")
os.symlink(folder, "other_folder")
for left, right in ((b"out", b"other"), (b"folder", b"other_folder")):
    if os.fork() == 0:
        os.setsid()
        number, here, exchange = map(ctypes.c_long, (RENAMEAT2, HERE, EXCHANGE))
        while True:
            libc.syscall(number, here, left, here, right, exchange)
time.sleep(0.05)
