"""Leaves a process that goes on writing to the file and cutting it."""

import os
import time

with open("out", "wb") as file:
    file.write(b"own" * 1000)
if os.fork() == 0:
    os.setsid()
    file = os.open("out", os.O_RDWR)
    while True:
        os.pwrite(file, b"own" * 1000, 0)
        os.ftruncate(file, 0)
time.sleep(0.05)
