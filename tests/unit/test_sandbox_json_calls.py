"""Function tests' calls with JSON, in LeetCode's forms."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.sandbox.agent.json_calls import make_json_call, read_signature, to_json
from services.sandbox.agent.submission import LoadError, find_function, load_module

MOST = 1000
LINKED = "class Solution:\n    def f(self, head: Optional[ListNode]) -> Optional[ListNode]:\n        return {}"
TREE = "class Solution:\n    def f(self, root: {}) -> {}:\n        return {}"


def call(source: str, arguments: Any, name: str = "f", signature: str = "") -> Any:
    names = load_module(source.encode(), name, "submission.py")
    function = make_json_call(find_function(names, name), signature, names)
    return json.loads(to_json(function(json.dumps(arguments).encode()), MOST))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("np.int64(3)", 3),
        ("np.array([[1, 2]])", [[1, 2]]),
        ("{np.int64(1): np.float64(0.5)}", {"1": 0.5}),
        ("deque([1, deque([2])])", [1, [2]]),
        ("Counter('aab')", {"a": 2, "b": 1}),
        ("defaultdict(list, a=[1])", {"a": [1]}),
        ("OrderedDict(b=1, a=2)", {"b": 1, "a": 2}),
        ("Decimal('0.5')", 0.5),
        ("[Decimal(2), Fraction(1, 4), Fraction(4, 2)]", [2, 0.25, 2]),
        ("{3, 1, 2}", [1, 2, 3]),
        ("frozenset({'b', 'a'})", ["a", "b"]),
        ("(i for i in range(3))", [0, 1, 2]),
        ("[map(str, [1]), zip([1], [2]), {1: 2}.keys(), range(2)]", [["1"], [[1, 2]], [1], [0, 1]]),
        ("date(2020, 2, 29)", "2020-02-29"),
        ("namedtuple('P', 'x y')(1, 2)", [1, 2]),
        ("P(1, [P(2)])", {"x": 1, "y": [{"x": 2, "y": None}]}),
    ],
)
def test_results_have_a_form_in_json(body: str, expected: Any) -> None:
    source = (
        "import numpy as np\nfrom collections import *\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
        "from datetime import date\nfrom dataclasses import dataclass\n"
        f"@dataclass\nclass P:\n    x: int\n    y: object = None\ndef f(): return {body}"
    )
    assert call(source, []) == expected


@pytest.mark.parametrize("body", ["1j", "b'a'", "object()", "iter(int, 1)", "{(1, 2): 3}", "len"])
def test_some_results_have_none(body: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        call(f"def f(): return {body}", [])


def test_a_coroutine_is_run() -> None:
    assert call("import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 1", [1]) == 2


LRU = """
class LRUCache:
    def __init__(self, capacity: int): self.capacity, self.d = capacity, OrderedDict()
    def get(self, key): return self.d.get(key, -1)
    def put(self, key, value): self.d[key] = value
"""


def test_a_class_is_called_with_a_list_of_operations() -> None:
    operations = [["LRUCache", "put", "get", "get"], [[2], [1, 5], [1], [3]]]
    assert call(LRU, operations, "LRUCache") == [None, None, 5, -1]


@pytest.mark.parametrize(
    ("source", "arguments", "signature", "expected"),
    [
        (LINKED.format("head"), [[1, 2, 3]], "", [1, 2, 3]),
        (LINKED.format("head.next"), [[1]], "", []),
        (LINKED.format("ListNode(0, head)"), [[]], "", [0]),
        ("def f(a, b): return b", [1, [1]], "(integer, ListNode) -> ListNode", [1]),
        ("def f(a): return a[0].next", [[[1, 2], []]], "(ListNode[]) -> ListNode", [2]),
        ("def f(a): return a", [[[1], []]], "(List[Optional[ListNode]]) -> ListNode[]", [[1], []]),
        ("class ListNode:\n    def __init__(self, x): self.val, self.next = x, 0\ndef f(a): return type(a)(1).next",
         [[1]], "(ListNode) -> integer", 0),
        ("class Solution:\n    def f(self, a: 'List[ListNode]'): return a[0].val", [[[7]]], "", 7),
        (TREE.format("TreeNode", "TreeNode", "root"), [[1, None, 2, 3]], "", [1, None, 2, 3]),
        (TREE.format("TreeNode", "List[TreeNode]", "[root.left, None]"), [[1, 4]], "", [[4], []]),
        (TREE.format("Optional[TreeNode]", "int", "root.right.left.val"), [[1, None, 2, 3]], "", 3),
        (TREE.format("Optional[TreeNode]", "Optional[TreeNode]", "root"), [[]], "", []),
        ("class Solution:\n    def f(self, nums: List[int], k: int) -> None: nums.sort()", [[2, 1], 0],
         "(nums: integer[], k: integer) -> void", [1, 2]),
    ],
)  # fmt: skip
def test_lists_and_trees_are_leetcode_s(source: str, arguments: Any, signature: str, expected: Any) -> None:
    assert call(source, arguments, signature=signature) == expected


def test_a_list_with_a_cycle_has_no_form() -> None:
    with pytest.raises(ValueError, match="cycle"):
        call("def f(a):\n    a.next = a\n    return a", [[1]], signature="(ListNode) -> ListNode")


def test_an_imported_function_is_not_taken_for_a_method() -> None:
    source = "class Solution:\n    def add(self, a: int, b: int) -> int: return add(a, b) + sqrt(b)"
    assert call(source, [1, 4], "add") == 7
    assert call("add = lambda a: a\nclass Solution:\n    def add(self): return 1", [5], "add") == 5


@pytest.mark.parametrize("name", ["f", "Solution.f", "Solution().f"])
def test_methods_of_the_class_solution_are_functions(name: str) -> None:
    source = "class Solution:\n    n = 0\n    def f(self, x: int) -> int:\n        self.n += x\n        return self.n"
    names = load_module(source.encode(), name, "submission.py")
    function = find_function(names, name)
    assert (function(1), function(1)) == (1, 1)
    with pytest.raises(LoadError, match=r"the function Solution\.g is not defined"):
        find_function(names, "Solution.g")


def test_signatures() -> None:
    assert read_signature("(a: dict[str, int], ListNode) -> int") == (["dict[str, int]", "ListNode"], "int")
    assert read_signature("()") == ([], "")
    with pytest.raises(ValueError, match="must be like"):
        read_signature("ListNode -> int")
