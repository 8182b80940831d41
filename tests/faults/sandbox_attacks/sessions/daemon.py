"""Leaves a process that goes on writing to whatever it has open."""

import os
import time

if os.fork() == 0:
    os.setsid()
    while True:
        for descriptor in range(1, 64):
            try:
                os.write(descriptor, b"flood")
            except OSError:
                pass
        time.sleep(0.001)
