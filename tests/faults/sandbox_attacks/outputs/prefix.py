"""Prints the beginning of the answer."""

print(1)
