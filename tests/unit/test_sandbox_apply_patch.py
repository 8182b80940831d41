"""Patches are applied as a whole, and what they do to protected files is undone, whatever they put in their way."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from services.sandbox.agent import apply_patch
from services.sandbox.agent.apply_patch import apply_all

TESTS = b"--- /dev/null\n+++ b/tests/test_a.py\n@@ -0,0 +1 @@\n+assert a\n"
CHANGE = b"--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-a = 0\n+a = 1\n"


def git(name: str, mode: str, line: str, *more: str) -> bytes:
    """A part of a diff by git that makes a file of one line; a link has no line's end."""
    head = [f"diff --git a/{name} b/{name}", f"new file mode {mode}", "--- /dev/null", f"+++ b/{name}", "@@ -0,0 +1 @@"]
    return "".join(f"{text}\n" for text in (*head, f"+{line}", *more)).encode()


REMOVED = (
    b"diff --git a/keep.cfg b/keep.cfg\ndeleted file mode 100644\n--- a/keep.cfg\n+++ /dev/null\n@@ -1 +0,0 @@\n-kept\n"
)
NEW = git("deep/conftest.py", "100644", "forged")
LINK = git("conftest.py", "120000", "/etc/passwd", "\\ No newline at end of file")
# `tests` becomes a link to a folder with tests of the patch's own.
REPLACED = (
    b"diff --git a/tests/test_a.py b/tests/test_a.py\ndeleted file mode 100644\n--- a/tests/test_a.py\n+++ /dev/null\n"
    b"@@ -1 +0,0 @@\n-assert a\n"
    + git("tests", "120000", "other", "\\ No newline at end of file")
    + git("other/test_a.py", "100644", "pass")
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository, in the folder where the program looks for it."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/a.py").write_text("a = 0\n")
    (tmp_path / "repository/keep.cfg").write_text("kept\n")
    return Path(apply_patch.ROOT)


def test_what_a_patch_does_to_protected_files_is_undone(root: Path) -> None:
    (root / "tests").mkdir()
    (root / "tests/test_a.py").write_text("assert a\n")
    tests = TESTS.replace(b"/dev/null", b"a/tests/test_a.py").replace(b"@@ -0,0 +1 @@", b"@@ -1 +1,2 @@\n assert a")
    ended = apply_all(root, tests, CHANGE + REMOVED + NEW + LINK + REPLACED, ["conftest.py", "keep.*"])
    assert ended == {"touched": ["tests/test_a.py"]}
    assert (root / "a.py").read_text() == "a = 1\n"
    assert (root / "keep.cfg").read_text() == "kept\n"
    assert (root / "tests/test_a.py").read_text() == "assert a\nassert a\n"
    assert not (root / "tests").is_symlink()
    assert list(root.rglob("conftest.py")) == []


def test_a_patch_may_change_the_files_of_the_test_patch(root: Path) -> None:
    other = git("tests/test_a.py", "100644", "assert not a")
    assert apply_all(root, TESTS, CHANGE + other, []) == {"touched": ["tests/test_a.py"]}
    assert (root / "a.py").read_text() == "a = 1\n"
    assert (root / "tests/test_a.py").read_text() == "assert a\n"


def test_a_patch_that_does_not_apply_changes_nothing(root: Path) -> None:
    ended = apply_all(root, b"", NEW + CHANGE.replace(b"a = 0", b"a = 2"), [])
    assert list(ended) == ["patch"]
    assert "patch failed: a.py:1" in ended["patch"]
    assert not (root / "deep").exists()
    assert list(apply_all(root, CHANGE.replace(b"a = 0", b"a = 2"), b"", [])) == ["test_patch"]


def test_outside_of_the_repository_nothing_is_written(root: Path) -> None:
    assert list(apply_all(root, b"", git("../out.py", "100644", "out"), [])) == ["patch"]
    assert list(apply_all(root, b"", git("out", "120000", "/tmp") + git("out/x", "100644", "out"), [])) == ["patch"]
    assert [path.name for path in root.parent.absolute().iterdir()] == ["repository"]


def test_files_of_a_base_replace_what_a_build_made_of_them(root: Path) -> None:
    base = Path(apply_patch.BASE)
    base.mkdir()
    (base / "keep.cfg").write_text("kept\n")
    (root / "keep.cfg").write_text("forged\n")
    (root / "keep.new").write_text("forged\n")
    apply_patch.restore(root, ["keep.*"], apply_patch.save(base, ["keep.*"]))
    assert sorted(path.name for path in root.iterdir()) == ["a.py", "keep.cfg"]
    assert (root / "keep.cfg").read_text() == "kept\n"


# configuration of a repository that has git run a program, and files that call for it
CONFIGURED = {
    "filter": ('[filter "x"]\n\tclean = touch ran\n\tsmudge = touch ran\n\trequired = true\n', "*.py filter=x\n"),
    "filter process": ('[filter "x"]\n\tprocess = touch ran\n', "* filter=x\n"),
    "fsmonitor": ("[core]\n\tfsmonitor = touch ran\n", ""),
    "hooks": ("[core]\n\thooksPath = .\n", ""),
    "diff driver": ('[diff "x"]\n\ttextconv = touch ran\n\tcommand = touch ran\n', "*.py diff=x\n"),
    "merge driver": ('[merge "x"]\n\tdriver = touch ran\n', "*.py merge=x\n"),
    "include": ("[include]\n\tpath = ../own\n", "*.py filter=x\n"),
    "alias": ("[alias]\n\tapply = !touch ran\n", ""),
}


@pytest.mark.parametrize("attack", CONFIGURED)
def test_a_repository_has_no_program_run(root: Path, attack: str) -> None:
    config, attributes = CONFIGURED[attack]
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    with (root / ".git/config").open("a") as file:
        file.write(config)
    (root / ".gitattributes").write_text(attributes)
    (root / "own").write_text(CONFIGURED["filter"][0])
    (root / "post-index-change").write_text("#!/bin/sh\ntouch ran\n")
    (root / "post-index-change").chmod(0o755)
    assert apply_all(root, b"", CHANGE, []) == {"touched": []}
    assert (root / "a.py").read_text() == "a = 1\n"
    assert list(root.parent.rglob("ran")) == []


# what a patch would have git read later, under names that `patch` would take
OF_GIT = {
    "hook": git(".git/hooks/pre-commit", "100755", "touch ran"),
    "hook, plainly": b"--- /dev/null\n+++ b/.git/hooks/pre-commit\n@@ -0,0 +1 @@\n+touch ran\n",
    "configuration": b"--- a/.git/config\n+++ b/.git/config\n@@ -0,0 +1 @@\n+[core]\n",
    "quoted": b'--- /dev/null\n+++ "b/\\056git/hooks/pre-commit"\n@@ -0,0 +1 @@\n+touch ran\n',
    "in capitals": b"--- /dev/null\n+++ b/.GIT/hooks/pre-commit\n@@ -0,0 +1 @@\n+touch ran\n",
    "of a module": b"--- /dev/null\n+++ b/module/.git/hooks/pre-commit\n@@ -0,0 +1 @@\n+touch ran\n",
    "a file that names a folder": b"--- /dev/null\n+++ b/module/.git\n@@ -0,0 +1 @@\n+gitdir: ../own\n",
    "by a rename": b"diff --git a/a.py b/.git/hooks/pre-commit\nsimilarity index 100%\n"
    b"rename from a.py\nrename to .git/hooks/pre-commit\n",
}


@pytest.mark.parametrize("attack", OF_GIT)
def test_a_patch_writes_nothing_that_is_gits_own(root: Path, attack: str) -> None:
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    before = sorted(path.relative_to(root) for path in root.rglob("*"))
    config = (root / ".git/config").read_text()
    assert list(apply_all(root, b"", OF_GIT[attack], [])) == ["patch"]
    assert sorted(path.relative_to(root) for path in root.rglob("*")) == before
    assert (root / ".git/config").read_text() == config


def test_a_patch_of_gits_own_files_does_not_apply_without_git(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as if there were no program to apply it, which is not the patch's fault."""
    programs = Path.cwd() / "programs"
    programs.mkdir()
    (programs / "patch").symlink_to(shutil.which("patch") or pytest.skip("needs patch"))
    monkeypatch.setenv("PATH", str(programs))
    assert apply_all(root, b"", OF_GIT["hook"], []) == {"patch": "it changes .git, which is git's own"}
    assert apply_all(root, b"", CHANGE, []) == {"touched": []}
