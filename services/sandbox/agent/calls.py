"""Calls of a submission's functions and objects by a test in another process.

The submission may do to this side what it likes: that changes what it says its functions returned, and nothing else.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import islice
from typing import Any, BinaryIO

from .peers import METHOD, ChannelBrokenError, Introduction, Peer, merge, read_attributes
from .submission import MESSAGE_CHARACTERS, LoadError, find_function, load_module, run_coroutine, split_names
from .values import copy_as_plain

LOADED, COMPILE_ERROR, LOAD_ERROR = "loaded", "compile_error", "load_error"
_MOST_COPIES = 1000
"""Copies of the test's objects that are looked at after calls that do not bring them again."""
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_OWN_MODULES = ("submission", "agent.submission", "services.sandbox.agent.submission")


def serve_submission(
    source: bytes, function_name: str, requests: BinaryIO, replies: BinaryIO, *, path: str, max_reply_bytes: int
) -> None:
    """Serves calls until the requests or the reader of the replies end; `path` is the submission's name in tracebacks.

    A value whose reply takes more than `max_reply_bytes`, 32 KiB or more, is refused.
    """
    peer = SubmissionPeer(requests, replies, max_characters=max_reply_bytes - 1)
    try:
        try:
            peer.names = load_module(source, function_name, path)
            tested = {name: find_function(peer.names, name) for name in split_names(function_name)}
        except LoadError as error:
            kind = COMPILE_ERROR if error.does_not_compile else LOAD_ERROR
            peer.send({kind: str(error)[-MESSAGE_CHARACTERS:]})
            return
        public = {name: value for name, value in peer.names.items() if _is_public(name, value)}
        peer.send({LOADED: True, "names": {name: _Handed(value) for name, value in {**public, **tested}.items()}})
        while True:
            if len(peer.states) > _MOST_COPIES:
                peer.states.clear()
            peer.serve(peer.receive())
    except (BrokenPipeError, ChannelBrokenError):
        return


class _Handed:
    """Marks an object that crosses as one, whatever its type."""

    def __init__(self, value: Any) -> None:
        self.value = value


class SubmissionPeer(Peer):
    """The submission's side."""

    sign = -1

    def __init__(self, requests: BinaryIO, replies: BinaryIO, *, max_characters: int) -> None:
        super().__init__(requests, replies, max_characters=max_characters)
        self.names: dict[str, Any] = {}
        """Names of the submission's module."""
        self.states: dict[int, str] = {}
        """Attributes of the test's objects that the submission has copies of, as they were last known to the test."""
        self._raised: dict[int, BaseException] = {}

    def refer(self, value: Any) -> int:
        """Returns the number of an object that is to cross; raises TypeError for one that does not."""
        return super().refer(value.value if type(value) is _Handed else value)

    def describe(self, value: Any) -> tuple[str, str, Any]:
        """Describes functions, classes, iterators, and instances of the submission's classes."""
        kind = type(value)
        name = str(getattr(value, "__name__", kind.__name__))[:100]
        if isinstance(value, type):
            if issubclass(value, BaseException):
                return "exception", name, [each.__name__ for each in value.__mro__[1:]]
            return "class", name, _has_equality(value)
        if isinstance(value, _FUNCTIONS):
            return "function", name, None
        if kind.__module__ in _OWN_MODULES:
            return "object", kind.__name__[:100], _has_equality(kind)
        if hasattr(kind, "__next__"):
            return "iterator", name, None
        if isinstance(value, types.CoroutineType):
            return "coroutine", name, None
        if callable(value):
            return "function", name, None
        raise TypeError(f"{kind.__name__[:100]} is not a plain type")

    def make_stand_in(self, introduction: Introduction) -> Any:
        """Returns what the submission sees of a function, an iterator or an object of the test's."""
        number, kind, name, facts = introduction
        if kind == "import":
            return operator.attrgetter(name)(import_module(facts))
        if kind == "function":
            return self._make_function(name)
        if kind == "iterator":
            return self._iterate(number)
        own = self.names.get(name)
        if isinstance(own, type):
            try:
                return object.__new__(own)
            except TypeError:  # a class of objects that are made in another way
                pass
        return object.__new__(self._make_class(name, *facts))

    def _make_function(self, name: str) -> Callable[..., Any]:
        def stand_in(*arguments: Any, **keywords: Any) -> Any:
            return self.request("call", stand_in, *arguments, **keywords)

        stand_in.__name__ = stand_in.__qualname__ = name
        return stand_in

    def _iterate(self, number: int) -> Iterator[Any]:
        ended = False
        while not ended:
            items, ended = self.request("next", self.met[number])
            yield from list(items)

    def _make_class(self, name: str, methods: list[str], properties: list[str]) -> type:
        def call(method: str) -> Callable[..., Any]:
            return lambda instance, /, *arguments, **keywords: self.request(
                "method", instance, method, *arguments, **keywords
            )

        def read(attribute: str) -> property:
            return property(lambda instance: self.request("getattr", instance, attribute))

        members = {method: call(method) for method in methods}
        return type(name, (), {**members, **{attribute: read(attribute) for attribute in properties}})

    def perform(self, operation: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Returns the result of an operation on the submission's objects."""
        if operation == "next":
            return self._next_items(*arguments)
        return _OPERATIONS[operation](*arguments, **keywords)

    def _next_items(self, iterator: Iterator[Any], most: int) -> tuple[list[Any], bool]:
        """Returns the next items and whether there are no more; an exception after some comes with the next ones."""
        if id(iterator) in self._raised:
            raise self._raised.pop(id(iterator))
        items: list[Any] = []
        try:
            for item in islice(iterator, most):
                items.append(item)
        except BaseException as error:
            if not items:
                raise
            self._raised[id(iterator)] = error
            return items, False
        return items, len(items) < most

    def encode_states(self, referred: list[int]) -> list[str]:
        """Encodes the attributes of those copies that the submission has changed."""
        parts: list[str] = []
        for number, before in list(self.states.items()):
            now = self._print(read_attributes(self.met[number]))
            if now and now != before:
                self.states[number] = now
                parts += [str(number), now]
        return parts

    def apply_state(self, number: int, attributes: dict[Any, Any]) -> None:
        """Gives a copy the attributes of the test's object."""
        target = self.met[number]
        for name, value in attributes.items():
            value = merge(vars(target).get(name) if hasattr(target, "__dict__") else None, value)
            try:
                object.__setattr__(target, name, value)
            except AttributeError:  # a property of the submission's class
                vars(target)[name] = value
        self.states[number] = self._print(read_attributes(target))


def _is_public(name: str, value: Any) -> bool:
    """Returns whether the submission's module defines a function or a class under a name."""
    if name.startswith("_") or not callable(value):
        return False
    return "submission" in (getattr(value, "__module__", None), type(value).__module__)


def _has_equality(kind: type) -> bool:
    return getattr(kind, "__eq__", None) is not object.__eq__


def _construct(kind: Any, /, *arguments: Any, **keywords: Any) -> Any:
    value = kind(*arguments, **keywords)
    is_object = type(value).__module__ in _OWN_MODULES and not isinstance(value, tuple)  # a named tuple is plain
    return _Handed(value) if is_object else value


def _read_state(target: Any) -> dict[str, Any]:
    """Returns what an object holds; the contents of one that is a list, say, are under an empty name."""
    contents = copy_as_plain(target)
    return read_attributes(target) if contents is target else {**read_attributes(target), "": contents}


def _getattr(target: Any, name: str) -> Any:
    value = getattr(target, name)
    is_method = isinstance(value, types.MethodType) or (isinstance(target, type) and isinstance(value, _FUNCTIONS))
    return METHOD if is_method else value


def _call(target: Any, /, *arguments: Any, **keywords: Any) -> Any:
    return target(*arguments, **keywords)


def _call_method(target: Any, name: str, /, *arguments: Any, **keywords: Any) -> Any:
    return getattr(target, name)(*arguments, **keywords)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": _call,
    "construct": _construct,
    "method": _call_method,
    "getattr": _getattr,
    "setattr": setattr,
    "delattr": delattr,
    "state": _read_state,
    "await": run_coroutine,
    "iter": iter,
    "len": len,
    "str": str,
    "repr": repr,
    "int": int,
    "float": float,
    "bool": bool,
    **{
        name: getattr(operator, f"__{name}__")
        for name in (
            *("index", "getitem", "setitem", "delitem", "contains", "lt", "le", "gt", "ge", "neg", "pos", "abs"),
            *("invert", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"),
        )
    },
}
"""Operations that a test asks for, by name."""
