"""Computes for ever in a child and waits for it."""

import os

if os.fork():
    os.wait()
while True:
    pass
