"""Fills the memory of its slot with replies, each as large as it may be."""


def f(x):
    return "x" * 60_000 + str(x)
