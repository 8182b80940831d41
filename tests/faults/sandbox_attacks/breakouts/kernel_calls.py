"""Asks for parts of the kernel that no program needs; each must be refused by name and not fail by chance."""

import ctypes
import errno
import platform

COLUMN = ("x86_64", "aarch64").index(platform.machine())
libc = ctypes.CDLL(None, use_errno=True)
zeros = ctypes.create_string_buffer(256)
NO_RANDOM_LAYOUT, READ_IMPLIES_EXEC = 0x40000, 0x400000
CALLS = [
    ("add_key", (248, 217), (b"user", b"name", zeros, 5, -1)),
    ("request_key", (249, 218), (b"user", b"name", 0, -1)),
    ("keyctl", (250, 219), (0, -3, 1)),
    ("bpf", (321, 280), (0, zeros, 64)),
    ("io_setup", (206, 0), (1, zeros)),
    ("io_uring_setup", (425, 425), (8, zeros)),
    ("io_uring_enter", (426, 426), (0, 1, 0, 0, 0, 0)),
    ("io_uring_register", (427, 427), (0, 0, 0, 0)),
    ("userfaultfd", (323, 282), (1,)),
    ("perf_event_open", (298, 241), (zeros, 0, -1, -1, 0)),
    ("personality", (135, 92), (NO_RANDOM_LAYOUT,)),
    ("personality", (135, 92), (READ_IMPLIES_EXEC,)),
    ("init_module", (175, 105), (zeros, 256, b"")),
    ("finit_module", (313, 273), (0, b"", 0)),
    ("delete_module", (176, 106), (b"none", 0)),
    ("kexec_load", (246, 104), (0, 0, 0, 0)),
    ("reboot", (169, 142), (0, 0, 0, 0)),
    ("swapoff", (168, 225), (b"/none",)),
    ("settimeofday", (164, 170), (zeros, 0)),
    ("clock_settime", (227, 112), (0, zeros)),
    ("adjtimex", (159, 171), (ctypes.create_string_buffer(b"\x01", 256),)),
    ("sethostname", (170, 161), (b"mine", 4)),
    ("setdomainname", (171, 162), (b"mine", 4)),
    ("syslog", (103, 116), (3, zeros, 256)),
    ("memfd_secret", (447, 447), (0,)),
    ("vhangup", (153, 58), ()),
]
for name, numbers, arguments in CALLS:
    ctypes.set_errno(0)
    converted = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result = libc.syscall(ctypes.c_long(numbers[COLUMN]), *converted)
    if result >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS, errno.EACCES):
        print(name, arguments, result, errno.errorcode.get(ctypes.get_errno()))
print("held")
