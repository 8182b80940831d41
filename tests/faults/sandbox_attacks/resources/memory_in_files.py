"""Fills the folder in its first argument, which is memory too; then takes it through a mapping as well."""

import mmap
import os
import sys

folder = sys.argv[1]
with open(f"{folder}/mapped", "w+b") as file:
    os.ftruncate(file.fileno(), 40 << 20)
    mapping = mmap.mmap(file.fileno(), 40 << 20)
    for offset in range(0, 40 << 20, 4096):
        mapping[offset] = 1
with open(f"{folder}/written", "wb", buffering=0) as file:
    for _ in range(60):
        file.write(b"x" * (1 << 20))
print("survived")
