"""Closes standard output and prints the answer where it is no more."""

import os
import sys

os.close(1)
os.open("/tmp/out", os.O_RDWR | os.O_CREAT)
print("1 2")
sys.stdout.flush()
