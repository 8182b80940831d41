"""The worked examples of CONTRIBUTING.md work as they stand there, each in a copy of the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = re.findall(r"^## (Adding .+)$", PAGE, flags=re.MULTILINE)
COPIED = ("perigee", "services", "protos", "tools", "pyproject.toml")


@dataclass(frozen=True)
class Edit:
    """A code block below the path of its file: the whole of a new file, or the lines that change in another."""

    path: str
    language: str
    text: str

    def apply(self, root: Path) -> None:
        """Writes the file, or replaces the one place in it that has the block's lines without a plus."""
        file = root / self.path
        if self.language != "diff":
            assert not file.exists(), f"{self.path} exists: show what changes as a diff"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.text)
            return
        for hunk in self.text.split("...\n"):
            before, after = side(hunk, "-"), side(hunk, "+")
            content = file.read_text()
            assert content.count(before) == 1, f"{self.path} has {content.count(before)} places like\n{before}"
            file.write_text(content.replace(before, after))


def side(hunk: str, sign: str) -> str:
    """The lines of a diff before (`-`) or after (`+`) the change."""
    return "".join(line[1:] or "\n" for line in hunk.splitlines(keepends=True) if line[:1] in (" ", "\n", sign))


def edits_of(section: str) -> Iterator[Edit]:
    """The code blocks of a section whose files are named in the line above."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    for path, language, block in re.findall(r"`([\w./-]+)`:\n\n```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Edit(path, language, block)


def run(command: list[str], root: Path) -> None:
    """Runs a command in the copy; fails with what it printed."""
    environment = os.environ | {"PYTHONPATH": str(root), "VENV": sys.prefix}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("section", SECTIONS)
def test_the_example_works(section: str, tmp_path: Path) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    edits = list(edits_of(section))
    for edit in edits:
        edit.apply(tmp_path)
    if any(edit.path.endswith(".proto") for edit in edits):
        run(["tools/protos.sh"], tmp_path)
    [test] = [edit.path for edit in edits if edit.path.startswith("tests/")]
    run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test], tmp_path)


def test_there_are_four_examples() -> None:
    assert [section.split()[2] for section in SECTIONS] == ["verifier", "recipe", "RPC", "algorithm"]
