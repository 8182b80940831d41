# differential: {"env": {"PYTHONUNBUFFERED": "1"}}
print(1
