from dataclasses import *
@dataclass(order=True, frozen=True, slots=True)
class P:
    x: int
    y: list = field(default_factory=list, compare=False)
print(P(1) < P(2), replace(P(1), x=5), asdict(P(3, [1])), sorted([P(3), P(1)]))
P(1).x = 3
