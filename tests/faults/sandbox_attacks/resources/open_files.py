"""Opens files until it may not open more."""

import os

opened = 0
try:
    while opened < 100_000:
        os.open("/dev/null", os.O_RDONLY)
        opened += 1
except OSError:
    pass
print("held" if opened < 5000 else f"opened {opened}")
