"""Asks for namespaces of its own, in which it would be root: unshare, setns, clone and clone3."""

import ctypes
import os
import platform
import signal
import struct

COLUMN = ("x86_64", "aarch64").index(platform.machine())
CLONE, CLONE3, UNSHARE, SETNS = (pair[COLUMN] for pair in ((56, 220), (435, 435), (272, 97), (308, 268)))
NAMESPACES = {
    "mnt": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000,
    "net": 0x40000000, "time": 0x80,
}  # fmt: skip
libc = ctypes.CDLL(None, use_errno=True)


def call(number, *arguments):
    return libc.syscall(*map(ctypes.c_long, (number, *arguments)))


def end_child(name, pid):
    if pid == 0:
        os._exit(0)
    if pid > 0:
        print(name, "made a process")
        os.waitpid(pid, 0)


for name, flag in NAMESPACES.items():
    if call(UNSHARE, flag) == 0:
        print("unshare", name)
    try:
        descriptor = os.open(f"/proc/self/ns/{name}", os.O_RDONLY)
    except OSError:
        continue
    if call(SETNS, descriptor, flag) == 0:
        print("setns", name)
    os.close(descriptor)
    if flag != NAMESPACES["time"]:  # clone's low byte is the signal
        end_child(f"clone {name}", call(CLONE, flag | signal.SIGCHLD, 0, 0, 0, 0))
    arguments = ctypes.create_string_buffer(struct.pack("=11Q", flag, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, 0), 88)
    end_child(f"clone3 {name}", call(CLONE3, ctypes.addressof(arguments), 88))
try:
    pidfd = os.pidfd_open(1)
    if call(SETNS, pidfd, NAMESPACES["mnt"]) == 0:
        print("setns to the first process")
except OSError:
    pass
for path in ("/proc/self/uid_map", "/proc/self/setgroups"):
    try:
        with open(path, "w") as file:
            file.write("0 0 1")
        print("wrote", path)
    except OSError:
        pass
print("held")
