"""Runs out of the stack of the machine, not that of the interpreter."""

import sys

sys.setrecursionlimit(1 << 30)


class Deep:
    def __getattr__(self, name):
        return getattr(self, name + "x")


def f(x):
    return Deep().x


if __name__ == "__main__":
    f(0)
