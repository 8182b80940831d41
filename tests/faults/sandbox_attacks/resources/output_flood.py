"""Writes for ever to the stream in its first argument."""

import sys

stream = getattr(sys, sys.argv[1])
while True:
    stream.write("x" * 1000)
