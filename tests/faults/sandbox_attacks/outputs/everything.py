"""Prints every answer that there could be."""

for left in range(10):
    for right in range(10):
        print(left, right)
