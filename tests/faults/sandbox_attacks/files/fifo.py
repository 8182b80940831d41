"""Leaves a named pipe, which blocks whoever opens it, and one that nobody may read."""

import os

os.mkfifo("out")
os.mkfifo("locked", 0)
