"""Prints the right answer and returns a verdict instead."""

import sys


def f(x):
    print(2 * x, file=sys.stdout)
    print(2 * x, file=sys.stderr)
    return "ACCEPTED"
