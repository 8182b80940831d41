"""Takes what the kernel counts for the whole host, or for a user of it, and no memory limit bounds."""

import ctypes
import errno
import mmap
import os
import platform
import resource
import socket
import struct

libc = ctypes.CDLL(None, use_errno=True)
HUGE = 2 << 20
MAP_HUGETLB, SHM_HUGETLB, MFD_HUGETLB = 0x40000, 0o4000, 4
RETURN_ALLOW = struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000)


def count(make, most=100_000):
    """How many can be made."""
    made = []
    try:
        while len(made) < most:
            made.append(make())
    except OSError:
        pass
    return len(made)


def call(name, *arguments):
    """Result and error number of a function of the C library."""
    ctypes.set_errno(0)
    return getattr(libc, name)(*arguments), ctypes.get_errno()


def make_inotify():
    descriptor, error = call("inotify_init1", 0)
    if descriptor < 0:
        raise OSError(error, "inotify")
    return descriptor


def make_timer():
    timer = ctypes.c_void_p()
    result, error = call("timer_create", 1, None, ctypes.byref(timer))
    if result < 0:
        raise OSError(error, "timer")
    return timer


program = ctypes.create_string_buffer(RETURN_ALLOW)
filter_ = struct.pack("HxxxxxxQ", 1, ctypes.addressof(program))
if (
    call("prctl", 22, 2, filter_)[0] == 0
    or call("syscall", 317 if platform.machine() == "x86_64" else 277, 1, 0, filter_)[0] == 0
):
    print("installed a system-call filter")
for name in (26, 51):
    left, right = socket.socketpair()
    try:
        left.setsockopt(socket.SOL_SOCKET, name, filter_)
        print("attached a filter to a socket", name)
    except OSError:
        pass
try:
    mmap.mmap(-1, HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
    print("mapped a huge page")
except OSError:
    pass
if call("shmget", 0, ctypes.c_size_t(HUGE), 0o1600 | SHM_HUGETLB)[1] != errno.ENOMEM:
    print("a segment of huge pages is not refused")
if call("memfd_create", b"huge", MFD_HUGETLB)[1] != errno.ENOMEM:
    print("a file of huge pages is not refused")
if call("mq_open", b"/queue", os.O_CREAT | os.O_RDWR, 0o600, None)[0] >= 0:
    print("opened a message queue")
if call("fanotify_init", 0, 0)[0] >= 0:
    print("opened fanotify")
try:
    os.openpty()
    print("opened a terminal")
except OSError:
    pass
if (made := count(make_inotify)) > 256:
    print("inotify instances", made)
if (made := count(make_timer)) > 5000:
    print("timers", made)
if (made := count(lambda: os.open("/dev/null", os.O_RDONLY))) > 256:
    print("open files", made)
for name in ("RLIMIT_NICE", "RLIMIT_RTPRIO", "RLIMIT_MSGQUEUE", "RLIMIT_MEMLOCK"):
    if resource.getrlimit(getattr(resource, name, 12))[1] > 0 and hasattr(resource, name):
        print(name, resource.getrlimit(getattr(resource, name)))
print("held")
