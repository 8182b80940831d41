"""Forks while it is loaded: two processes answer, with different guesses."""

import os

child = os.fork()


def f(x):
    return 7 if child else 8
