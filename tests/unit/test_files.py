"""Files that survive a crash: atomic writes, staging folders, JSON lines."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from perigee.errors import DataLossError, FailedPreconditionError
from perigee.files import (
    Journal,
    append_lines,
    read_lines,
    remove_stale_staging,
    staging_folder,
    write_atomically,
    write_lines,
)


def test_lines_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    with Journal(path) as journal:
        assert journal.lines == []
        journal.append([{"id": "ä", "n": 1}, {"id": "b\n", "n": None}])
        journal.append([])
        journal.append([{"id": "\u2028"}])
    with Journal(path) as journal:
        assert journal.lines == [{"id": "ä", "n": 1}, {"id": "b\n", "n": None}, {"id": "\u2028"}]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_a_crash_cut_goes(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append([{"id": "a"}])
        journal.append([{"id": "b"}])
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path) as journal:
        assert journal.lines == [{"id": "a"}]
        journal.append([{"id": "c"}])
    with Journal(path) as journal:
        assert journal.lines == [{"id": "a"}, {"id": "c"}]


def test_damage_elsewhere_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"id": "a"}\n{"id": \n{"id": "c"}\n')
    with pytest.raises(DataLossError, match=r"journal\.jsonl:2 is not JSON"):
        Journal(path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        with pytest.raises(FailedPreconditionError, match="in use by another process"):
            Journal(path)
        journal.append([{"id": "a"}])
    with Journal(path) as journal:
        assert journal.lines == [{"id": "a"}]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    write_lines(path, [{"id": "a"}])
    with pytest.raises(ValueError, match="JSON"):
        write_lines(path, [{"id": "b"}, {"id": float("nan")}])
    assert path.read_text() == '{"id": "a"}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_appending_mends_a_torn_line_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_lines(path, [{"id": "a"}])
    with path.open("ab") as file:
        file.write(b'{"id": "' + b"x" * 200_000)
    assert read_lines(path) == [{"id": "a"}]
    append_lines(path, [{"id": "b"}])
    assert path.read_text() == '{"id": "a"}\n{"id": "b"}\n'


def test_a_file_that_is_torn_from_its_first_byte_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"id"')
    append_lines(path, [{"id": "a"}])
    assert read_lines(path) == [{"id": "a"}]


def test_no_file_holds_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "none.jsonl") == []


def test_a_failed_append_leaves_the_file_as_it_was() -> None:
    before = b'{"id": "a"}\n'
    limit = (len(before) + 5, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    code = (
        "import json, pathlib, resource, signal, sys\n"
        "from perigee.files import append_lines\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, {limit})\n"
        "append_lines(pathlib.Path(sys.argv[1]), [{'id': 'a line past the limit'}])\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lines.jsonl")
        path.write_bytes(before)
        ended = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
        assert "File too large" in ended.stderr
        assert path.read_bytes() == before


def test_a_folder_appears_complete_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("old", "new"):
        with staging_folder(target) as staging:
            (staging / "inner").mkdir()
            (staging / "inner" / "file").write_text(text)
            assert not target.exists() or (target / "inner" / "file").read_text() == "old"
    assert (target / "inner" / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with staging_folder(tmp_path / "model") as staging:
            (staging / "file").write_text("x")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".model.0123abcd").mkdir()
    (tmp_path / "model").mkdir()
    remove_stale_staging(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, b"old")
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, (b"x" * (1 // n) for n in (1, 0)))
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_an_atomic_write_leaves_no_staging_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", b"one")
    write_atomically(tmp_path / "x", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "two"
