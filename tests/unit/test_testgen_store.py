"""The store of results: nothing that counts is lost, nothing half-written counts."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perigee.errors import DataLossError, FailedPreconditionError
from perigee.testgen.store import RunRecord, Store, sha256

OUTPUTS = [b"one\n", b"two", b"one\n", b"\xff\x00"]


def fill(folder: Path) -> list[RunRecord]:
    records = [RunRecord("OK", sha256(output)) for output in OUTPUTS] + [RunRecord("TIME_LIMIT", reason="ü 100 ms")]
    with Store(folder) as store:
        for number, record in enumerate(records):
            store.add(f"key{number}", f"run {number}", record, OUTPUTS[number] if record.output else b"")
    return records


def test_results_are_there_again(tmp_path: Path) -> None:
    records = fill(tmp_path)
    with Store(tmp_path) as store:
        assert [store.find(f"key{number}") for number in range(5)] == records
        assert [store.read(record.output) for record in records[:4]] == OUTPUTS
        assert store.find("key5") is None
    assert len(list((tmp_path / ".make-tests" / "blobs").iterdir())) == 3
    assert list((tmp_path / ".make-tests" / "staging").iterdir()) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(share=st.floats(0, 1))
def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = tmp_path_factory.mktemp("problem")
    records = fill(folder)
    journal = folder / ".make-tests" / "journal.jsonl"
    whole = journal.read_bytes()
    size = round(share * len(whole))
    os.truncate(journal, size)
    lines = whole[:size].count(b"\n")
    with Store(folder) as store:
        assert [store.find(f"key{number}") for number in range(5)] == [*records[:lines], *[None] * (5 - lines)]
        store.add("new", "the next run", records[-1], b"")
    with Store(folder) as store:
        assert store.find("new") == records[-1]
        assert len(store) == lines + 1


def test_a_line_that_is_damaged_is_reported(tmp_path: Path) -> None:
    fill(tmp_path)
    journal = tmp_path / ".make-tests" / "journal.jsonl"
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([lines[0], b"{broken", *lines[2:]]) + b"\n")
    with pytest.raises(DataLossError, match=r"journal\.jsonl:2 is not JSON: .*; remove the line"), Store(tmp_path):
        pass


def test_a_result_without_its_output_is_none(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / ".make-tests" / "blobs" / sha256(b"two")).unlink()
    with Store(tmp_path) as store:
        assert store.find("key1") is None
        assert store.find("key0") is not None


def test_an_output_that_is_damaged_is_reported(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / ".make-tests" / "blobs" / sha256(b"two")).write_bytes(b"tow")
    with Store(tmp_path) as store, pytest.raises(DataLossError, match="is damaged; remove it"):
        store.read(sha256(b"two"))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(FailedPreconditionError, match="another make-tests"), Store(tmp_path):
        pass
    with Store(tmp_path):
        pass


def test_a_line_that_could_not_be_synced_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = fill(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Store(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match="Input/output"):
                store.add("lost", "a run", records[-1], b"")
        assert store.find("lost") is None
        store.add("kept", "a run", records[-1], b"")
    with Store(tmp_path) as store:
        assert store.find("lost") is None
        assert store.find("kept") == records[-1]
