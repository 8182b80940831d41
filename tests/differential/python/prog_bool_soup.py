print(True + True, [] or "x", 0 and 1, not [], 1 < 2 < 3, 3 > 2 == 2, None is None, "a" in "abc", all([]), any([]), *[1, *[2]], (1,) + (2,))
