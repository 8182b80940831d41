"""Adds up every piece from its beginning to its end."""

import sys

numbers = list(map(int, sys.stdin.read().split()))[1:]
print(max(sum(numbers[i : j + 1]) for i in range(len(numbers)) for j in range(i, len(numbers))))
