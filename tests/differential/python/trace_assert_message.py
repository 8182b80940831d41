assert sum([1, 2]) == 4, f"got {sum([1, 2])}"
