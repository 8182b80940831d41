"""Leaves hard links to files that are not its own."""

import os

for path in ("/usr/bin/env", "/etc/passwd", "/proc/self/environ", "/dev/zero"):
    for follow in (True, False):
        try:
            os.link(path, "out", follow_symlinks=follow)
            print("linked", path)
        except OSError:
            pass
