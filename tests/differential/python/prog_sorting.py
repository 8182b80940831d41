w = ["banana", "Apple", "cherry", "apple", "éclair"]
print(sorted(w), sorted(w, key=str.lower, reverse=True), sorted(w, key=lambda s: (len(s), s)))
import functools
print(sorted([3, 1, 2], key=functools.cmp_to_key(lambda a, b: b - a)))
