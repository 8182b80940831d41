"""Fills as many pipes as it may have, each made as large as it may be: the kernel's memory, not its own."""

import fcntl
import os

SET_SIZE = 1031
held = 0
try:
    while True:
        _, write = os.pipe()
        try:
            fcntl.fcntl(write, SET_SIZE, 1 << 20)
        except OSError:
            pass
        os.set_blocking(write, False)
        try:
            while True:
                held += os.write(write, b"x" * 65536)
        except BlockingIOError:
            pass
except OSError:
    pass
print("held" if held < 128 << 20 else f"took {held}")
