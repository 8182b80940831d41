"""Raises what ends an interpreter well."""


def f(x):
    raise SystemExit(0)
