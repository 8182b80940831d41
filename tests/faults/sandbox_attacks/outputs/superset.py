"""Prints the answer and more."""

print("1 2 3")
