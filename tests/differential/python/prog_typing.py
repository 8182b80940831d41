from typing import *
T = TypeVar("T")
class Box(Generic[T]):
    x: Optional[int] = None
print(Box[int], get_type_hints(Box), list[int], Union[int, str], int | None, Callable[[int], str])
