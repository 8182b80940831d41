"""Calls with JSON arguments, as function tests make them, in the forms of LeetCode.

A class is called with a list of operations: names, the class's first, then a list of arguments for each. A signature
such as `(ListNode, integer[]) -> TreeNode` says which values are linked lists and trees, given and returned as
LeetCode's lists; the type of the result may be `void`, for the first argument as the call has left it. Without a
signature the annotations of the function decide.

All of it is the submission's side: what is returned is JSON, which the service compares.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from itertools import islice
from typing import Any

from .submission import ListNode, TreeNode, run_coroutine

_SIGNATURE = re.compile(r"\((.*)\)\s*(?:->\s*(.+))?", re.DOTALL)


def to_list_node(values: list[Any], kind: Callable[..., Any]) -> Any:
    """Returns the linked list of values."""
    head = None
    for value in reversed(values):
        node = kind(value)
        node.next = head
        head = node
    return head


def from_list_node(head: Any) -> list[Any]:
    """Returns the values of a linked list; raises ValueError for a cycle."""
    values, seen = [], set()
    while head is not None:
        if id(head) in seen:
            raise ValueError("the linked list has a cycle")
        seen.add(id(head))
        values.append(head.val)
        head = head.next
    return values


def to_tree_node(values: list[Any], kind: Callable[..., Any]) -> Any:
    """Returns the tree of values by levels; None stands for a node that is not there, whose children are left out."""
    if not values or values[0] is None:
        return None
    root = kind(values[0])
    waiting, rest = deque([root]), iter(values[1:])
    while waiting:
        node = waiting.popleft()
        for side in ("left", "right"):
            value = next(rest, None)
            child = None if value is None else kind(value)
            setattr(node, side, child)
            if child is not None:
                waiting.append(child)
    return root


def from_tree_node(root: Any) -> list[Any]:
    """Returns the values of a tree by levels; raises ValueError for a node that is there twice."""
    values: list[Any] = []
    waiting, seen = deque([root]), set()
    while waiting:
        node = waiting.popleft()
        if node is None:
            values.append(None)
            continue
        if id(node) in seen:
            raise ValueError("a node of the tree is there twice")
        seen.add(id(node))
        values.append(node.val)
        waiting += (node.left, node.right)
    while values and values[-1] is None:
        values.pop()
    return values


@dataclass(frozen=True)
class JsonCall:
    """Function, class or operations of a submission, called with JSON arguments."""

    target: Callable[..., Any]
    parameters: list[str] = field(default_factory=list)
    """Types of the arguments, as far as they are known."""
    result: str = ""
    """Type of the result; empty for one that is not known."""
    names: dict[str, Any] = field(default_factory=dict)
    """Names of the submission, whose ListNode and TreeNode are used where it defines them."""

    def __call__(self, arguments_json: bytes) -> Any:
        """Returns the result as a value that `to_json` writes."""
        arguments = json.loads(arguments_json)
        if inspect.isclass(self.target):
            return _run_operations(self.target, arguments)
        types = [*self.parameters, *[""] * len(arguments)]
        given = [self._read(value, type_) for value, type_ in zip(arguments, types)]  # noqa: B905  # types go on
        returned = self.target(*given)
        if inspect.iscoroutine(returned):
            returned = run_coroutine(returned)
        if self.result == "void":
            return _fill_empty(given[0], types[0])
        return _fill_empty(returned, self.result)

    def _read(self, value: Any, type_: str) -> Any:
        if not isinstance(value, list) or not _is_node(type_):
            return value
        if _is_list(type_):
            item = "ListNode" if "ListNode" in type_ else "TreeNode"
            return [self._read([] if each is None else each, item) for each in value]
        if "ListNode" in type_:
            return to_list_node(value, self.names.get("ListNode", ListNode))
        return to_tree_node(value, self.names.get("TreeNode", TreeNode))


def make_json_call(target: Callable[..., Any], signature: str, names: dict[str, Any]) -> JsonCall:
    """Returns the call of a function of the submission."""
    parameters, result = read_signature(signature) if signature else _read_annotations(target)
    return JsonCall(target, parameters, result, names)


def read_signature(signature: str) -> tuple[list[str], str]:
    """Returns the types of the arguments and of the result; raises ValueError."""
    match = _SIGNATURE.fullmatch(signature.strip())
    if match is None:
        raise ValueError("must be like `(ListNode, integer) -> ListNode`")
    parameters, start, depth = [], 0, 0
    text = match[1].strip()
    for position, character in enumerate(f"{text}," if text else ""):
        depth += (character in "[<(") - (character in "]>)")
        if character == "," and depth == 0:
            parameters.append(text[start:position].rpartition(":")[2].strip())
            start = position + 1
    return parameters, (match[2] or "").strip()


def _read_annotations(target: Callable[..., Any]) -> tuple[list[str], str]:
    """Returns what a function says of its types; nothing for one that cannot be asked."""
    function = inspect.unwrap(target)
    try:
        annotations = function.__annotations__
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
    except AttributeError:
        return [], ""
    types = [_type_name(annotations.get(name)) for name in names if name not in ("self", "cls")]
    return types, _type_name(annotations.get("return"))


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _is_node(type_: str) -> bool:
    return "ListNode" in type_ or "TreeNode" in type_


def _is_list(type_: str) -> bool:
    return type_.endswith("[]") or "list[" in type_.lower()


def _fill_empty(value: Any, type_: str) -> Any:
    """Returns a value with empty lists for the lists and trees without nodes in it."""
    if not _is_node(type_):
        return value
    if value is None:
        return []
    return [[] if item is None else item for item in value] if _is_list(type_) else value


def _run_operations(kind: Callable[..., Any], arguments: list[Any]) -> list[Any]:
    names, each = arguments
    instance = kind(*each[0])
    return [None, *(getattr(instance, name)(*given) for name, given in zip(names[1:], each[1:]))]  # noqa: B905


def to_json(value: Any, max_items: int) -> str:
    """Returns a result as JSON; raises TypeError for what has no such form, and whatever the result's methods raise.

    Sets are sorted where they can be, iterators and generators run for `max_items` at most, numbers of other types are
    integers or floats, dates texts, linked lists and trees LeetCode's lists.
    """

    def convert(other: Any) -> Any:
        return _as_json(other, max_items)

    try:
        return json.dumps(value, default=convert)
    except TypeError:
        return json.dumps(_with_plain_keys(value, convert), default=convert)


def _with_plain_keys(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Returns a value whose dictionaries have keys that JSON has."""
    if isinstance(value, dict):
        plain = (type(None), bool, int, float, str)
        return {
            key if isinstance(key, plain) else convert(key): _with_plain_keys(item, convert)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_with_plain_keys(item, convert) for item in value]
    return value


def _as_json(value: Any, max_items: int) -> Any:
    """Returns a value that JSON has for one that it has not."""
    if isinstance(value, (set, frozenset)):
        try:
            return sorted(value)
        except TypeError:
            return list(value)
    if hasattr(value, "tolist"):  # numpy's
        return value.tolist()
    if isinstance(value, (Decimal, Fraction)):
        return int(value) if value == int(value) else float(value)
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "left") and hasattr(value, "right") and hasattr(value, "val"):
        return from_tree_node(value)
    if hasattr(value, "next") and hasattr(value, "val"):
        return from_list_node(value)
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray, memoryview)):
        return list(_bounded(iter(value), max_items))
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _bounded(items: Iterator[Any], most: int) -> Iterator[Any]:
    yield from islice(items, most)
    if next(items, items) is not items:
        raise ValueError(f"the result has more than {most} items")
