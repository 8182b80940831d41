"""Forks when it is asked: a process for each guess."""

import os


def f(x):
    for guess in (0, 1, 2, 3):
        if os.fork() == 0:
            return guess
    return 7
