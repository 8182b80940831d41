"""Confinement of a process that is about to become a submission's: privileges, limits and the system-call filter.

The filter allows every call except those that reach for the kernel, the host or the network, or for what the kernel
counts for the whole host. Denied calls give EPERM; clone3 gives ENOSYS, so that libc falls back to clone, whose flags a
filter can read; sockets other than AF_UNIX are refused, but for TCP and UDP of a program that has a loopback device;
calls in the layout of another architecture kill the process. mknod stays allowed: mkfifo needs it, and device nodes
need a capability that no program in a sandbox has.
"""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import signal
import struct
from dataclasses import dataclass

from . import CORE_BYTES, kernel
from .protocol import Limits

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN, _AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOMEM, _ENOSYS = 1, 12, 38
_DONE = 0  # as an error number: the call seems to succeed and has no effect
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENT_0, _OFFSET_ARGUMENT_1, _OFFSET_ARGUMENT_2 = 0, 4, 16, 24, 32
_ANY_BIT = 0xFFFFFFFF
_X32_BIT = 0x40000000
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_SOCKET_TYPE, _STREAM, _DATAGRAM = 0xF, 1, 2
_ANY, _TCP, _UDP = 0, 6, 17
_CLONE_NAMESPACES = 0x7E020080  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME

_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: (x86_64, aarch64); None where the architecture has no such call
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_setup": (206, 0),  # its contexts are counted for the whole host, not for a control group
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lookup_dcookie": (212, 18),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "seccomp": (317, 277),  # the memory of compiled filters is counted for the whole host
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}
# without effect: they would write out the host's file systems
_IGNORED = {"sync": (162, 81), "syncfs": (306, 267)}


def _argument(index: int) -> int:
    """Returns the offset of an argument's low half; the high half is 4 further."""
    return _OFFSET_ARGUMENT_0 + 8 * index


_Check = tuple[tuple[int, int, int], ...]
"""Alternatives, each an offset, a jump and a value, of which one has to hold."""
_RLIMIT_CORE, _PR_SET_SECCOMP, _SOL_SOCKET = 4, 22, 1
_MAP_HUGETLB, _SHM_HUGETLB, _MFD_HUGETLB = 0x40000, 0x800, 0x4
_SOCKET_FILTERS = (26, 50, 51, 52)  # SO_ATTACH_FILTER, SO_ATTACH_BPF, SO_ATTACH_REUSEPORT_CBPF, _EBPF

# calls whose arguments decide: numbers, checks that all have to hold, error number
_ARGUMENT_RULES: list[tuple[tuple[int, int], tuple[_Check, ...], int]] = [
    # pages of the host's pool, which no limit of memory counts
    ((9, 222), (((_argument(3), _JUMP_ANY_BIT, _MAP_HUGETLB),),), _ENOMEM),
    ((29, 194), (((_argument(2), _JUMP_ANY_BIT, _SHM_HUGETLB),),), _ENOMEM),
    ((319, 279), (((_argument(1), _JUMP_ANY_BIT, _MFD_HUGETLB),),), _ENOMEM),
    # compiled filters, as for seccomp
    ((157, 167), (((_argument(0), _JUMP_EQUAL, _PR_SET_SECCOMP),),), _EPERM),
    (
        (54, 208),
        (
            ((_argument(1), _JUMP_EQUAL, _SOL_SOCKET),),
            tuple((_argument(2), _JUMP_EQUAL, name) for name in _SOCKET_FILTERS),
        ),
        _EPERM,
    ),
    # the limit of core dumps stays as it is
    ((160, 164), (((_argument(0), _JUMP_EQUAL, _RLIMIT_CORE),),), _DONE),
    (
        (302, 261),
        (
            ((_argument(1), _JUMP_EQUAL, _RLIMIT_CORE),),
            ((_argument(2), _JUMP_ANY_BIT, _ANY_BIT), (_argument(2) + 4, _JUMP_ANY_BIT, _ANY_BIT)),
        ),
        _DONE,
    ),
]
_CLONE, _CLONE3 = (56, 220), (435, 435)
_SOCKET, _SOCKETPAIR = (41, 198), (53, 199)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _rule(number: int, checks: tuple[_Check, ...], error: int) -> list[bytes]:
    """Returns the instructions for one call: an error where every check holds, else the call itself."""
    body = [_instruction(_RETURN, _ERRNO | error), _instruction(_RETURN, _ALLOW)]
    for alternatives in reversed(checks):
        tests = []
        for after, (offset, jump, value) in zip(reversed(range(len(alternatives))), alternatives, strict=True):
            to_allow = 0 if after else len(body) - 1
            tests += [_instruction(_LOAD, offset), _instruction(jump, value, if_true=2 * after, if_false=to_allow)]
        body = tests + body
    return [_instruction(_JUMP_EQUAL, number, if_false=len(body)), *body]


def build_filter(machine: str | None = None, loopback: bool = False) -> bytes:
    """Returns the filter for an architecture, this machine's unless given, as `struct sock_filter` records.

    With `loopback` it lets TCP and UDP sockets be made.

    Raises KeyError for an architecture that it does not know.
    """
    machine = machine or platform.machine()
    architecture = _AUDIT_ARCHITECTURE[machine]
    column = ("x86_64", "aarch64").index(machine)
    denied = sorted(number for numbers in _DENIED.values() if (number := numbers[column]) is not None)
    refuse = _instruction(_RETURN, _ERRNO | _EPERM)
    absent = _instruction(_RETURN, _ERRNO | _ENOSYS)
    program = [
        _instruction(_LOAD, _OFFSET_ARCHITECTURE),
        _instruction(_JUMP_EQUAL, architecture, if_true=1),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _OFFSET_NUMBER),
    ]
    if machine == "x86_64":
        program += [_instruction(_JUMP_AT_LEAST, _X32_BIT, if_false=1), absent]
    program += [_instruction(_JUMP_EQUAL, _CLONE3[column], if_false=1), absent]
    program += [
        _instruction(_JUMP_EQUAL, _CLONE[column], if_false=4),
        _instruction(_LOAD, _OFFSET_ARGUMENT_0),
        _instruction(_JUMP_ANY_BIT, _CLONE_NAMESPACES, if_false=1),
        refuse,
        _instruction(_RETURN, _ALLOW),
    ]
    if loopback:
        program += _allow_internet(_SOCKET[column])
    for numbers in (_SOCKET, _SOCKETPAIR):
        program += [
            _instruction(_JUMP_EQUAL, numbers[column], if_false=4),
            _instruction(_LOAD, _OFFSET_ARGUMENT_0),
            _instruction(_JUMP_EQUAL, _AF_UNIX, if_true=1),
            refuse,
            _instruction(_RETURN, _ALLOW),
        ]
    for both, checks, error in _ARGUMENT_RULES:
        program += _rule(both[column], checks, error)
    for both in _IGNORED.values():
        program += _rule(both[column], (), _DONE)
    for position, number in enumerate(denied):
        program.append(_instruction(_JUMP_EQUAL, number, if_true=len(denied) - position))
    return b"".join([*program, _instruction(_RETURN, _ALLOW), refuse])


def _allow_internet(number: int) -> list[bytes]:
    """Returns instructions that allow a socket of TCP or UDP; other calls pass on, with their number loaded."""
    choices = [
        _instruction(_LOAD, _OFFSET_ARGUMENT_0),
        _instruction(_JUMP_EQUAL, _AF_INET, if_true=1),
        _instruction(_JUMP_EQUAL, _AF_INET6, if_false=9),
        _instruction(_LOAD, _OFFSET_ARGUMENT_1),
        _instruction(_AND, _SOCKET_TYPE),
        _instruction(_JUMP_EQUAL, _STREAM, if_true=1),
        _instruction(_JUMP_EQUAL, _DATAGRAM, if_false=5),
        _instruction(_LOAD, _OFFSET_ARGUMENT_2),
        _instruction(_JUMP_EQUAL, _ANY, if_true=2),
        _instruction(_JUMP_EQUAL, _TCP, if_true=1),
        _instruction(_JUMP_EQUAL, _UDP, if_false=1),
        _instruction(_RETURN, _ALLOW),
        _instruction(_LOAD, _OFFSET_NUMBER),
    ]
    return [_instruction(_JUMP_EQUAL, number, if_false=len(choices)), *choices]


_HIGH_DESCRIPTOR = 100
_GRACE_CPU_S = 1
_OPEN_FILES = 256
_PENDING_SIGNALS = 4096


@dataclass(frozen=True)
class Confinement:
    """Confinement of a program; `uid` None keeps the user, an empty `seccomp` installs no filter."""

    home: str
    uid: int | None
    seccomp: bytes
    bound_address_space: bool


def give_up_privileges(confinement: Confinement) -> None:
    """Takes a session of its own and another user, forbids new privileges and installs the filter."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.umask(0o077)
    os.chdir(confinement.home)
    if confinement.uid is not None:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        os.setgroups([])
        os.setresgid(confinement.uid, confinement.uid, confinement.uid)
        os.setresuid(confinement.uid, confinement.uid, confinement.uid)
    kernel.set_dumpable(True)
    resource.setrlimit(resource.RLIMIT_CORE, (CORE_BYTES, CORE_BYTES))  # the filter lets nobody change it
    kernel.forbid_new_privileges()
    if confinement.seccomp:
        kernel.install_filter(confinement.seccomp)


def apply_limits(confinement: Confinement, limits: Limits, runs: int) -> None:
    """Applies the limits of a job, with CPU time for `runs` answers."""
    for name, value in resource_limits(limits, runs).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if confinement.bound_address_space:
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    if confinement.uid is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))


def install_descriptors(descriptors: list[int]) -> None:
    """Makes `descriptors[i]` descriptor i, kept by an execve, and closes all others."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _HIGH_DESCRIPTOR) for descriptor in descriptors]
    for target, descriptor in enumerate(high):
        os.dup2(descriptor, target, inheritable=True)
    kernel.close_from(len(descriptors))


def resource_limits(limits: Limits, runs: int) -> dict[str, int]:
    """Returns the resource limits of a process by name, but for the number of processes and core dumps."""
    return {
        "RLIMIT_CPU": -(-limits.cpu_ms // 1000) * max(1, runs) + _GRACE_CPU_S,
        "RLIMIT_NOFILE": _OPEN_FILES,
        "RLIMIT_FSIZE": max(limits.file_bytes, limits.output_bytes + 1),
        # As judges have it: deep recursion is bounded by memory, whatever the service was started with.
        "RLIMIT_STACK": limits.memory_bytes,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_SIGPENDING": _PENDING_SIGNALS,
        "RLIMIT_NICE": 0,
        "RLIMIT_RTPRIO": 0,
    }
