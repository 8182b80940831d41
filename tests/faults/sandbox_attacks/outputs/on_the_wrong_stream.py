"""Prints the answer to standard error."""

import sys

print("1 2", file=sys.stderr)
