def g():
    yield next(iter([]))
next(g())
