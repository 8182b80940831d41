"""Leaves a link to a link to the path in its first argument, and a loop of links."""

import os
import sys

os.symlink(sys.argv[1], "first")
os.symlink("first", "out")
os.symlink("loop", "loop")
