"""Closes every descriptor while it is loaded, and puts files and folders in their places."""

import os

for descriptor in range(50):
    try:
        os.close(descriptor)
    except OSError:
        pass
for _ in range(8):
    os.open("/box", os.O_RDONLY)
    os.open("/box/empty", os.O_CREAT | os.O_RDWR)


def f(x):
    return 7
