d = dict(zip("bca", range(3))); d["b"] = 9; del d["c"]; d["c"] = 0
print(d, list(reversed(d)), d | {"z": 1}, {**d}, d.keys() & {"a"}, dict.fromkeys("xy"))
