def g():
    yield 1
    raise LookupError("inside")
for x in g():
    print(x)
