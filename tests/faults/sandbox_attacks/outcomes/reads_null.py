"""Crashes the interpreter."""

import ctypes


def f(x):
    return ctypes.string_at(0)


if __name__ == "__main__":
    f(0)
