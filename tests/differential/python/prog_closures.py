fs = [lambda: i for i in range(3)]
def counter():
    n = 0
    def inc():
        nonlocal n
        n += 1; return n
    return inc
c = counter()
print([f() for f in fs], c(), c(), counter.__code__.co_cellvars)
def f(a, b=[]): b.append(a); return b
f(1); print(f(2), f.__defaults__)
print(x)
