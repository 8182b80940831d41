"""Lines that survive a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from perigee.cli.journal import Journal, write_lines
from perigee.errors import DataLossError, FailedPreconditionError


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


def test_damage_elsewhere_is_told(tmp_path: Path) -> None:
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
