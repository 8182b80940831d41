"""Closes every descriptor and puts others in their place."""

import os


def f(x):
    os.closerange(0, 256)
    for _ in range(8):
        os.open("/dev/zero", os.O_RDWR)
    return 7
