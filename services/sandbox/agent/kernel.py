"""Linux calls that the `os` module lacks, through ctypes; every failure raises OSError.

Numbers and layouts are those of the kernel's headers, for x86_64 and aarch64.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import socket
import struct

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 0x1, 0x2, 0x4, 0x8, 0x20
MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 0x1000, 0x2000, 0x4000, 0x40000
MNT_DETACH = 0x2
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x20000, 0x2000000, 0x4000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x8000000, 0x10000000, 0x20000000, 0x40000000

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_SECCOMP_MODE_FILTER = 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_PIDFD_OPEN, _SYS_CLOSE_RANGE, _SYS_OPENAT2 = 434, 436, 437  # the same on every architecture
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 1, 2, 4, 8
_EINVAL = 22
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_SPLICE_F_NONBLOCK = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.splice.restype = ctypes.c_ssize_t


class _FilterProgram(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Mounts `source` at `target`; `kind` None is for binds and remounts."""
    kind_bytes = None if kind is None else kind.encode()
    result = _libc.mount(source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), data.encode() or None)
    _check(result, f"mount {source} at {target}")


def move_mount(source: str, target: str) -> None:
    """Moves a mount to another path."""
    mount(source, target, None, MS_MOVE)


def unmount_lazily(target: str) -> None:
    """Takes a mount out of the tree; it goes away with its last user."""
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def pivot_root(new_root: str, put_old: str) -> None:
    """Makes `new_root` the root and the former root visible at `put_old`."""
    number = _SYS_PIVOT_ROOT[platform.machine()]
    _check(_libc.syscall(ctypes.c_long(number), new_root.encode(), put_old.encode()), f"pivot_root {new_root}")


def unshare(flags: int) -> None:
    """Moves this process (or, for CLONE_NEWPID, its next children) into fresh namespaces."""
    _check(_libc.unshare(ctypes.c_int(flags)), f"unshare {flags:#x}")


def enter_namespace(descriptor: int, flag: int) -> None:
    """Joins the namespace behind an open /proc/PID/ns file."""
    _check(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(flag)), f"setns {flag:#x}")


def set_hostname(name: str) -> None:
    """Sets the host name of this UTS namespace."""
    _check(_libc.sethostname(name.encode(), len(name)), "sethostname")


def raise_loopback() -> None:
    """Brings up the loopback device of this network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        fcntl.ioctl(channel, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


class _OpenHow(ctypes.Structure):
    """`struct open_how`."""

    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def open_beneath(folder: int, path: str, flags: int) -> int:
    """Opens a path below an open folder, through no link and no mount (openat2)."""
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_XDEV
    comparator = _OpenHow(flags, 0, resolve)
    result: int = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(folder), path.encode(), ctypes.byref(comparator), ctypes.c_size_t(24)
    )
    _check(result, f"open {path}")
    return result


def splice(source: int, source_offset: int | None, target: int, target_offset: int | None, most_bytes: int) -> int:
    """Moves bytes between a pipe and a file, at its offset, inside the kernel; returns how many, 0 at the end.

    Raises BlockingIOError where it would have to wait.
    """
    offsets = [
        None if offset is None else ctypes.byref(ctypes.c_int64(offset)) for offset in (source_offset, target_offset)
    ]
    moved: int = _libc.splice(
        source, offsets[0], target, offsets[1], ctypes.c_size_t(most_bytes), ctypes.c_uint(_SPLICE_F_NONBLOCK)
    )
    _check(moved, "splice")
    return moved


def set_command_line(arguments: list[str]) -> None:
    """Replaces the command line of this process as /proc shows it, cut to the length that it has."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = (int(fields[number - 3]) for number in (48, 49))
    text = "".join(f"{argument}\0" for argument in arguments).encode()[: end - start]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))


def adopt_orphans() -> None:
    """Makes this process the one that reaps the orphans among its descendants."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, "prctl PR_SET_CHILD_SUBREAPER")


def close_from(first: int) -> None:
    """Closes every descriptor from `first` on."""
    result = _libc.syscall(
        ctypes.c_long(_SYS_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(0)
    )
    _check(result, f"close_range {first}")


def open_pidfd(pid: int) -> int:
    """Returns a descriptor that is readable once a process has ended; not every build of Python has os.pidfd_open."""
    result: int = _libc.syscall(ctypes.c_long(_SYS_PIDFD_OPEN), ctypes.c_int(pid), ctypes.c_uint(0))
    _check(result, f"pidfd_open {pid}")
    return result


def _prctl(option: int, argument: int, what: str) -> None:
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(argument), zero, zero, zero), what)


def die_with_parent(signal_number: int) -> None:
    """Asks for `signal_number` when the parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal_number, "prctl PR_SET_PDEATHSIG")


def set_dumpable(dumpable: bool) -> None:
    """Sets whether processes of the same user may look into this one (/proc/PID/mem, /proc/PID/fd)."""
    _prctl(_PR_SET_DUMPABLE, int(dumpable), "prctl PR_SET_DUMPABLE")


def forbid_new_privileges() -> None:
    """No execve from here on gains privileges."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "prctl PR_SET_NO_NEW_PRIVS")


def drop_bounding_capabilities() -> None:
    """Empties the capability bounding set, for this process and all that come from it."""
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability, "prctl PR_CAPBSET_DROP")
        except OSError as error:
            if error.errno == _EINVAL:  # past the last capability that this kernel knows
                return
            raise


def install_filter(instructions: bytes) -> None:
    """Installs a seccomp program (8-byte `struct sock_filter` records); needs no_new_privs."""
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = _FilterProgram(len(instructions) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    zero = ctypes.c_ulong(0)
    result = _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(program), zero, zero)
    _check(result, "prctl PR_SET_SECCOMP")
