"""Answers with what compares oddly: not a number, an infinity, an endless integer."""


def f(x):
    return float("nan") if x == 3 else float("inf")
