"""Prints what compares oddly with every number."""

print("nan nan")
