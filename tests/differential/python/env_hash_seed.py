# differential: {"env": {"PYTHONHASHSEED": "42"}}
print(hash("a"), hash(b"b"), list({"x", "y", "z", "w"}))
