"""Archives of callers (tar, tar.gz, zip), unpacked below the working folder, and folders of it packed into a tar.

Both are streams of entries, read and written piece by piece in a process forked for it: what it imports and allocates
goes away with it, and its memory is charged to the job. Nothing is written through a link.
"""

from __future__ import annotations

import errno
import importlib
import os
import posixpath
import select
import signal
import stat
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from . import kernel
from .archive import FOLDER_FLAGS, make_folders
from .protocol import Message, RunRequest, RunResult

UNPACK_S = 60.0
_PIECE_BYTES = 1 << 16
_GZIP_PIECE_BYTES = 1 << 12
"""Deflate makes up to a thousand times as much of it."""
_NAME_BYTES, _PATH_BYTES = 255, 1024
_REASON_BYTES = 4000
_GZIP, _ZIP, _TAR, _TAR_OFFSET = b"\x1f\x8b", b"PK", b"ustar", 257


class RefusedError(Exception):
    """Archive that is not unpacked; the sentence names the entry."""


class Entry(NamedTuple):
    """One entry; `target` is that of a link, which is a hard link to an earlier file if `hard`."""

    name: str
    content: IO[bytes] | None = None
    executable: bool = False
    target: str | None = None
    hard: bool = False
    modified_s: float | None = None


class Placement(NamedTuple):
    """Folder that an archive is unpacked into, the number of leading folders that are taken off its names, how many
    entries it may have, and whether its links may lead out of the folder.
    """

    folder: str
    strip: int
    most_files: int
    any_links: bool = False


def unpack_as(uid: int | None, home: int, archive: int, placement: Placement) -> str:
    """Unpacks the archive in a file below `home`, an open working folder, by a process of the user.

    Returns why it is refused, empty when it is unpacked. What was written before an entry was refused stays.
    """

    def work() -> None:
        import_readers()
        if uid is not None:
            _become(uid)
        os.umask(0o077)
        with os.fdopen(os.dup(archive), "rb") as file:
            Unpacker(home, placement).unpack(file)

    return run_in_fork(work, "unpacking it")


def unpack_all(uid: int | None, home: int, archives: list[int], request: RunRequest) -> RunResult | None:
    """Unpacks the archives of a request; returns the result of a request whose archive is refused."""
    for index, (archive, (folder, strip)) in enumerate(zip(archives, request.unpack, strict=True)):
        placement = Placement(folder, strip, request.limits.files, request.any_links)
        if reason := unpack_as(uid, home, archive, placement):
            return RunResult(exit_code=None, refused_index=index, refused=reason)
    return None


def unpack_in_session(uid: int | None, home: int, message: Message) -> dict[str, Any]:
    """Unpacks the archive that comes with a message of the service, or that is a file of the working folder."""
    header = message.header
    try:
        opened = [] if message.descriptors else [open_file(home, header["file"])]
        reason = unpack_as(
            uid, home, [*message.descriptors, *opened][0], Placement(header["folder"], header["strip"], header["files"])
        )
        for descriptor in opened:
            os.close(descriptor)
    except OSError as error:
        reason = f"{header['file']!r} cannot be opened: {os.strerror(error.errno or 0)}"
    return {"reason": reason}


def open_file(home: int, path: str) -> int:
    """Opens a regular file below `home`, through no link; raises OSError."""
    descriptor = kernel.open_beneath(home, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file")


def import_readers() -> None:
    """Imports what reads archives, while the process may read the interpreter's own files."""
    for name in ("encodings.cp437", "tarfile", "zipfile", "zlib"):
        importlib.import_module(name)


def _become(uid: int) -> None:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def run_in_fork(work: Callable[[], None], what: str) -> str:
    """Does work in a process forked for it; returns in a sentence why it failed, empty when it succeeded."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _report(work, writing)
    os.close(writing)
    reason = b""
    deadline = time.monotonic() + UNPACK_S
    poller = select.poll()
    poller.register(reading, select.POLLIN)
    while poller.poll(max(0.0, deadline - time.monotonic()) * 1000) and (part := os.read(reading, _REASON_BYTES)):
        reason += part
    os.close(reading)
    if time.monotonic() >= deadline:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if reason or status == 0:
        return reason.decode(errors="replace")
    late = time.monotonic() >= deadline
    return f"{what} takes {f'longer than {UNPACK_S:.0f} s' if late else 'more memory than the job has'}"


def _report(work: Callable[[], None], writing: int) -> None:
    reason = ""
    try:
        kernel.die_with_parent(signal.SIGKILL)
        work()
    except RefusedError as error:
        reason = str(error)
    except MemoryError:
        os._exit(1)
    except Exception as error:
        reason = f"it is damaged: {error}"
    os.write(writing, reason.encode(errors="replace")[:_REASON_BYTES])
    os._exit(0)


class Unpacker:
    """Writes entries below one folder."""

    def __init__(self, home: int, placement: Placement) -> None:
        self._home = home
        self._placement = placement
        self._seen: dict[str, bool] = {}
        """Paths of the entries, and whether each is a folder."""
        self._parent = ("", os.dup(home))

    def unpack(self, file: IO[bytes]) -> None:
        """Unpacks a tar, a tar.gz or a zip; raises RefusedError."""
        name = ""
        try:
            for entry in read_entries(file):
                name = entry.name
                self._add(entry)
        except OSError as error:
            full = os.fstatvfs(self._home)
            if full.f_files and full.f_ffree == 0:
                raise RefusedError(f"the entry {_shown(name)} does not fit: raise limits.files") from error
            if full.f_bavail == 0:
                raise RefusedError(f"the entry {_shown(name)} does not fit: raise limits.file_bytes") from error
            raise RefusedError(f"the entry {_shown(name)} cannot be written: {error.strerror or error}") from error

    def _add(self, entry: Entry) -> None:
        path = self._strip(check_name(entry.name))
        if path == "":  # the folder itself, as `tar -C folder .` has it, or one that is taken off
            return
        is_folder = entry.content is None and entry.target is None
        if path in self._seen and not (is_folder and self._seen[path]):
            raise RefusedError(f"the entry {_shown(entry.name)} is there twice")
        self._seen[path] = is_folder
        if len(self._seen) > self._placement.most_files:
            raise RefusedError(
                f"the entry {_shown(entry.name)} is one more than limits.files, {self._placement.most_files}"
            )
        if is_folder:
            os.close(self._open_folder(path, entry.name))
            return
        parent, _, name = path.rpartition("/")
        folder = self._open_parent(parent, entry.name)
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            raise RefusedError(f"the entry {_shown(entry.name)} is a folder already") from None
        if entry.target is not None:
            self._link(entry, path, folder, name)
        else:
            write_entry(folder, name, entry)

    def _strip(self, path: str) -> str:
        return "/".join(path.split("/")[self._placement.strip :])

    def _link(self, entry: Entry, path: str, folder: int, name: str) -> None:
        assert entry.target is not None
        if not entry.hard:
            if not self._placement.any_links:
                check_link(entry, path)
            os.symlink(entry.target, name, dir_fd=folder)
            return
        target = self._strip(check_name(entry.target))
        if self._seen.get(target, True) or target == path:
            raise RefusedError(
                f"the entry {_shown(entry.name)} links to {_shown(entry.target)}, which is no earlier file"
            )
        parent, _, source = target.rpartition("/")
        source_folder = self._open_folder(parent, entry.name)
        try:
            os.link(source, name, src_dir_fd=source_folder, dst_dir_fd=folder, follow_symlinks=False)
        finally:
            os.close(source_folder)

    def _open_parent(self, path: str, entry: str) -> int:
        """Opens the folder of an entry; entries of one folder mostly come one after another."""
        if self._parent[0] != path or not path:
            os.close(self._parent[1])
            self._parent = (path, self._open_folder(path, entry))
        return self._parent[1]

    def _open_folder(self, path: str, entry: str) -> int:
        """Opens a folder, and makes it and those above it where they are not there."""
        whole = "/".join(part for part in (self._placement.folder, path) if part)
        if not whole:
            return os.dup(self._home)
        try:
            try:
                return kernel.open_beneath(self._home, whole, FOLDER_FLAGS)
            except FileNotFoundError:
                return make_folders("", whole, self._home)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise RefusedError(f"the entry {_shown(entry)} lies below a file or a link") from error
            raise


def check_name(name: str) -> str:
    """Returns the path of an entry in its shortest form; raises RefusedError when it is not one below the folder."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not name or "\0" in name:
        raise RefusedError(f"the entry {_shown(name)} has no valid name")
    if name.startswith("/"):
        raise RefusedError(f"the entry {_shown(name)} has an absolute path")
    if ".." in parts:
        raise RefusedError(f"the entry {_shown(name)} leaves the folder")
    encoded = [len(os.fsencode(part)) for part in parts]
    if any(length > _NAME_BYTES for length in encoded) or sum(encoded) + len(encoded) > _PATH_BYTES:
        raise RefusedError(f"the entry {_shown(name)} has too long a path")
    return "/".join(parts)


def check_link(entry: Entry, path: str) -> None:
    """Raises RefusedError for a link that does not lead to a path below the folder."""
    target = entry.target or ""
    reached = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    names = [part for part in target.split("/") if part not in ("", ".")]
    climbs = ".." in names[names.count("..") :]  # from a name, which may be a link
    if not target or "\0" in target or target.startswith("/") or climbs or reached.split("/")[0] == "..":
        raise RefusedError(f"the entry {_shown(entry.name)} links out of the folder, to {_shown(target)}")


def write_entry(folder: int, name: str, entry: Entry) -> None:
    """Writes a file piece by piece."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o700 if entry.executable else 0o600, dir_fd=folder)
    assert entry.content is not None
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        while piece := entry.content.read(_PIECE_BYTES):
            rest = memoryview(piece)
            while rest:
                rest = rest[file.write(rest) :]
        if entry.modified_s is not None:
            os.utime(descriptor, (entry.modified_s, entry.modified_s))


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 200 else f"{name[:200]}...")


def read_entries(file: IO[bytes]) -> Iterator[Entry]:
    """Yields the entries of an archive, each to be read before the next; raises RefusedError for what is none.

    Entries that are neither files nor folders nor links are refused.
    """
    file.seek(0)
    start = file.read(_TAR_OFFSET + len(_TAR))
    file.seek(0)
    if start.startswith(_ZIP):
        return _read_zip(file)
    if start.startswith(_GZIP) or start.endswith(_TAR) or (start and not start.strip(b"\0")):  # zeros: an empty tar
        return _read_tar(file, compressed=start.startswith(_GZIP))
    raise RefusedError("it is neither a tar nor a tar.gz nor a zip")


def _read_tar(file: IO[bytes], compressed: bool) -> Iterator[Entry]:
    import tarfile

    mode, piece_bytes = ("r|gz", _GZIP_PIECE_BYTES) if compressed else ("r|", _PIECE_BYTES)
    with tarfile.open(fileobj=file, mode=mode, bufsize=piece_bytes) as tar:  # type: ignore[call-overload]
        for member in tar:
            if member.isreg():
                modified_s = max(0.0, float(member.mtime))
                yield Entry(member.name, tar.extractfile(member), bool(member.mode & 0o100), modified_s=modified_s)
            elif member.isdir():
                yield Entry(member.name)
            elif member.issym() or member.islnk():
                yield Entry(member.name, target=member.linkname, hard=member.islnk())
            else:
                raise RefusedError(f"the entry {_shown(member.name)} is neither a file nor a folder nor a link")


def _read_zip(file: IO[bytes]) -> Iterator[Entry]:
    import zipfile

    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.flag_bits & 1:
                raise RefusedError(f"the entry {_shown(member.filename)} is encrypted")
            if member.is_dir():
                yield Entry(member.filename)
            elif kind in (0, stat.S_IFREG):
                with archive.open(member) as content:
                    yield Entry(member.filename, content, bool(member.external_attr >> 16 & 0o100))
            elif kind == stat.S_IFLNK and member.file_size <= _PATH_BYTES:
                yield Entry(member.filename, target=os.fsdecode(archive.read(member)))
            else:
                raise RefusedError(f"the entry {_shown(member.filename)} is neither a file nor a folder nor a link")


def pack_in_fork(home: int, path: str, output: int, most_bytes: int) -> str:
    """Writes a tar of a folder below `home` to an empty file; returns why it could not, empty when it is there."""

    def work() -> None:
        try:
            pack(os.dup(home) if path == "." else kernel.open_beneath(home, path, FOLDER_FLAGS), output, most_bytes)
        except OSError as error:
            raise RefusedError(os.strerror(error.errno) if error.errno else str(error)) from error
        except RecursionError as error:
            raise RefusedError("its folders are too deep") from error

    reason = run_in_fork(work, "packing it")
    if reason:
        os.ftruncate(output, 0)
    return reason


def pack(top: int, output: int, most_bytes: int) -> None:
    """Packs the files, folders and links below an open folder; what is neither is left out.

    Raises RefusedError when the tar has more than `most_bytes`.
    """
    import tarfile

    with (
        os.fdopen(os.dup(output), "wb") as file,
        tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for base, folders, names, opened in os.fwalk(".", dir_fd=top):
            for name in sorted((*folders, *names)):
                info = os.stat(name, dir_fd=opened, follow_symlinks=False)
                member = tarfile.TarInfo(posixpath.normpath(f"{base}/{name}"))
                member.mode, member.mtime = stat.S_IMODE(info.st_mode), int(info.st_mtime)
                if stat.S_ISREG(info.st_mode):
                    with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=opened), "rb") as content:
                        member.size = os.fstat(content.fileno()).st_size
                        if tar.offset + member.size > most_bytes:
                            raise RefusedError(f"the archive is larger than {most_bytes} bytes")
                        tar.addfile(member, content)
                elif stat.S_ISDIR(info.st_mode):
                    member.type = tarfile.DIRTYPE
                    tar.addfile(member)
                elif stat.S_ISLNK(info.st_mode):
                    member.type, member.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=opened)
                    tar.addfile(member)
                if tar.offset > most_bytes:
                    raise RefusedError(f"the archive is larger than {most_bytes} bytes")
