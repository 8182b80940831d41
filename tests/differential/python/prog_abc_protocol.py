from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable
class S(ABC):
    @abstractmethod
    def area(self): ...
@runtime_checkable
class P(Protocol):
    def area(self): ...
class Q(S):
    def area(self): return 4
print(Q().area(), isinstance(Q(), P))
S()
