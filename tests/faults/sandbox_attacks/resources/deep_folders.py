"""Makes folders in folders, far deeper than a path can name, and takes its own rights to them away."""

import os

depth = 0
try:
    for depth in range(100_000):
        os.mkdir("d")
        os.chdir("d")
except OSError:
    pass
os.chmod(".", 0)
print("held" if depth > 100 else f"only {depth}")
