"""Makes its outputs look endless, where they are files: seeks far ahead, writes, cuts, and maps them."""

import os

for stream in (1, 2):
    for change in (
        lambda: os.lseek(stream, 1 << 40, os.SEEK_SET),
        lambda: os.write(stream, b"far"),
        lambda: os.ftruncate(stream, 1 << 40),
        lambda: os.posix_fallocate(stream, 0, 1 << 30),
        lambda: os.lseek(stream, 0, os.SEEK_SET),
        lambda: os.ftruncate(stream, 0),
        lambda: os.write(stream, b"near"),
    ):
        try:
            change()
        except OSError:
            pass
