"""Ends at once, while its children keep every descriptor and go on."""

import os
import time


def f(x):
    for _ in range(5):
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
    os._exit(0)


if __name__ == "__main__":
    f(0)
