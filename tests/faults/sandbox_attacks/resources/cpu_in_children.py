"""Spreads its computing over sixteen processes, each of them below the limit."""

import os

for _ in range(4):
    try:
        os.fork()
    except OSError:
        pass
while True:
    pass
