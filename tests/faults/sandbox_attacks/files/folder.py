"""Leaves a folder where a file is expected, with a file inside."""

import os

os.makedirs("out/inside")
