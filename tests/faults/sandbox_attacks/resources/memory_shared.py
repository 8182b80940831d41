"""Takes memory in shared anonymous mappings, which belong to no process alone."""

import mmap

held = []
while True:
    mapping = mmap.mmap(-1, 1 << 20)
    for offset in range(0, 1 << 20, 4096):
        mapping[offset] = 1
    held.append(mapping)
