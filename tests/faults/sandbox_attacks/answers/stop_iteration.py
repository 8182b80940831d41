"""Raises what ends loops, generators and tasks quietly."""


def f(x):
    raise StopIteration(2 * x) if x == 3 else GeneratorExit
