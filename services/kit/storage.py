"""Files and folders by name: a path, or a URL of fsspec such as s3://bucket/folder or hf://owner/model.

A URL is read through a copy in the cache, one for each digest of what it holds, and written by publishing a local
folder: its marker, which readers ask for, goes first and comes last, so that half a folder never counts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from perigee.errors import DataLossError, InvalidArgumentError, PerigeeError, ResourceExhaustedError, UnavailableError
from perigee.files import staging_folder, sync, write_atomically
from perigee.trainer.v1.trainer_pb2 import FilePiece

CACHE_VARIABLE = "PERIGEE_CACHE"
# Served by obstore where it is installed: one package without dependencies, for S3, Google and Azure.
OBJECT_STORES = ("s3", "gs", "az")
_OBJECT_STORE_OPTIONS = {
    # Plain HTTP where the endpoint says so, as that of a store inside a cluster does.
    "client_options": {"allow_http": True},
    "retry_config": {"max_retries": 5, "retry_timeout": timedelta(seconds=60)},
}
_BLOCK_BYTES = 8 << 20
# What file systems call the version of a file: S3, Hugging Face, others.
_TAGS = ("e_tag", "ETag", "blob_id", "mtime", "created")


def is_url(name: str) -> bool:
    """Returns whether a name is a URL of fsspec."""
    return "://" in name


def join(name: str, *parts: str) -> str:
    """Returns the path or URL of what is below a folder."""
    return "/".join([name.rstrip("/"), *parts]) if is_url(name) else str(Path(name, *parts))


def cache_folder() -> Path:
    """Folder of copies, $PERIGEE_CACHE or ~/.cache/perigee. It may be emptied whenever no service starts."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "perigee")


def local_file(name: str, field: str) -> Path:
    """Returns the path of a file, of its copy for a URL; raises what `local_folder` raises."""
    if not is_url(name):
        return Path(name)
    folder, _, base = name.rpartition("/")
    return local_folder(folder, field, lambda found: found == base) / base


def local_folder(name: str, field: str, is_wanted: Callable[[str], bool]) -> Path:
    """Returns the path of a folder; for a URL that of a copy of its wanted files, those of subfolders left out.

    Raises InvalidArgumentError that names `field` when there are none, or no library reads such a URL, and
    UnavailableError when the storage cannot be reached or refuses.
    """
    if not is_url(name):
        return Path(name)
    with _explained(name, field):
        listing = {base: entry for base, entry in _read_listing(name).items() if is_wanted(base)}
        if not listing:
            raise InvalidArgumentError.for_field(field, f"{name} holds no such file")
        digest = hashlib.sha256(repr([name, sorted(listing.items())]).encode()).hexdigest()[:16]
        copy = cache_folder() / f"{name.rstrip('/').rpartition('/')[2]}-{digest}"
        with only_process(copy):
            if not copy.is_dir():
                _download(name, listing, copy)
        return copy


def download_folder(url: str, field: str, target: Path) -> None:
    """Copies the files of a folder to `target`, which appears whole; a folder that is there is replaced."""
    with _explained(url, field):
        _download(url, _read_listing(url), target)


def read_file(url: str, field: str, max_bytes: int | None = None) -> bytes | None:
    """Returns the contents of a small file; None when there is none.

    Raises InvalidArgumentError naming `field` for one of more than `max_bytes`, of which nothing is read then.
    """
    with _explained(url, field):
        fs, path = _open(url)
        try:
            if max_bytes is not None and (size := int(fs.size(path) or 0)) > max_bytes:
                raise InvalidArgumentError.for_field(field, f"has {size:,} bytes, more than {max_bytes:,}")
            return bytes(fs.cat_file(path))
        except FileNotFoundError:
            return None


def is_file(url: str, field: str) -> bool:
    """Returns whether a URL is that of a file."""
    with _explained(url, field):
        fs, path = _open(url)
        return bool(fs.isfile(path))


def read_ranges(name: str, field: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
    """Returns the bytes of each (offset, size) of a path or URL, fewer where it ends; None where there is no file."""
    with _explained(name, field):
        try:
            if not is_url(name):
                with open(name, "rb") as file:
                    return [os.pread(file.fileno(), size, offset) for offset, size in ranges]
            fs, path = _open(name)
            return [bytes(fs.cat_file(path, start=offset, end=offset + size)) for offset, size in ranges]
        except FileNotFoundError:
            return None


def delete_file(name: str, field: str) -> None:
    """Deletes a file, a path or a URL, and what a killed `StagedFile` left of it; nothing when there is none."""
    with _explained(name, field):
        if not is_url(name):
            staging_path(Path(name)).unlink(missing_ok=True)
            Path(name).unlink(missing_ok=True)
            return
        fs, path = _open(name)
        with suppress(FileNotFoundError):
            fs.rm_file(path)


def list_files(url: str, field: str) -> list[str]:
    """Returns the paths, from `url` on, of all files below it, a folder or a URL; none where there is no folder."""
    with _explained(url, field):
        if not is_url(url):
            return [str(path.relative_to(url)) for path in Path(url).rglob("*") if path.is_file()]
        fs, root = _open(url)
        # Some stores list a folder that has been emptied as a file without a name.
        return [path.removeprefix(root).lstrip("/") for path in fs.find(root) if path != root]


def receive_piece(folder: Path, piece: FilePiece) -> str:
    """Writes a piece of a file below `folder`; returns the file's path when it is whole, empty before.

    Raises InvalidArgumentError for a digest that is none, DataLossError when the whole file has another one.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", piece.digest):
        raise InvalidArgumentError.for_field("piece.digest", "must be a SHA-256 in hexadecimal")
    target, staging = folder / piece.digest, folder / f".{piece.digest}.part"
    if target.is_file():
        return str(target)
    folder.mkdir(parents=True, exist_ok=True)
    with open(staging, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o644)) as file:
        file.seek(piece.offset)
        file.write(piece.content)
        if file.tell() < piece.file_bytes:
            return ""
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != piece.digest:
        staging.unlink()
        raise DataLossError(f"a file came with digest {found} instead of {piece.digest}: send it again")
    staging.replace(target)
    return str(target)


class StagedFile:
    """File, a path or a URL, that is written piece by piece and then appears whole.

    A file of a URL waits on this machine's disk without a name, so that a killed process leaves nothing; one of a path
    is written beside it, under the name of `staging_path`.
    """

    def __init__(self, name: str, field: str) -> None:
        self._name, self._field = name, field
        # What may be full, or not be written to.
        self._disk = str(cache_folder()) if is_url(name) else name
        with _explained(self._disk, field):
            if is_url(name):
                cache_folder().mkdir(parents=True, exist_ok=True)
                self._file: IO[bytes] = tempfile.TemporaryFile(dir=cache_folder())  # noqa: SIM115 (`discard` closes it)
            else:
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                self._file = staging_path(Path(name)).open("wb")

    def write(self, content: bytes) -> None:
        """Writes what comes next."""
        with _explained(self._disk, self._field):
            self._file.write(content)

    def publish(self) -> None:
        """Makes the file appear, once all of it is synced or uploaded."""
        with _explained(self._disk, self._field):
            self._file.flush()
            if not is_url(self._name):
                os.fsync(self._file.fileno())
                staging_path(Path(self._name)).replace(self._name)
                sync(Path(self._name).parent)
        if is_url(self._name):
            with _explained(self._name, self._field):
                fs, target = _open(self._name)
                fs.put_file(f"/proc/self/fd/{self._file.fileno()}", target)

    def discard(self) -> None:
        """Closes the file; what was not published is gone."""
        with suppress(OSError):  # what a full disk has refused is tried once more
            self._file.close()
        if not is_url(self._name):
            with _explained(self._disk, self._field):
                staging_path(Path(self._name)).unlink(missing_ok=True)


def staging_path(path: Path) -> Path:
    """Returns where a file is written before it appears."""
    return path.parent / f".{path.name}.part"


def publish_folder(folder: Path, url: str, field: str, marker: str) -> None:
    """Uploads the files of a folder, `marker` last, in the place of what is there."""
    remove_folder(url, field, marker)
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == marker, path.name)):
        publish_file(path, join(url, path.name), field)


def publish_file(path: Path, url: str, field: str) -> None:
    """Uploads a file; large ones in parts, so that no more than a few of them are in memory."""
    with _explained(url, field):
        fs, target = _open(url)
        fs.put_file(str(path), target)


def remove_folder(url: str, field: str, marker: str) -> None:
    """Removes the files below a URL, `marker` first; nothing when there are none."""
    names = list_files(url, field)
    with _explained(url, field):
        fs, root = _open(url)
        for name in sorted(names, key=lambda name: (name != marker, name)):
            fs.rm_file(f"{root}/{name}")


@contextmanager
def writing_folder(name: str, field: str, marker: str) -> Iterator[Path]:
    """Yields an empty local folder that becomes the folder `name` when the block ends, and nothing when it raises."""
    if not is_url(name):
        with staging_folder(Path(name)) as staging:
            yield staging
        return
    local = cache_folder() / f"outgoing-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    try:
        with staging_folder(local) as staging:
            yield staging
        publish_folder(local, name, field, marker)
    finally:
        shutil.rmtree(local, ignore_errors=True)


class Mirror:
    """Folder on this machine whose files are published below a URL as they change; without one a plain folder."""

    def __init__(self, name: str, field: str) -> None:
        self.url = name if is_url(name) else None
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        self.path = cache_folder() / f"folder-{digest}" if self.url else Path(name).absolute()
        self._field = field
        self._published: dict[Path, tuple[int, int]] = {}

    def pull(self, name: str) -> None:
        """Copies a published file, or the files of a published folder, that are not here."""
        if self.url is None:
            return
        for rest in list_files(join(self.url, name), self._field) or [""]:
            path = Path(self.path, name, rest)
            content = None if path.exists() else read_file(self._url_of(path), self._field)
            if content is not None:
                write_atomically(path, content)
                self._published[path] = _state(path)

    def push(self, folder: Path) -> None:
        """Publishes the files of a folder in it, and those right in it, that changed since they were published."""
        paths = () if self.url is None else sorted({*folder.rglob("*"), *self.path.glob("*")})
        for path in (path for path in paths if path.is_file() and not path.name.startswith(".")):
            state = _state(path)
            if self._published.get(path) != state:
                publish_file(path, self._url_of(path), self._field)
                self._published[path] = state

    def _url_of(self, path: Path) -> str:
        return join(self.url or "", *path.relative_to(self.path).parts)


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _read_listing(url: str) -> dict[str, tuple[int, str]]:
    """Returns size and version of each file right below a folder, by name."""
    fs, path = _open(url)
    files = [entry for entry in fs.ls(path, detail=True) if entry["type"] == "file"]
    return {str(entry["name"]).rpartition("/")[2]: (int(entry["size"]), _tag(entry)) for entry in files}


def _tag(entry: Mapping[str, Any]) -> str:
    return next((str(entry[key]) for key in _TAGS if entry.get(key)), "")


def _open(url: str) -> tuple[Any, str]:
    """Returns the file system of a URL and the path in it; raises ImportError or ValueError when there is none."""
    import fsspec

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in OBJECT_STORES:
        from obstore.fsspec import register

        register(protocol)
        options = _OBJECT_STORE_OPTIONS
    fs, path = fsspec.core.url_to_fs(url, **options)
    return fs, str(path).rstrip("/")


def _download(url: str, listing: Mapping[str, tuple[int, str]], target: Path) -> None:
    fs, root = _open(url)
    with staging_folder(target) as staging:
        for name, (size, _) in listing.items():
            with fs.open(f"{root}/{name}", "rb") as source, (staging / name).open("wb") as file:
                while block := source.read(_BLOCK_BYTES):
                    file.write(block)
            if (staging / name).stat().st_size != size:
                raise UnavailableError(f"{url}/{name} changed or was cut while it was read: start again.")


@contextmanager
def only_process(target: Path) -> Iterator[None]:
    """Keeps others on this machine from making the same copy meanwhile: ranks of a trainer start and load together."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _explained(url: str, field: str) -> Iterator[None]:
    """Turns the errors of storage libraries, which share no base class, into ours."""
    try:
        yield
    except PerigeeError:
        raise
    except FileNotFoundError as error:
        raise InvalidArgumentError.for_field(field, f"{url} does not exist") from error
    except ImportError as error:
        advice = "pip install 'perigee-services[s3]'" if url.partition("://")[0] in OBJECT_STORES else str(error)
        raise InvalidArgumentError.for_field(field, f"{url} needs a package that is not installed: {advice}") from error
    except ValueError as error:
        raise InvalidArgumentError.for_field(field, f"{url} cannot be opened: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and (error.filename or not is_url(url)):
            # Errors of a file that is open name none.
            raise ResourceExhaustedError(
                f"{field}: {error.filename or url} cannot be read or written: {error.strerror or error}"
            ) from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UnavailableError(
            f"{field}: {url} cannot be reached; check network, address and credentials: {reason}"
        ) from error
