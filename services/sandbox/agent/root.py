"""File system of a sandbox: a read-only root, and fresh tmpfs mounts that hold what a job writes.

The root is an unpacked image under an overlay, or read-only parts of the host's; it is built once for each zygote or
slot. A zygote enters its root by pivot_root, so that the host's other files are in no namespace that a job can reach.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from . import HOME, MASKED, OWN_FOLDER, kernel, start_code
from .protocol import Preparation

PROC_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
WRITABLE_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_LINKS = {"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
_READ_ONLY = kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
_FOLDERS = ("proc", "box", "tmp", "dev", "etc", "run", OWN_FOLDER.strip("/"))
_PASSWD = "root:x:0:0:root:/:/usr/sbin/nologin\n"
_HOSTS = "127.0.0.1 localhost box\n::1 localhost\n"
_BOX_USER = "box:x:{uid}:{uid}:box:/box:/usr/sbin/nologin\n"


@dataclass(frozen=True)
class RootOptions:
    """Parts of a root: `image` is an unpacked image or empty, `binds` are host paths that keep their names, `mounts`
    are pairs of a host path and its path inside. `folder` is an empty folder to build in.
    """

    folder: str
    image: str
    binds: list[str]
    mounts: list[list[str]]
    uids: list[int]


def build_root(options: RootOptions) -> Path:
    """Mounts the root below `folder` and returns it; needs a mount namespace of its own."""
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    folder = Path(options.folder)
    own = folder / "own"
    own.mkdir(exist_ok=True)
    kernel.mount("tmpfs", str(own), "tmpfs", kernel.MS_NOSUID, "size=1m,mode=0755")
    mounted = _make_skeleton(own, options)
    if not options.image:
        root = own
    else:
        root = folder / "root"
        root.mkdir(exist_ok=True)
        kernel.mount("overlay", str(root), "overlay", kernel.MS_RDONLY, f"lowerdir={own}:{options.image}")
    for source, target in mounted:
        kernel.mount(source, f"{root}{target}", None, kernel.MS_BIND)
        kernel.mount("none", f"{root}{target}", None, _READ_ONLY)
    return root


def _make_skeleton(own: Path, options: RootOptions) -> list[tuple[str, str]]:
    """Makes the folders, links and small files of a root; returns the mounts to be made on it."""
    for name in _FOLDERS:
        (own / name).mkdir(parents=True, exist_ok=True)
    mounted = []
    for path in map(Path, options.binds):
        target = own / path.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(path.readlink())
        elif path.is_dir():
            target.mkdir(exist_ok=True)
            mounted.append((str(path), str(path)))
        elif path.is_file():
            target.touch()
            mounted.append((str(path), str(path)))
    for source, inside in options.mounts:
        target = own / inside.strip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(source).is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        mounted.append((source, inside))
    if not options.image and not (own / "home/user").exists():
        (own / "home").mkdir(exist_ok=True)
        (own / "home/user").symlink_to(HOME)  # where what was written for other sandboxes looks
    passwd = _PASSWD + "".join(_BOX_USER.format(uid=uid) for uid in options.uids)
    (own / "etc/passwd").write_text(passwd)
    (own / "etc/hosts").write_text(_HOSTS)
    cache = Path("/etc/ld.so.cache")
    if not options.image and cache.exists():
        (own / "etc/ld.so.cache").write_bytes(cache.read_bytes())
    return mounted


def enter_root(options: RootOptions) -> None:
    """Builds the root and makes it the root of this process."""
    root = build_root(options)
    own = Path(options.folder) / "own"
    for name, numbers in _DEVICES.items():
        device = own / "dev" / name
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(*numbers))
        device.chmod(0o666)
    for name, target in _LINKS.items():
        (own / "dev" / name).symlink_to(f"/proc/self/{target}")
    (own / "dev/shm").symlink_to("/tmp")
    (own / "old").mkdir()
    kernel.pivot_root(str(root), f"{root}/old")
    os.chdir("/")
    kernel.unmount_lazily("/old")
    kernel.mount("proc", "/proc", "proc", PROC_FLAGS)
    if not options.image:
        Path("/old").rmdir()
        kernel.mount("none", "/", None, kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID, "size=1m,mode=0755")


def mount_proc() -> None:
    """Mounts /proc of this process's namespaces, without what tells of the host."""
    kernel.mount("proc", "/proc", "proc", PROC_FLAGS)
    for path in MASKED:
        kernel.mount("/dev/null", path, None, kernel.MS_BIND)


def mount_writable(uid: int, preparation: Preparation) -> None:
    """Mounts an empty working folder and an empty /tmp in this mount namespace."""
    bounds = sized(preparation.space_bytes, preparation.files)
    kernel.mount("tmpfs", HOME, "tmpfs", WRITABLE_FLAGS, f"{bounds},mode=0700,uid={uid},gid={uid}")
    kernel.mount("tmpfs", "/tmp", "tmpfs", WRITABLE_FLAGS, f"{bounds},mode=1777")


def sized(space_bytes: int, files: int) -> str:
    """Returns the options of a tmpfs that bound its space and its files."""
    return f"size={space_bytes},nr_inodes={files + 1}"  # with the folder itself


def main() -> None:
    """Enters the root of a runtime and becomes its zygote, run by that root's own Python.

    The argument is a JSON object with the root, the interpreter in it, and the zygote's options.
    """
    fields = json.loads(sys.argv[1])
    kernel.die_with_parent(signal.SIGKILL)
    try:
        kernel.unshare(kernel.CLONE_NEWNS)
        enter_root(RootOptions(**fields.pop("root")))
        python = fields.pop("python")
        for number, end in enumerate(os.pipe()):  # what the interpreter takes its streams for, as it starts
            os.dup2(end, number)
        os.execve(python, [python, "-c", start_code(OWN_FOLDER, "zygote"), json.dumps(fields)], fields["environment"])
    except OSError as error:
        sys.exit(f"sandbox zygote: {error}")
