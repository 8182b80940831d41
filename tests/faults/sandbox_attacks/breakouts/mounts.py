"""Changes what is mounted, moves its root, and makes devices."""

import ctypes
import os
import platform
import stat

COLUMN = ("x86_64", "aarch64").index(platform.machine())
SYSCALLS = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "fsopen": (430, 430),
    "fspick": (433, 433), "open_tree": (428, 428), "move_mount": (429, 429), "mount_setattr": (442, 442),
    "swapon": (167, 224), "quotactl": (179, 60), "acct": (163, 89), "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
}  # fmt: skip
HERE, CLONE_TREE, BIND, REMOUNT, DETACH = -100, 1, 0x1000, 0x20, 2
libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    converted = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    if libc.syscall(ctypes.c_long(SYSCALLS[name][COLUMN]), *converted) >= 0:
        print(name, arguments)


os.mkdir("/tmp/root")
os.mkdir("/tmp/root/old")
handle = ctypes.create_string_buffer(b"\x08\0\0\0" + b"\0" * 12, 16)
mount_id = ctypes.c_int()
call("mount", b"tmpfs", b"/tmp", b"tmpfs", 0, 0)
call("mount", b"proc", b"/tmp/root", b"proc", 0, 0)
call("mount", b"/", b"/tmp/root", 0, BIND, 0)
call("mount", 0, b"/usr", 0, BIND | REMOUNT, 0)
call("mount", 0, b"/", 0, REMOUNT, 0)
for path in (b"/tmp", b"/box", b"/proc", b"/dev/shm", b"/usr"):
    call("umount2", path, DETACH)
call("pivot_root", b"/tmp/root", b"/tmp/root/old")
call("chroot", b"/tmp/root")
call("fsopen", b"tmpfs", 0)
call("fspick", HERE, b"/", 0)
call("open_tree", HERE, b"/", CLONE_TREE)
call("move_mount", HERE, b"/box", HERE, b"/tmp/root", 0)
call("mount_setattr", HERE, b"/", 0, handle, 32)
call("swapon", b"/tmp/root", 0)
call("quotactl", 0x800003, b"/", 0, 0)
call("acct", b"/tmp/root")
call("fanotify_init", 0, 0)
call("name_to_handle_at", HERE, b"/usr", handle, ctypes.byref(mount_id), 0)
call("open_by_handle_at", HERE, handle, 0)
for kind, major, minor in ((stat.S_IFCHR, 1, 1), (stat.S_IFCHR, 254, 0), (stat.S_IFBLK, 8, 0), (stat.S_IFBLK, 254, 0)):
    for folder in ("/tmp", "/box", "/dev/shm"):
        try:
            os.mknod(f"{folder}/device", kind | 0o666, os.makedev(major, minor))
            print("mknod", folder, kind)
        except OSError:
            pass
os.mkfifo("/tmp/fifo")  # a named pipe is nobody's harm
expected = set("null zero full random urandom tty fd stdin stdout stderr shm mqueue core pts ptmx".split())
print("held" if set(os.listdir("/dev")) <= expected else os.listdir("/dev"))
