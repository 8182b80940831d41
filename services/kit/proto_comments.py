"""The comments of the protos, which generated code drops but the stubs (.pyi) beside it keep as docstrings."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path


@cache
def comments_of(module_name: str) -> dict[str, str]:
    """The comments of an imported module's stub, by `Message`, `Message.field`, `ENUM_VALUE` and `Servicer.Method`.

    Empty where there is no stub.
    """
    file = getattr(sys.modules.get(module_name), "__file__", None)
    stub = Path(file).with_suffix(".pyi") if file else None
    if stub is None or not stub.exists():
        return {}
    return dict(_read_comments(ast.parse(stub.read_text(encoding="utf-8")).body, ""))


def _read_comments(nodes: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    for node, following in zip(nodes, [*nodes[1:], None], strict=True):
        if isinstance(node, ast.ClassDef):
            if text := ast.get_docstring(node):
                yield f"{prefix}{node.name}", text
            yield from _read_comments(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            if text := ast.get_docstring(node):
                yield f"{prefix}{node.name}", text
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            match following:
                case ast.Expr(ast.Constant(str(text))):
                    yield f"{prefix}{node.target.id}", inspect.cleandoc(text)
