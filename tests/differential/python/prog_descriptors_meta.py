class M(type):
    def __new__(m, n, b, d): print("making", n, sorted(k for k in d if k[:2] != "__")); return super().__new__(m, n, b, d)
class D:
    def __set_name__(self, o, n): self.n = n
    def __get__(self, i, o): return (self.n, i is None)
class A(metaclass=M):
    x = D()
class B(A):
    def __init_subclass__(cls, **k): print(cls.__name__, k)
class C(B, key=1): pass
print(A.x, A().x, C.__mro__)
