"""Floods standard output from children while the parent sleeps."""

import os
import time

for _ in range(4):
    if os.fork() == 0:
        while True:
            os.write(1, b"x" * 1000)
time.sleep(60)
