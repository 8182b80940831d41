from pprint import pprint
pprint({"b": list(range(30)), "a": {"nested": ["x" * 30, "y" * 30, "z" * 30]}})
