from enum import *
class C(Flag):
    A = auto(); B = auto()
class S(StrEnum):
    ONE = auto()
print(C.A | C.B, C(3), list(C), S.ONE, repr(S.ONE), C["A"].value)
C(8)
