print([y := 1, y**2], [(a, b) for a in range(3) if a for b in "xy"], {k: v for k, v in zip("ab", [1, 2])}, {c for c in "a"}, sum(x for x in range(10) if (z := x) % 2), z)
