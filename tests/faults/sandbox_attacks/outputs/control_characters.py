"""Prints something else that a terminal shows as the answer."""

print("9 9\r1 2")
print("9\b1 2")
print("\x1b[2K1 2")
print("1\x00 2")
