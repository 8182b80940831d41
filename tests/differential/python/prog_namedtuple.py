from collections import namedtuple
from typing import NamedTuple
P = namedtuple("P", "x y", defaults=[0])
class Q(NamedTuple):
    a: int = 1
print(P(1), P(1)._replace(y=3), P._fields, Q(), Q() == (1,), P(*"ab"))
