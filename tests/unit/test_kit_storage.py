"""Names of files and folders, pieces of a file, and folders that are published: whole, or without their marker."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import fsspec
import hypothesis
import hypothesis.strategies as st
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from perigee.errors import DataLossError, InvalidArgumentError, PerigeeError, ResourceExhaustedError, UnavailableError
from perigee.trainer.client import PIECE_BYTES, read_pieces
from services.kit import storage

part = st.text("abcXYZ019._-% é", min_size=1, max_size=8).filter(lambda text: text.strip(".") != "")
file_names = st.sets(st.from_regex(r"[a-z]{1,6}\.(json|bin)", fullmatch=True), min_size=1, max_size=6)


class FailingFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Memory whose writes and removals fail after a number of them, as of a process that dies."""

    protocol = "failing"
    store: dict[str, Any] = {}
    left = 0

    def _count(self) -> None:
        FailingFileSystem.left -= 1
        if FailingFileSystem.left < 0:
            raise ConnectionError("cut")

    def put_file(self, *arguments: Any, **options: Any) -> None:
        self._count()
        super().put_file(*arguments, **options)

    def rm_file(self, path: str) -> None:
        self._count()
        super().rm_file(path)


fsspec.register_implementation("failing", FailingFileSystem, clobber=True)


@hypothesis.given(parts=st.lists(part, min_size=1, max_size=4), trailing=st.booleans())
def test_a_url_keeps_its_slashes_and_a_path_is_a_path(parts: list[str], trailing: bool) -> None:
    end = "/" if trailing else ""
    joined = storage.join(f"s3://bucket{end}", *parts)
    assert joined == f"s3://bucket/{'/'.join(parts)}"
    assert storage.is_url(joined)
    assert storage.join(f"/folder{end}", *parts) == str(Path("/folder", *parts))
    assert not storage.is_url(storage.join("/folder", *parts))


@hypothesis.given(old=file_names, new=file_names, before=st.integers(0, 14))
def test_a_marker_stands_only_by_a_whole_folder(
    tmp_path_factory: pytest.TempPathFactory, old: set[str], new: set[str], before: int
) -> None:
    """Whatever was published before, and wherever the writer dies."""
    url, folder = f"failing://{uuid.uuid4().hex}", tmp_path_factory.mktemp("folder")
    FailingFileSystem.left = 100
    for generation, names in (("old", old), ("new", new)):
        if generation == "new":
            FailingFileSystem.left = before
        target = folder / generation
        target.mkdir()
        for name in (*names, "marker"):
            (target / name).write_text(f"{generation} {name}")
        with contextlib.suppress(UnavailableError):
            storage.publish_folder(target, url, "field", "marker")
    FailingFileSystem.left = 100
    found = {name: storage.read_file(storage.join(url, name), "field") for name in storage.list_files(url, "field")}
    if (marker := found.pop("marker", None)) is not None:
        generation, names = ("new", new) if marker == b"new marker" else ("old", old)
        assert found == {name: f"{generation} {name}".encode() for name in names}
    assert marker is not None or before < len(old) + len(new) + 2


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, 2 * PIECE_BYTES + 1])
def test_pieces_make_the_file_however_often_they_come(tmp_path: Path, size: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(itertools.islice(itertools.cycle(range(251)), size)))
    folder = tmp_path / "received"
    pieces = list(read_pieces(source))
    sent = [storage.receive_piece(folder, piece) for piece in pieces for _ in range(2)]
    assert set(sent[: 2 * len(pieces) - 2]) <= {""}
    assert Path(sent[-1]).read_bytes() == source.read_bytes()
    assert storage.receive_piece(folder, pieces[0]) == sent[-1]
    assert [path.name for path in folder.iterdir()] == [pieces[0].digest]


def test_a_damaged_file_and_a_wrong_digest_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"prompts")
    [piece] = read_pieces(source)
    piece.content = b"PROMPTS"
    with pytest.raises(DataLossError, match=f"instead of {piece.digest}: send it again"):
        storage.receive_piece(tmp_path / "received", piece)
    assert list((tmp_path / "received").iterdir()) == []
    piece.digest = "../escape"
    with pytest.raises(InvalidArgumentError, match=r"piece\.digest"):
        storage.receive_piece(tmp_path, piece)


def test_a_mirror_publishes_changes_and_brings_them_to_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "first"))
    first = storage.Mirror(url, "coordinator.run_path")
    run = first.path / "runs" / "r"
    (run / "tensorboard").mkdir(parents=True)
    (run / "tensorboard" / "events").write_text("1")
    (run / "metrics.jsonl").write_text("{}\n")
    (first.path / "last_run.json").write_text("{}")
    first.push(run)
    (run / "metrics.jsonl").write_text("{}\n{}\n")
    first.push(run)
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "second"))
    second = storage.Mirror(url, "coordinator.run_path")
    second.pull("last_run.json")
    assert [path.name for path in second.path.rglob("*") if path.is_file()] == ["last_run.json"]
    second.pull("runs/r")
    assert (second.path / "runs/r/metrics.jsonl").read_text() == "{}\n{}\n"
    assert (second.path / "runs/r/tensorboard/events").read_text() == "1"
    second.pull("runs/none")


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_a_file_that_a_full_disk_refuses_is_named_and_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path))
    name = f"{scheme}{tmp_path}/file"
    file = storage.StagedFile(name, "field")
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), file._file.fileno())
    # The buffer takes it, and the disk refuses it at the end.
    file.write(b"content")
    with pytest.raises(ResourceExhaustedError, match=f"field: {tmp_path}.*: No space left on device"):
        file.publish()
    file.discard()
    assert list(tmp_path.iterdir()) == []
    assert storage.list_files(name, "field") == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("none://a/b", "cannot be opened: Protocol not known: none"),
        ("memory://none/b", "does not exist"),
    ],
)
def test_what_no_library_reads_is_refused(url: str, message: str) -> None:
    with pytest.raises(PerigeeError, match=message):
        storage.local_folder(url, "trainer.model", lambda _: True)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.fsspec", None)
    with pytest.raises(InvalidArgumentError, match=r"model: s3://a/b needs .*pip install 'perigee-services\[s3\]'"):
        storage.local_folder("s3://a/b", "model", lambda _: True)


def test_hugging_face_out_of_reach_is_said_in_one_sentence(tmp_path: Path) -> None:
    """In a process of its own: the library reads its endpoint when it is imported."""
    program = "from services.kit.hf import fetch_model; fetch_model('hf://owner/model', 'trainer.model')"
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:1", storage.CACHE_VARIABLE: str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    message = "trainer.model: hf://owner/model cannot be reached; check network, address and credentials"
    assert message in ended.stderr.splitlines()[-1]
