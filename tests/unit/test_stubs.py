"""The committed stubs are what the protos generate."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_stubs_are_current(tmp_path: Path) -> None:
    environment = {"VENV": str(Path(sys.prefix)), "PATH": "/usr/bin:/bin"}
    subprocess.run([ROOT / "tools/protos.sh", tmp_path], check=True, env=environment)
    generated = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*"))
    committed = sorted(path.relative_to(ROOT) for path in (ROOT / "perigee").rglob("*_pb2*") if path.suffix != ".pyc")
    assert generated == committed
    stale = [str(path) for path in generated if (tmp_path / path).read_bytes() != (ROOT / path).read_bytes()]
    assert stale == [], "run make protos"
