"""Writes rubbish into every descriptor before it is asked anything."""

import os

for descriptor in range(3, 50):
    try:
        os.write(descriptor, b"v" * 4096)
    except OSError:
        pass


def f(x):
    return 7
