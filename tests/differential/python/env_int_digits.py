# differential: {"env": {"PYTHONINTMAXSTRDIGITS": "0"}}
print(len(str(10**5000)))
