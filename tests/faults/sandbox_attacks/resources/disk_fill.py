"""Fills the folder in its first argument; may write as many bytes as the second says, and is told when it is full."""

import errno
import sys

folder, limit = sys.argv[1], int(sys.argv[2])
written = 0
try:
    for index in range(100):
        with open(f"{folder}/{index}", "wb", buffering=0) as file:
            written += file.write(b"x" * 100_000)
except OSError as error:
    if error.errno != errno.ENOSPC:
        print(error)
else:
    print("never full")
if written > limit:
    print("wrote", written)
print("held")
