"""Leaves a link to the path in its first argument, by the name in its second."""

import os
import sys

os.symlink(sys.argv[1], sys.argv[2])
