"""Prints the answer's words as one."""

print(12)
