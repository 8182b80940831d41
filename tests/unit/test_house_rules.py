"""Rules that keep the house: who imports whom, and how long a file may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("perigee", "services", "tests", "bench", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
]


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def test_services_import_no_other_service() -> None:
    crossings = []
    for path in (ROOT / "services").rglob("*.py"):
        service = path.relative_to(ROOT / "services").parts[0]
        allowed = {service, "kit"} | ({"weights"} if service in {"trainer", "rollout"} else set())
        for module in imported_modules(path):
            if module.startswith("services.") and module.split(".")[1] not in allowed:
                crossings.append(f"{path.relative_to(ROOT)} imports {module}")
    assert crossings == []


def test_clients_need_no_service() -> None:
    clients = [
        path for path in (ROOT / "perigee").rglob("*.py") if "cli" not in path.parts and "report" not in path.parts
    ]
    assert [str(path) for path in clients for module in imported_modules(path) if module.startswith("services")] == []


def test_files_stay_under_700_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: lines for path, lines in lengths.items() if lines > 700} == {}
