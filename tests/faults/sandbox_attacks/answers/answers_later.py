"""Answers with something that would change its mind: a generator, an object of another thread."""

import threading


def f(x):
    answer = []
    threading.Timer(0.05, answer.append, [2 * x]).start()
    return (item for item in answer) if x == 3 else answer
