"""Best sum that ends here, number by number."""

import sys

numbers = list(map(int, sys.stdin.read().split()))[1:]
best = ending = numbers[0]
for number in numbers[1:]:
    ending = max(number, ending + number)
    best = max(best, ending)
print(best)
