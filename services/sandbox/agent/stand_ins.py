"""Stand-ins, in the test's process, for functions, classes, objects and iterators of a submission.

Whether two things are equal is decided here, by what they hold, and never by a method of the submission's. An object
that the test has constructed is what it tests, so that operators work on it; one that a function has returned may stand
where a plain value is expected, so that it has no operators and none of the methods that plain values have.
"""

from __future__ import annotations

import functools
import io
import sys
import types
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, BinaryIO, cast

from .peers import (
    METHOD,
    ChannelBrokenError,
    Introduction,
    Peer,
    SubmissionError,
    UnfitArgumentError,
    find_exception,
    merge,
    read_attributes,
)
from .values import encode

MARK = "_raised_by_the_submission"
"""Attribute of exceptions that began in the submission."""
_MOST_ITEMS = 64
_FUNCTIONS = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_JUDGING_NAMES = frozenset(
    [name for kind in (str, set) for name in dir(kind) if name.startswith(("is", "ends", "starts"))]
    + [name for name in dir(Decimal) if name.startswith(("compare", "is_", "same_"))]
    + ["equals", "equal", "eq", "ne"]
)
"""Methods that say what a test wants to know, given what it expects."""
_PLAIN_NAMES = _JUDGING_NAMES.union(
    name for kind in (str, bytes, list, dict, set, int, float, complex) for name in dir(kind)
)
_NOT_CALLED_BACK = {
    *("__init__", "__new__", "__setattr__", "__delattr__", "__getattribute__", "__getattr__", "__reduce__", "__del__"),
    *("__init_subclass__", "__class_getitem__", "__subclasshook__", "__post_init__", "__reduce_ex__"),
}


class CallerPeer(Peer):
    """The test's side."""

    sign = 1
    # raised inside a generator or an iterator they would end a loop of the test as if it had run through
    kept_back = (StopIteration, StopAsyncIteration, GeneratorExit)

    def __init__(self, requests: BinaryIO, replies: BinaryIO, *, max_reply_bytes: int) -> None:
        super().__init__(replies, requests, max_line_bytes=max_reply_bytes)
        self.calls = 0
        self.on_first_call: Callable[[], object] = lambda: None
        self.fault: UnfitArgumentError | None = None
        """The first argument that could not be handed over, even where the test has caught the exception."""
        self.broken: ChannelBrokenError | None = None
        """The end of the channel, in the same way."""
        self._classes: dict[str, type[RemoteObject]] = {}

    def request(self, operation: str, /, *arguments: Any, **keywords: Any) -> Any:
        """Asks the submission for an operation; marks what it raises."""
        self.calls += 1
        if self.calls == 1:
            self.on_first_call()
        try:
            return super().request(operation, *arguments, **keywords)
        except UnfitArgumentError as error:
            self.fault = self.fault or error
            raise
        except ChannelBrokenError as error:
            self.broken = self.broken or error
            raise
        except BaseException as error:
            setattr(error, MARK, True)
            raise

    def _resolve(self, number: int) -> Any:
        value = super()._resolve(number)
        if isinstance(value, RemoteObject) and value._remote_is_own:
            object.__setattr__(value, "_remote_is_answer", True)
        return value

    def describe(self, value: Any) -> tuple[str, str, Any]:
        """Describes what the test hands over: functions, iterators, and objects, which are copied."""
        kind = type(value)
        name = str(getattr(value, "__name__", kind.__name__))[:100]
        if (imported := _find_import(value)) is not None:
            return "import", *imported
        if isinstance(value, _FUNCTIONS):
            return "function", name, None
        if kind in (object, io.StringIO, io.BytesIO):
            return "record", kind.__name__, (_names_of(kind, callable), [])
        if isinstance(value, (types.ModuleType, types.CodeType, types.CoroutineType, io.IOBase, BaseException)):
            raise TypeError(f"{kind.__name__[:100]} is not a plain type")
        if hasattr(kind, "__next__"):
            return "iterator", name, None
        if callable(value) and kind.__module__ != "code_test":
            return "function", name, None
        if kind.__module__ == "code_test" or hasattr(value, "__dict__"):
            return "record", kind.__name__[:100], (_names_of(kind, callable), _names_of(kind, _is_property))
        raise TypeError(f"{kind.__name__[:100]} is not a plain type")

    def make_stand_in(self, introduction: Introduction) -> Any:
        """Returns what the test sees of an object of the submission's."""
        _, kind, name, facts = introduction
        if kind == "function":
            return self.make_function(name)
        if kind == "iterator":
            return self._iterate(introduction[0])
        if kind == "coroutine":
            return self._await(introduction[0])
        if kind == "class":
            return self.class_of(name, facts is True)
        if kind == "exception":
            return self._make_exception(name, facts)
        if kind == "object":
            return object.__new__(self.class_of(name, facts is True))
        raise ValueError(f"an introduction of kind {kind!r:.100}")

    def class_of(self, name: str, has_equality: bool) -> type[RemoteObject]:
        """Returns the stand-in of a class of the submission's."""
        if name not in self._classes:
            members = {"_remote_peer": self, "_remote_has_equality": has_equality, "__module__": "submission"}
            self._classes[name] = cast("type[RemoteObject]", _RemoteType(name, (RemoteObject,), members))
        return self._classes[name]

    def make_function(self, name: str) -> Callable[..., Any]:
        """Returns the stand-in of a function."""

        def stand_in(*arguments: Any, **keywords: Any) -> Any:
            return self.request("call", stand_in, *arguments, **keywords)

        stand_in.__name__ = stand_in.__qualname__ = name
        return stand_in

    def _iterate(self, number: int) -> Iterator[Any]:
        size, ended = 1, False
        while not ended:
            items, ended = self.request("next", self.met[number], size)
            yield from list(items)
            size = min(2 * size, _MOST_ITEMS)

    async def _await(self, number: int) -> Any:
        return self.request("await", self.met[number])

    def _make_exception(self, name: str, ancestors: Any) -> type[BaseException]:
        found = [find_exception(each, self.exceptions) for each in ancestors if isinstance(each, str)]
        base = next((kind for kind in found if kind is not None and issubclass(kind, Exception)), Exception)
        self.exceptions[name] = type(name, (base,), {"__module__": "submission"})
        return self.exceptions[name]

    def perform(self, operation: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Calls what the test has handed over; nothing else can be asked for."""
        target, *rest = arguments
        kind = self.kinds.get(self._numbers.get(id(target), 0))
        if kind == "function" and operation == "call":
            return target(*rest, **keywords)
        if kind == "iterator" and operation == "next":
            try:
                return ([next(target)], False)
            except StopIteration:
                return ([], True)
        if kind == "record" and operation in ("method", "getattr"):
            name, *values = rest
            if operation == "method" and name in _names_of(type(target), callable):
                return getattr(target, name)(*values, **keywords)
            if operation == "getattr" and name in _names_of(type(target), _is_property):
                return getattr(target, name)
        raise SubmissionError(f"the submission asked for {operation!r:.100}, which the test does not offer")

    def encode_states(self, referred: list[int]) -> list[str]:
        """Encodes the attributes of all objects of the test's that the submission can reach from the message."""
        parts: list[str] = []
        waiting, done = list(referred), set()
        while waiting:
            number = waiting.pop()
            if number in done or self.kinds.get(number) != "record":
                continue
            done.add(number)
            self._referred = []
            parts += [str(number), encode(read_attributes(self.own[number]), None, self.refer)]
            waiting += self._referred
        return parts

    def apply_state(self, number: int, attributes: dict[Any, Any]) -> None:
        """Changes an object of the test's as the submission has changed its copy; methods stay the test's."""
        if self.kinds[number] != "record":
            raise ValueError("attributes of an object that is not copied")
        target = self.own[number]
        fixed = set(_names_of(type(target), _is_fixed)) - set(read_attributes(target))
        for name, value in attributes.items():
            if type(name) is not str or name.startswith("__") or name in fixed:
                continue
            object.__setattr__(target, name, merge(getattr(target, name, None), value))


def _find_import(value: Any) -> tuple[str, str] | None:
    """Returns qualified name and module of a function or class that the submission can import; None for the test's own.

    A call of `eval`, say, is not to be made in the test.
    """
    name = getattr(value, "__qualname__", None)
    module = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__module__", None)
    if not callable(value) or not isinstance(name, str) or module == "code_test":
        return None
    found: Any = sys.modules.get(module) if isinstance(module, str) else None
    for part in name.split("."):
        found = getattr(found, part, None)
    return (name, str(module)) if found is value else None


def _names_of(kind: type, has: Callable[[Any], bool]) -> list[str]:
    """Returns names of the members of a class and its bases, up to the built-in ones."""
    members = {name: member for base in reversed(kind.__mro__[:-1]) for name, member in vars(base).items()}
    return [
        name
        for name, member in members.items()
        if name not in _NOT_CALLED_BACK and not isinstance(member, type) and has(member)
    ]


def _is_property(member: Any) -> bool:
    return isinstance(member, (property, functools.cached_property))


def _is_fixed(member: Any) -> bool:
    return callable(member) or _is_property(member) or isinstance(member, (staticmethod, classmethod))


class _RemoteType(type):
    """Type of the stand-ins of classes."""

    _remote_peer: CallerPeer

    def __call__(cls, /, *arguments: Any, **keywords: Any) -> Any:
        return _own(cls._remote_peer.request("construct", cls, *arguments, **keywords))

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_remote_"):
            raise AttributeError(name)
        return _read(cls, name)


class RemoteObject(metaclass=_RemoteType):
    """Stand-in for an instance of a class of the submission's."""

    _remote_peer: CallerPeer
    _remote_has_equality: bool
    _remote_is_own = False
    """Whether the test has constructed it."""
    _remote_is_answer = False
    """Whether the submission has answered with it since, or with what it was computed from."""

    def __getattr__(self, name: str) -> Any:
        value = _read(self, name)
        refused = _JUDGING_NAMES if self._remote_is_own else _PLAIN_NAMES
        if name in refused and callable(value) and not self._remote_decides:
            raise SubmissionError(f"{type(self).__name__} is not a plain type")
        return value

    @property
    def _remote_decides(self) -> bool:
        """Whether what it says of plain values counts: one that has been an answer may stand for one of them."""
        return self._remote_is_own and not self._remote_is_answer

    def __setattr__(self, name: str, value: Any) -> None:
        self._remote_peer.request("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._remote_peer.request("delattr", self, name)

    def __eq__(self, other: object) -> Any:
        if self is other:
            return True
        if isinstance(other, RemoteObject):
            return type(self) is type(other) and self._remote_has_equality and _state(self) == _state(other)
        fields = getattr(type(other), "__dataclass_fields__", None)
        if fields is None or type(other).__name__ != type(self).__name__:
            return NotImplemented
        compared = {name: getattr(other, name) for name, field in fields.items() if field.compare}
        state = _state(self)
        return {name: state[name] for name in compared if name in state} == compared

    def __hash__(self) -> int:
        return hash(type(self).__name__) if self._remote_has_equality else object.__hash__(self)

    def __bool__(self) -> bool:
        return bool(self._remote_peer.request("bool", self)) if self._remote_is_own else True

    def __contains__(self, item: Any) -> bool:
        if self._remote_decides:
            return bool(self._remote_peer.request("contains", self, item))
        return any(item == each for each in self)

    def __call__(self, /, *arguments: Any, **keywords: Any) -> Any:
        return self._remote_peer.request("call", self, *arguments, **keywords)

    def __enter__(self) -> Any:
        entered = self._remote_peer.request("method", self, "__enter__")
        return _own(entered) if self._remote_is_own else entered

    def __exit__(self, *raised: Any) -> Any:
        return self._remote_peer.request("method", self, "__exit__", *[None] * len(raised))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._remote_peer.request("iter", self))


def _read(target: Any, name: str) -> Any:
    """Returns an attribute; methods are called by name."""
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(name)
    request = target._remote_peer.request
    value = request("getattr", target, name)
    return functools.partial(request, "method", target, name) if value is METHOD else value


def _own(value: Any) -> Any:
    """Returns a value; an object counts as constructed by the test."""
    if isinstance(value, RemoteObject):
        object.__setattr__(value, "_remote_is_own", True)
    return value


_ORDERINGS = ("lt", "le", "gt", "ge")


def _compute(operation: str, *operands: Any) -> Any:
    """Returns the result of an operator; what is computed from an answer is one."""
    objects = [operand for operand in operands if isinstance(operand, RemoteObject)]
    value = _own(objects[0]._remote_peer.request(operation, *operands))
    if isinstance(value, RemoteObject) and any(operand._remote_is_answer for operand in objects):
        object.__setattr__(value, "_remote_is_answer", True)
    return value


def _state(value: RemoteObject) -> dict[str, Any]:
    state = value._remote_peer.request("state", value)
    return state if isinstance(state, dict) else {}


def _add_operators() -> None:
    """Gives stand-ins what tells nothing of what is expected, and to those of the test's objects the operators."""

    def ask(operation: str) -> Callable[..., Any]:
        return lambda self, *arguments: self._remote_peer.request(operation, self, *arguments)

    def compute(operation: str, is_reflected: bool = False) -> Callable[..., Any]:
        def method(self: RemoteObject, *others: Any) -> Any:
            is_compared = operation in _ORDERINGS and not all(isinstance(each, RemoteObject) for each in others)
            if not (self._remote_decides if is_compared else self._remote_is_own):
                return NotImplemented
            operands = (*others, self) if is_reflected else (self, *others)
            return _compute(operation, *operands)

        return method

    def compute_alone(operation: str) -> Callable[..., Any]:
        def method(self: RemoteObject) -> Any:
            if not self._remote_is_own:
                raise TypeError(f"{type(self).__name__} is not a plain type")
            return _compute(operation, self)

        return method

    for name in ("len", "str", "repr", "int", "float", "index", "getitem", "setitem", "delitem"):
        setattr(RemoteObject, f"__{name}__", ask(name))
    for name in _ORDERINGS:
        setattr(RemoteObject, f"__{name}__", compute(name))
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
        setattr(RemoteObject, f"__{name}__", compute(name))
        setattr(RemoteObject, f"__r{name}__", compute(name, is_reflected=True))
    for name in ("neg", "pos", "abs", "invert"):
        setattr(RemoteObject, f"__{name}__", compute_alone(name))


_add_operators()
