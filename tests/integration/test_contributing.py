"""The worked examples of CONTRIBUTING.md work as they stand there, in one copy of the tree."""

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

pytestmark = pytest.mark.timeout(300)  # the first test waits for all examples


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


def run(command: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in the copy."""
    environment = os.environ | {"PYTHONPATH": str(root), "VENV": sys.prefix}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=140, check=False)


@dataclass(frozen=True)
class Tree:
    """A copy of the tree with every example in it, and what pytest printed of their tests."""

    tests: dict[str, str]
    printed: str


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The stubs are made and the tests are run once for all examples, which takes most of the time."""
    root = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        if (ROOT / name).is_dir():
            # With the bytecode, but for what is being written.
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.pyc.*"))
        else:
            shutil.copy(ROOT / name, root / name)
    edits = [(section, edit) for section in SECTIONS for edit in edits_of(section)]
    for _, edit in edits:
        edit.apply(root)
    done = run(["tools/protos.sh"], root)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = {section: edit.path for section, edit in edits if edit.path.startswith("tests/")}
    # The example of a recipe key needs Megatron.
    plugins = ("-p", "no:cacheprovider", "-p", "services.trainer.preload")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", *plugins, *tests.values()]
    done = run(command, root)
    return Tree(tests, done.stdout + done.stderr)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_example_works(tree: Tree, section: str) -> None:
    path = re.escape(tree.tests[section])
    results = re.findall(rf"^(PASSED|FAILED|ERROR|SKIPPED) .*{path}\b", tree.printed, re.MULTILINE)
    assert set(results) == {"PASSED"}, tree.printed


def test_there_are_four_examples() -> None:
    assert [section.split()[2] for section in SECTIONS] == ["verifier", "recipe", "RPC", "algorithm"]
