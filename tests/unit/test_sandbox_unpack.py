"""Archives of callers: what is in them comes out, and an entry that reaches out of the folder is named."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.sandbox.agent.archive import write_files
from services.sandbox.agent.protocol import memory_file
from services.sandbox.agent.unpack import Placement, Unpacker, pack, pack_in_fork, unpack_as

Add = Callable[[tarfile.TarFile], None]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[int]:
    """Descriptor of an empty working folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def unpack(home: int, content: bytes, folder: str = "", strip: int = 0) -> str:
    file = memory_file(content)
    try:
        return unpack_as(None, home, file, Placement(folder, strip, 100))
    finally:
        os.close(file)


def make_tar(*members: tuple[str, bytes | None, dict[str, object]], mode: str = "w") -> bytes:
    """A tar of (name, content, fields of the entry)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content, fields in members:
            member = tarfile.TarInfo(name)
            member.size = len(content or b"")
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(content or b""))
    return file.getvalue()


def make_zip(*members: tuple[str, bytes, int]) -> bytes:
    """A zip of (name, content, mode)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_is_unpacked_with_its_links_modes_and_times(tmp_path: Path, home: int, mode: str) -> None:
    content = make_tar(
        ("./", None, {"type": tarfile.DIRTYPE}),
        ("./a/b.txt", b"text", {"mtime": 5}),
        ("a/run", b"#!", {"mode": 0o755}),
        ("a/same", None, {"type": tarfile.LNKTYPE, "linkname": "./a/b.txt"}),
        ("d/link", None, {"type": tarfile.SYMTYPE, "linkname": "../a/b.txt"}),
        ("empty/", None, {"type": tarfile.DIRTYPE}),
        mode=mode,
    )
    assert unpack(home, content, "in/here") == ""
    top = tmp_path / "home/in/here"
    assert (top / "d/link").read_text() == (top / "a/same").read_text() == "text"
    assert (top / "a/b.txt").stat().st_mtime == 5
    assert stat.S_IMODE((top / "a/run").stat().st_mode) == 0o700
    assert (top / "empty").is_dir()


def test_a_zip_is_unpacked_over_what_is_there(tmp_path: Path, home: int) -> None:
    (tmp_path / "home/x").symlink_to("/etc/passwd")
    content = make_zip(("x", b"new", 0o644), ("l", b"d/y", stat.S_IFLNK | 0o777), ("d/y", b"1" * 100_000, 0o755))
    assert unpack(home, content) == ""
    assert (tmp_path / "home/x").read_text() == "new"
    assert (tmp_path / "home/l").read_text() == "1" * 100_000


def test_leading_folders_are_taken_off(tmp_path: Path, home: int) -> None:
    members = [("top/", None, {"type": tarfile.DIRTYPE}), ("top/a/x", b"1", {}), ("pax", b"", {})]
    link = {"type": tarfile.LNKTYPE, "linkname": "top/a/x"}
    assert unpack(home, make_tar(*members, ("top/same", None, link)), strip=1) == ""
    assert {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"x": "1", "same": "1"}


SYMLINK = {"type": tarfile.SYMTYPE}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (make_tar(("/etc/x", b"", {})), "the entry '/etc/x' has an absolute path"),
        (make_tar(("a/../../x", b"", {})), "the entry 'a/../../x' leaves the folder"),
        (make_tar(("x", b"", {}), ("./x", b"", {})), "the entry './x' is there twice"),
        (make_tar(("l", None, {**SYMLINK, "linkname": "/etc"})), "the entry 'l' links out of the folder, to '/etc'"),
        (make_tar(("d/l", None, {**SYMLINK, "linkname": "../../x"})), "the entry 'd/l' links out of the folder"),
        (make_tar(("l", None, {**SYMLINK, "linkname": "."}), ("l/x", b"", {})), "the entry 'l/x' lies below a file or"),
        (make_tar(("h", None, {"type": tarfile.LNKTYPE, "linkname": "x"})), "'h' links to 'x', which is no earlier"),
        (make_tar(("h", None, {"type": tarfile.LNKTYPE, "linkname": "../x"})), "the entry '../x' leaves the folder"),
        (make_tar(("n", None, {"type": tarfile.CHRTYPE})), "the entry 'n' is neither a file nor a folder nor a link"),
        (make_tar(("p", None, {"type": tarfile.FIFOTYPE})), "the entry 'p' is neither"),
        (make_tar(("a" * 300, b"", {})), "has too long a path"),
        (make_tar(*((f"f{index}", b"", {}) for index in range(101))), "the entry 'f100' is one more than limits.files"),
        (make_tar(("x", b"x" * 20_000, {}))[:9000], "it is damaged"),
        (make_tar(("x", b"x" * 20_000, {}), mode="w:gz")[:50], "it is damaged"),
        (make_zip(("../x", b"", 0)), "the entry '../x' leaves the folder"),
        (make_zip(("l", b"/etc", stat.S_IFLNK)), "the entry 'l' links out of the folder"),
        (make_zip(("s", b"", stat.S_IFSOCK)), "the entry 's' is neither"),
        (make_zip(("x", b"text", 0))[:-30], "it is damaged"),
        (b"Rar!", "it is neither a tar nor a tar.gz nor a zip"),
    ],
)
def test_what_reaches_out_of_the_folder_is_refused_by_name(
    tmp_path: Path, home: int, content: bytes, reason: str
) -> None:
    assert reason in unpack(home, content)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,3}(/[a-z]{4,6}){0,2}\.x", fullmatch=True), st.binary(max_size=300), max_size=4
    )
)
def test_what_is_packed_comes_out_again(files: dict[str, bytes]) -> None:
    with TemporaryDirectory() as first, TemporaryDirectory() as second, TemporaryFile() as packed:
        write_files(first, [(path, content, False) for path, content in files.items()])
        source, target = (os.open(folder, os.O_RDONLY) for folder in (first, second))
        pack(source, packed.fileno(), 1 << 20)
        Unpacker(target, Placement("", 0, 100)).unpack(packed)
        found = {str(path.relative_to(second)): path.read_bytes() for path in Path(second).rglob("*.x")}
        os.close(source)
        os.close(target)
    assert found == files


def test_a_folder_that_is_too_large_is_not_packed_in_part(tmp_path: Path, home: int) -> None:
    (tmp_path / "home/large").write_bytes(bytes(10_000))
    output = memory_file(b"")
    assert pack_in_fork(home, ".", output, 5000) == "the archive is larger than 5000 bytes"
    assert os.fstat(output).st_size == 0
    assert pack_in_fork(home, "absent", output, 5000) == "No such file or directory"
    os.close(output)
