"""Leaves a folder that is a link to the one of the path in its first argument."""

import os
import sys

folder, name = os.path.split(sys.argv[1])
os.symlink(folder, "folder")
os.makedirs("deep/deeper")
os.symlink(folder, "deep/deeper/folder")
