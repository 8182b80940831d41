import functools
def d(f):
    @functools.wraps(f)
    def w(*a): return f(*a)
    return w
@d
def g(x): raise KeyError(x)
g(1)
