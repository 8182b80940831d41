"""Touches as many KiB of memory as its argument says."""

import sys

held = bytearray(b"x") * (int(sys.argv[1]) << 10)
