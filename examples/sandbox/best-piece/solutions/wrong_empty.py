"""Takes an empty piece for one: wrong where all numbers are negative."""

import sys

numbers = list(map(int, sys.stdin.read().split()))[1:]
best = ending = 0
for number in numbers:
    ending = max(0, ending + number)
    best = max(best, ending)
print(best)
