"""Prints what the code of each service and package measures: files, lines, functions, docstrings, imports.

Generated stubs are left out, and `__init__.py` files are counted apart. The import depth of a package is the number of
modules on the longest chain of imports among its own modules, each circle taken as one module; imports inside functions
and for type checkers count, and the import of a package stands for its `__init__.py`.

    python tools/measure_code.py [ROOT]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

STUB_ENDINGS = ("_pb2.py", "_pb2_grpc.py")
COLUMNS = ["package", "files", "+init", "lines", "functions", "mean", "docstrings", "longest", "depth", "circles"]
Graph = Mapping[str, set[str]]


@dataclass(frozen=True)
class Module:
    """A hand-written file under its dotted name."""

    name: str
    path: Path

    @property
    def tree(self) -> ast.Module:
        """The parsed file, which is not kept: all of them together keep the garbage collector busy."""
        return ast.parse(self.path.read_text())

    @cached_property
    def lines(self) -> int:
        """Lines of the file."""
        return len(self.path.read_text().splitlines())

    @property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Functions and methods, inner ones too."""
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]

    @cached_property
    def imports(self) -> tuple[str, ...]:
        """Dotted names that the file imports, `a.b.c` for `from a.b import c`."""
        return tuple(self._find_imports())

    def _find_imports(self) -> Iterator[str]:
        package = self.name.split(".")[: None if self.path.name == "__init__.py" else -1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                start = ".".join([*base, *filter(None, [node.module])])
                yield from (f"{start}.{alias.name}" for alias in node.names)


def read_modules(root: Path, folder: str) -> dict[str, Module]:
    """The hand-written modules below `folder`, by name; directly in it for `folder/*`."""
    modules = {}
    for path in sorted(root.glob(f"{folder}.py" if folder.endswith("*") else f"{folder}/**/*.py")):
        if not path.name.endswith(STUB_ENDINGS):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            modules[name] = Module(name, path)
    return modules


def import_graph(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """Which of the modules each one imports."""

    def targets(name: str) -> Iterator[str]:
        for imported in modules[name].imports:
            found = imported if imported in modules else imported.rpartition(".")[0]
            if found in modules and found != name:
                yield found

    return {name: set(targets(name)) for name in modules}


def find_circles(graph: Graph) -> list[list[str]]:
    """Sets of modules that import one another."""
    return [component for component in components_of(graph) if len(component) > 1]


def components_of(graph: Graph) -> list[list[str]]:
    """Strongly connected components, importers after what they import (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            start = stack.index(node)
            found.append(sorted(stack[start:]))
            del stack[start:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def longest_chain(graph: Graph) -> list[str]:
    """Names along the longest chain of imports, importers first; a circle is one step, shown by one of its modules."""
    chains: dict[str, list[str]] = {}
    for component in components_of(graph):
        below = {target for node in component for target in graph[node]} - set(component)
        best = max((chains[target] for target in below), key=len, default=[])
        chains |= {node: [node, *best] for node in component}
    return max(chains.values(), key=len, default=[])


def measure(root: Path, folder: str) -> list[str]:
    """A row of the table."""
    modules = read_modules(root, folder)
    files = [module for module in modules.values() if module.path.name != "__init__.py"]
    functions = [function for module in modules.values() for function in module.functions]
    lengths = [(function.end_lineno or function.lineno) - function.lineno + 1 for function in functions]
    documented = sum(ast.get_docstring(function) is not None for function in functions)
    graph = import_graph(modules)
    longest = max(files, key=lambda module: module.lines, default=None)
    return [
        folder,
        str(len(files)),
        f"+{len(modules) - len(files)}",
        str(sum(module.lines for module in modules.values())),
        str(len(functions)),
        f"{sum(lengths) / max(len(lengths), 1):.1f}",
        f"{documented / max(len(functions), 1):.0%}",
        f"{longest.lines} {longest.path.relative_to(root / folder.removesuffix('/*'))}" if longest else "-",
        str(len(longest_chain(graph))),
        str(len(find_circles(graph))),
    ]


def folders_of(root: Path) -> list[str]:
    """The packages measured: each service, the client's parts, and both trees as wholes."""
    services = sorted(
        f"services/{path.name}" for path in (root / "services").iterdir() if (path / "__init__.py").exists()
    )
    clients = sorted(f"perigee/{path.name}" for path in (root / "perigee").iterdir() if (path / "__init__.py").exists())
    return [*services, *clients, "perigee/*", "services", "perigee"]


def main() -> None:
    """Prints the table."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    rows = [COLUMNS, *(measure(root, folder) for folder in folders_of(root))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    both = [int(row[column]) for row in rows[-2:] for column in (1, 2, 3)]
    print(f"hand-written: {both[2] + both[5]} lines in {both[0] + both[3]} files, and {both[1] + both[4]} __init__.py")


if __name__ == "__main__":
    main()
