"""Writes one file until the kernel says that it is too large or that there is no space."""

import errno

written = 0
try:
    with open("/box/big", "wb", buffering=0) as file:
        while written < 100 << 20:
            written += file.write(b"x" * 100_000)
except OSError as error:
    if error.errno not in (errno.EFBIG, errno.ENOSPC):
        print(error)
print("held" if written <= 1 << 20 else f"wrote {written}")
