import json
print(json.dumps({"é": [1, 2.5, None, True], "b": {"c": []}}, indent=2, ensure_ascii=False), json.loads('{"a": 1e5, "b": "\\u00e9"}'))
json.loads("{bad")
