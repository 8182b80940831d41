print({5, 1, 3}, {1, 2} ^ {2, 3}, frozenset([3, 1]), set(range(0, 100, 7)))
