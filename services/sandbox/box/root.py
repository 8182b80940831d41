"""The file system of a box: read-only parts of the host's, and fresh tmpfs mounts that hold what the job writes.

The root is built once per launcher and entered by pivot_root, so that the host's other files are in no namespace that
a job can reach. Each job then gets its own /proc, /box and /tmp on top, in a mount namespace of its own.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from . import kernel
from .limits import HOME

_DEVICES = {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}
_BIND_FLAGS = kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
_WRITABLE_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV
_MAX_INODES = 1024
_SHARED_MEMORY = Path("/dev/shm")
DIRECTORIES = ("proc", "box", "tmp", "dev", "etc", "run")
PASSWD = "root:x:0:0:root:/:/usr/sbin/nologin\nbox:x:{uid}:{uid}:box:/box:/usr/sbin/nologin\n"


def make_skeleton(root: Path, binds: list[str], uid: int) -> list[str]:
    """Makes the folders, links and small files of a root; returns those of `binds` that are folders to be mounted
    there.
    """
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True, exist_ok=True)
    mounted = []
    for path in map(Path, binds):
        target = root / path.relative_to("/")
        if path.is_symlink():
            if not target.is_symlink():
                target.symlink_to(path.readlink())
        elif path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            mounted.append(str(path))
    (root / "etc/passwd").write_text(PASSWD.format(uid=uid))
    cache = Path("/etc/ld.so.cache")
    if cache.exists():
        (root / "etc/ld.so.cache").write_bytes(cache.read_bytes())
    return mounted


def enter_root(root: Path, binds: list[str], uid: int) -> None:
    """Builds the root on a tmpfs at `root` and makes it this process's, read-only; needs a mount namespace of its
    own.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", str(root), "tmpfs", kernel.MS_NOSUID, "size=1m,mode=0755")
    for path in make_skeleton(root, binds, uid):
        kernel.mount(path, f"{root}{path}", None, kernel.MS_BIND)
        kernel.mount("none", f"{root}{path}", None, _BIND_FLAGS)
    for name, minor in _DEVICES.items():
        device = root / "dev" / name
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        device.chmod(0o666)
    (root / "dev/fd").symlink_to("/proc/self/fd")
    (root / "dev/shm").symlink_to("/tmp")
    old = root / "old"
    old.mkdir()
    kernel.pivot_root(str(root), str(old))
    os.chdir("/")
    kernel.unmount_lazily("/old")
    Path("/old").rmdir()
    kernel.mount("proc", "/proc", "proc", _WRITABLE_FLAGS | kernel.MS_NOEXEC)
    kernel.mount("none", "/", None, kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID, "size=1m,mode=0755")


def mount_writable(uid: int, space_bytes: int) -> None:
    """Moves this process into mount and IPC namespaces of its own, with an empty /box and /tmp of `space_bytes`."""
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
    size = f"size={space_bytes},nr_inodes={_MAX_INODES}"
    kernel.mount("tmpfs", HOME, "tmpfs", _WRITABLE_FLAGS, f"{size},mode=0700,uid={uid},gid={uid}")
    kernel.mount("tmpfs", "/tmp", "tmpfs", _WRITABLE_FLAGS, f"{size},mode=1777")
    if not _SHARED_MEMORY.is_symlink():  # a container's own, where this root has a link to /tmp
        kernel.mount("/tmp", str(_SHARED_MEMORY), None, kernel.MS_BIND)
