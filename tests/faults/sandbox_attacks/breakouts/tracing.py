"""Takes control of other processes: ptrace, process_vm_*, pidfd_getfd, kcmp; on the box's first process and on a child."""

import ctypes
import errno
import os
import platform
import signal

COLUMN = ("x86_64", "aarch64").index(platform.machine())
SYSCALLS = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "move_pages": (279, 239),
}  # fmt: skip
libc = ctypes.CDLL(None, use_errno=True)


class Span(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def call(name, *arguments):
    ctypes.set_errno(0)
    converted = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result = libc.syscall(ctypes.c_long(SYSCALLS[name][COLUMN]), *converted)
    if result >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS, errno.EACCES):
        print(name, arguments, result, errno.errorcode.get(ctypes.get_errno()))


buffer = ctypes.create_string_buffer(b"sesame", 16)
local = Span(ctypes.addressof(buffer), 6)
child = os.fork()
if child == 0:
    while True:
        signal.pause()
ATTACH, SEIZE, TRACE_ME = 16, 0x4206, 0
call("ptrace", TRACE_ME, 0, 0, 0)
for pid in (1, child):
    call("ptrace", ATTACH, pid, 0, 0)
    call("ptrace", SEIZE, pid, 0, 0)
    for name in ("process_vm_readv", "process_vm_writev"):
        call(name, pid, ctypes.byref(local), 1, ctypes.byref(local), 1, 0)
    call("kcmp", pid, os.getpid(), 0, 0, 0)
    call("move_pages", pid, 0, 0, 0, 0, 0)
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        continue
    call("pidfd_getfd", descriptor, 0, 0)
    call("process_madvise", descriptor, ctypes.byref(local), 1, 4, 0)
os.kill(child, signal.SIGKILL)
print("held")
