"""Takes memory in memory files below the largest file size, kept by mappings alone."""

import mmap
import os

held = []
while True:
    file = os.memfd_create("held")
    os.write(file, b"x" * 900_000)
    held.append(mmap.mmap(file, 900_000))
    os.close(file)
