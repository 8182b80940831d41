"""Prints the answer and fails."""

print("1 2")
raise SystemExit(3)
