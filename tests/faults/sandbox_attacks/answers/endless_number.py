"""Answers with a value that is deep and one that is long, so that whoever reads it fails."""

import sys

sys.set_int_max_str_digits(0)


def f(x):
    value = []
    if x == 3:
        for _ in range(100_000):
            value = [value]
        return value
    return 10**6000
