"""Submissions of function and code tests: loaded as a module, with the function or class that the tests name."""

from __future__ import annotations

import builtins
import functools
import linecache
import re
import sys
import traceback
import types
from collections.abc import Callable, Coroutine
from importlib import import_module
from typing import Any

MESSAGE_CHARACTERS = 1000
FUNCTION_NAME = re.compile(r"[^\W\d]\w*(?:(?:\(\))?\.[^\W\d]\w*)?")
"""Function, class, or method of a class: `f`, `Solution.f`, `Solution().f`."""


def split_names(function_names: str) -> list[str]:
    """Returns the names of functions that stand with commas between them."""
    return [name.strip() for name in function_names.split(",")]


_METHOD_CLASS = "Solution"
_IMPORTED = ("typing", "collections", "itertools", "functools", "heapq", "bisect", "operator", "string", "math")
"""Modules that LeetCode's programs use, and whose names, without importing them."""
_IMPORTED_BY_NAME = ("copy", "datetime", "random", "re", "sys")
"""Modules that they use by their own names."""


class LoadError(Exception):
    """Submission that does not compile, raises while it is loaded, or lacks the function."""

    def __init__(self, message: str, does_not_compile: bool = False) -> None:
        super().__init__(message)
        self.does_not_compile = does_not_compile


class ListNode:
    """Node of a linked list."""

    def __init__(self, val: Any = 0, next: ListNode | None = None) -> None:
        self.val = val
        self.next = next


class TreeNode:
    """Node of a binary tree."""

    def __init__(self, val: Any = 0, left: TreeNode | None = None, right: TreeNode | None = None) -> None:
        self.val = val
        self.left = left
        self.right = right


def load_module(source: bytes, function_names: str, path: str) -> dict[str, Any]:
    """Loads a submission as a module and returns its names; raises LoadError.

    It finds ListNode and TreeNode there, and the usual imports where a class is tested, as LeetCode has it.
    """
    text = source.decode(errors="replace")
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LoadError(describe_exception(error), does_not_compile=True) from None
    module = types.ModuleType("submission")
    module.__dict__.update(ListNode=ListNode, TreeNode=TreeNode)
    classes = [_METHOD_CLASS, *(name.partition(".")[0].removesuffix("()") for name in split_names(function_names))]
    if re.search(rf"^class (?:{'|'.join(classes)})\b", text, re.MULTILINE):
        module.__dict__.update(_leetcode_names())
    module.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["submission"] = module
    try:
        exec(code, module.__dict__)
    except BaseException as error:  # even SystemExit is the submission's failure
        raise LoadError(describe_exception(error)) from None
    return module.__dict__


def _leetcode_names() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for module in map(import_module, _IMPORTED):
        public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        names.update({name: getattr(module, name) for name in public if not hasattr(builtins, name)})
        names[module.__name__] = module
    return {**names, **{name: import_module(name) for name in _IMPORTED_BY_NAME}}


def find_function(names: dict[str, Any], name: str) -> Callable[..., Any]:
    """Returns what is named, or the method of that name of the class Solution, called on an instance of its own each
    time; raises LoadError.
    """
    holder, _, method = name.rpartition(".")
    function: Callable[..., Any] | None = None if holder else names.get(name)
    kind = names.get(holder.removesuffix("()") or _METHOD_CLASS)
    # an imported function may have the name of a method
    is_own = callable(function) and getattr(function, "__module__", None) == "submission"
    if not is_own and isinstance(kind, type) and hasattr(kind, method):
        function = _method_of(kind, method)
    if not callable(function):
        raise LoadError(f"the function {name} is not defined")
    return function


def _method_of(kind: type, name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(kind, name))
    def call(*arguments: Any, **keywords: Any) -> Any:
        return getattr(kind(), name)(*arguments, **keywords)

    return call


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Returns what a coroutine returns."""
    import asyncio  # takes long, and few submissions need it

    return asyncio.run(coroutine)


def describe_exception(error: BaseException) -> str:
    """Returns class and message of an exception, 2,000 characters at most, whatever it does while it is described."""
    try:
        return "".join(traceback.format_exception_only(type(error), error)).strip()[-2 * MESSAGE_CHARACTERS :]
    except BaseException:  # exceptions of a submission may raise while they are described
        return type(error).__name__
