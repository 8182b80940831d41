"""Calls between two processes that do not trust each other, in both directions, with the objects that cross.

A message is a dictionary of plain values, one per line. A request has `id`, `do` (an operation), `arguments` and
`keywords`; its reply has the same `id` and either `value` and the arguments that the call has `changed`, or `raised`
(names of the exception's classes), its `arguments`, None unless they are plain, and `message`, or `refused`, why the
value cannot be passed on. While a side waits for a reply it serves the other's requests.

What is not plain crosses as a number. Its side introduces it once, in a line `new`, and the other makes a stand-in. A
message's `state` has the attributes of objects that are copied.
"""

from __future__ import annotations

import builtins
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import count
from typing import Any, BinaryIO

from .submission import MESSAGE_CHARACTERS, describe_exception
from .values import decode, encode

_NAME_CHARACTERS = 100
_MAX_CLASSES = 20
_CONTAINERS = (list, dict, set, tuple)
METHOD = object()
"""Value of an attribute that is a method, which is called by name."""

Introduction = tuple[int, str, str, Any]
"""Number, kind, name, and what else there is to know of an object."""


class SubmissionError(RuntimeError):
    """The other side raised an exception that is not built in, or returned what does not cross."""


class ChannelBrokenError(BaseException):
    """The other side ended, or a message is malformed; not an Exception, so that tests do not take it for a result."""


class UnfitArgumentError(BaseException):
    """A call with an argument that does not cross."""


class Peer(ABC):
    """One side; calls come one at a time, from any thread."""

    most_objects = 200_000
    """Objects of the other side that it may introduce."""
    sign: int
    """Sign of the numbers of its own objects."""
    kept_back: tuple[type[BaseException], ...] = ()
    """Exceptions of the other side that are not raised as such."""

    def __init__(
        self, reader: BinaryIO, writer: BinaryIO, *, max_line_bytes: int = -1, max_characters: int | None = None
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._max_line_bytes = max_line_bytes
        self._max_characters = max_characters
        self._lock = threading.RLock()
        # replies to calls of an earlier test, which ended before it read them, have other numbers
        self._ids = count(int.from_bytes(os.urandom(7), "big"))
        self.own: dict[int, Any] = {}
        self.met: dict[int, Any] = {}
        self.kinds: dict[int, str] = {}
        """Kind of each of its own objects."""
        self.exceptions: dict[str, type[BaseException]] = {}
        """Classes of exceptions by their names on the other side, beside the built-in ones."""
        self._numbers: dict[int, int] = {}
        self._new: list[Introduction] = []
        self._referred: list[int] = []

    @abstractmethod
    def describe(self, value: Any) -> tuple[str, str, Any]:
        """Returns kind, name and further facts of an object; raises TypeError for one that does not cross."""

    @abstractmethod
    def make_stand_in(self, introduction: Introduction) -> Any:
        """Returns what stands for an object of the other side."""

    @abstractmethod
    def perform(self, operation: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Returns the result of an operation that the other side asks for."""

    @abstractmethod
    def encode_states(self, referred: list[int]) -> list[str]:
        """Returns numbers and attributes in turn, encoded, of the objects that go with a message."""

    @abstractmethod
    def apply_state(self, number: int, attributes: dict[Any, Any]) -> None:
        """Takes over the attributes of an object."""

    def request(self, operation: str, /, *arguments: Any, **keywords: Any) -> Any:
        """Asks the other side for an operation and returns its result; changes list, dictionary and set arguments as it
        did.

        Raises what it raised, as an exception of the same name or else of its nearest known ancestor below Exception,
        or SubmissionError; ChannelBrokenError; UnfitArgumentError.
        """
        with self._lock:
            identity = next(self._ids)
            try:
                self.send({"id": identity, "do": operation, "arguments": list(arguments), "keywords": keywords})
            except (TypeError, ValueError, RecursionError) as error:
                raise UnfitArgumentError(f"an argument cannot be handed over: {error}") from error
            except BrokenPipeError as error:
                raise ChannelBrokenError("the submission's process has ended") from error
            while True:
                message = self.receive()
                if "do" in message:
                    self.serve(message)
                elif message.get("id") == identity:
                    return self._take(message, arguments, keywords)

    def send(self, fields: dict[str, Any]) -> None:
        """Sends a message, after the introductions that it needs."""
        self._referred.clear()
        line = encode(fields, self._max_characters, self.refer)
        if states := self.encode_states(self._referred):
            line = f'{line[:-2]},"state",{{"dict":[{",".join(states)}]}}]}}'
        if self._new:
            line = encode({"new": self._new}) + "\n" + line
            self._new = []
        self._writer.write(line.encode("ascii") + b"\n")
        self._writer.flush()

    def receive(self) -> dict[str, Any]:
        """Returns the next message that is no introduction; raises ChannelBrokenError at the end and for a bad one."""
        introduced = False
        while True:
            line = self._reader.readline(self._max_line_bytes)
            if not line.endswith(b"\n"):
                is_long = len(line) == self._max_line_bytes
                raise ChannelBrokenError("a reply is too long" if is_long else "the submission's process has ended")
            try:
                message = decode(line.decode("ascii"), self._resolve)
                if not isinstance(message, dict):
                    raise ValueError("no dictionary")
                if "new" in message and introduced:
                    raise ValueError("introductions for no message")
                introduced = "new" in message
                for introduction in message.get("new", ()):
                    self._meet(introduction)
                for number, attributes in dict(message.get("state", ())).items():
                    self.apply_state(number, attributes)
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise ChannelBrokenError(f"a reply is malformed: {error}") from error
            if "new" not in message:
                return message

    def serve(self, message: dict[str, Any]) -> None:
        """Answers a request."""
        arguments, keywords = message["arguments"], message["keywords"]
        named = [*enumerate(arguments), *keywords.items()]
        before = {name: self._print(argument) for name, argument in named if type(argument) in _CONTAINERS}
        identity = {"id": message["id"]}
        try:
            value = self.perform(message["do"], arguments, keywords)
        except ChannelBrokenError:
            raise
        except BaseException as error:
            self.send({**identity, **_exception_reply(error)})
            return
        if value is METHOD:
            self.send({**identity, "method": True})
            return
        changed = {name: argument for name, argument in named if self._has_changed(argument, before.get(name))}
        try:
            self.send({**identity, "value": value, "changed": changed})
        except BrokenPipeError:
            raise
        except BaseException as error:  # methods of a value may raise anything
            reason = describe_exception(error)[-MESSAGE_CHARACTERS:]
            self.send({**identity, "refused": f"a value that cannot be compared: {reason}"})

    def refer(self, value: Any) -> int:
        """Returns the number of an object that is to cross; raises TypeError for one that does not."""
        number = self._numbers.get(id(value))
        if number is None:
            description = self.describe(value)
            number = self.sign * (1 + len(self.own))
            self._know(number, value)
            self.own[number], self.kinds[number] = value, description[0]
            self._new.append((number, *description))
        self._referred.append(number)
        return number

    def _know(self, number: int, value: Any) -> None:
        self._numbers[id(value)] = number

    def _meet(self, introduction: Any) -> None:
        number, kind, name, _ = introduction
        if type(number) is not int or number * self.sign >= 0 or number in self.met:
            raise ValueError("an introduction under a wrong number")
        if type(kind) is not str or type(name) is not str or len(name) > _NAME_CHARACTERS:
            raise ValueError("an introduction without a name")
        if len(self.met) >= self.most_objects:
            raise ValueError(f"more than {self.most_objects} objects")
        self.met[number] = self.make_stand_in(introduction)
        self._know(number, self.met[number])

    def _resolve(self, number: int) -> Any:
        for known in (self.own, self.met):
            if number in known:
                return known[number]
        raise ValueError("an object that was not introduced")

    def _print(self, value: Any) -> str:
        """Returns a value as text; empty for one that does not cross."""
        try:
            return encode(value, None, self.refer)
        except (TypeError, ValueError):
            return ""

    def _has_changed(self, argument: Any, before: str | None) -> bool:
        """Returns whether a container has changed; one that does not cross any more is left as it was."""
        return before is not None and (now := self._print(argument)) != before and now != ""

    def _take(self, reply: dict[str, Any], arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        if reply.get("method") is True:
            return METHOD
        if "value" in reply:
            changed = reply.get("changed")
            named: dict[Any, Any] = {**dict(enumerate(arguments)), **keywords}
            for name, contents in changed.items() if isinstance(changed, dict) else ():
                if name in named:
                    merge(named[name], contents)
            return reply["value"]
        names = reply.get("raised")
        if isinstance(names, list):
            raise self._as_exception(names, _text(reply.get("message")), reply.get("arguments"))
        raise SubmissionError(f"the submission returned {_text(reply.get('refused')) or 'nothing'}")

    def _as_exception(self, names: list[Any], message: str, arguments: Any) -> BaseException:
        attempts = [arguments, (message,)] if isinstance(arguments, tuple) else [(message,)]
        for position, name in enumerate(names):
            kind = find_exception(name, self.exceptions) if isinstance(name, str) else None
            if kind is None:
                continue
            if issubclass(kind, self.kept_back) or (position and kind in (Exception, BaseException)):
                break
            for attempt in attempts:
                try:
                    return kind(*attempt)
                except (TypeError, ValueError, OverflowError):  # some classes take certain arguments only
                    continue
        return SubmissionError(message)


def find_exception(name: str, others: dict[str, type[BaseException]]) -> type[BaseException] | None:
    """Returns the exception of a name, from `others` or built in."""
    kind = others.get(name) or getattr(builtins, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, BaseException) else None


def merge(old: Any, new: Any) -> Any:
    """Returns the new value; lists, dictionaries and sets that were in the old one keep their identity."""
    if type(old) is not type(new):
        return new
    if type(old) is list:
        old[:] = [*(merge(*pair) for pair in zip(old, new)), *new[len(old) :]]  # noqa: B905  # the shorter one ends it
        return old
    if type(old) is tuple:
        return (*(merge(*pair) for pair in zip(old, new)), *new[len(old) :])  # noqa: B905
    if type(old) is dict:
        merged = {key: merge(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(merged)
        return old
    if type(old) is set:
        old.clear()
        old.update(new)
        return old
    return new


def read_attributes(value: Any) -> dict[str, Any]:
    """Returns the attributes that an object has of its own."""
    slots = [
        name
        for kind in type(value).__mro__
        for name in _as_tuple(vars(kind).get("__slots__", ()))
        if name not in ("__dict__", "__weakref__")
    ]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}


def _as_tuple(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _text(value: Any) -> str:
    """Returns text as it is and nothing for anything else, which could fail to print."""
    return value[:MESSAGE_CHARACTERS] if isinstance(value, str) else ""


def _exception_reply(error: BaseException) -> dict[str, Any]:
    names = [str(kind.__name__)[:_NAME_CHARACTERS] for kind in type(error).__mro__[:_MAX_CLASSES]]
    arguments = BaseException.__getattribute__(error, "args")
    try:
        encode(arguments, 4 * MESSAGE_CHARACTERS)
    except (TypeError, ValueError):
        arguments = None
    return {"raised": names, "message": describe_exception(error)[-MESSAGE_CHARACTERS:], "arguments": arguments}
