"""Ends with the exit codes by which the sandbox's own processes tell of failures."""

import os


def f(x):
    os._exit(107 + x)


if __name__ == "__main__":
    os._exit(125)
