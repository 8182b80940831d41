"""What is detected of a machine, and the system-call filter for it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.errors import FailedPreconditionError
from services.sandbox.agent.confinement import build_filter
from services.sandbox.config import SandboxConfig
from services.sandbox.runtime.cgroups import find_cgroups, instance_name
from services.sandbox.runtime.isolation import UNSAFE_LABEL, Machine, choose_isolation
from services.sandbox.runtime.worker_slots import choose_first_uid

V1 = """30 29 0:28 / /cg/memory rw - cgroup cgroup rw,memory
31 29 0:29 / /cg/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 29 0:30 / /cg/pids rw - cgroup cgroup rw,pids
"""
V2 = "35 29 0:33 / {mount} rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def test_cgroup_v1_with_joint_controllers() -> None:
    host = find_cgroups(V1)
    assert host is not None
    assert (host.version, host.hybrid) == (1, ())
    assert host.mounts["cpuacct"] == host.mounts["cpu"] == Path("/cg/cpu,cpuacct")


def test_hybrid_names_the_mount_to_hide() -> None:
    host = find_cgroups(V1 + V2.format(mount="/cg/unified"))
    assert host is not None
    assert (host.version, host.hybrid) == (1, ("/cg/unified",))


@pytest.mark.parametrize(
    ("controllers", "found"), [("cpuset cpu io memory pids", True), ("cpu memory", False), ("", False)]
)
def test_cgroup_v2_needs_its_controllers(controllers: str, found: bool, tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text(controllers)
    host = find_cgroups(V2.format(mount=tmp_path))
    assert (host is not None) == found
    if host is not None:
        assert host.version == 2


def test_no_cgroups() -> None:
    assert find_cgroups("1 0 8:1 / / rw - ext4 /dev/sda rw\n") is None


def test_a_machine_without_root_is_reported_what_to_do() -> None:
    machine = Machine(root=False, cgroups=None, instance="1-1")
    with pytest.raises(FailedPreconditionError) as error:
        choose_isolation(SandboxConfig(), machine)
    assert "zygote: start the service as root" in error.value.message
    assert "process" in error.value.message
    assert choose_isolation(SandboxConfig(isolation="process"), machine).label(python=False) == UNSAFE_LABEL


def test_no_two_instances_have_one_name() -> None:
    assert instance_name() != instance_name()


def test_services_beside_each_other_have_users_of_their_own() -> None:
    whole_machine = "         0          0 4294967295\n"
    first = {choose_first_uid(whole_machine) for _ in range(50)}
    assert len(first) > 40
    assert all(1 << 20 <= uid < 1 << 31 and uid % 4096 == 0 for uid in first)
    assert choose_first_uid("         0     100000      65536\n") < 65536 - 4096


def run_filter(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What a filter returns, by an interpreter of the few instructions that it uses."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    instructions = [struct.unpack_from("=HBBI", program, offset) for offset in range(0, len(program), 8)]
    position, accumulator = 0, 0
    while True:
        code, if_true, if_false, value = instructions[position]
        position += 1
        if code == 0x06:
            return int(value)
        if code == 0x20:
            [accumulator] = struct.unpack_from("=I", data, value)
            continue
        holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
        position += if_true if holds else if_false


ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
DONE, ENOMEM = 0x00050000, 0x0005000C
X86_64 = 0xC000003E


@pytest.mark.parametrize(
    ("number", "argument", "action"),
    [
        (0, 0, ALLOW),  # read
        (59, 0, ALLOW),  # execve
        (133, 0, ALLOW),  # mknod
        (163, 0, EPERM),  # acct, the first of the list
        (153, 0, EPERM),  # vhangup, the last of the list
        (101, 0, EPERM),  # ptrace
        (165, 0, EPERM),  # mount
        (272, 0, EPERM),  # unshare
        (435, 0, ENOSYS),  # clone3
        (56, 0x11, ALLOW),  # clone as fork does
        (56, 0x10000011, EPERM),  # clone into a user namespace
        (41, 1, ALLOW),  # AF_UNIX
        (41, 2, EPERM),  # AF_INET
        (41, 40, EPERM),  # AF_VSOCK
        (53, 1, ALLOW),  # socketpair
        (0x40000000, 0, ENOSYS),  # x32
    ],
)
def test_filter_decides_call_by_call(number: int, argument: int, action: int) -> None:
    assert run_filter(build_filter("x86_64"), X86_64, number, argument) == action


HIGH_POINTER = 0x7F00_0000_0000


@pytest.mark.parametrize(
    ("number", "arguments", "action"),
    [
        (9, (0, 4096, 3, 0x22), ALLOW),  # mmap
        (9, (0, 1 << 21, 3, 0x40022), ENOMEM),  # with MAP_HUGETLB
        (29, (0, 4096, 0o1600), ALLOW),  # shmget
        (29, (0, 1 << 21, 0o1600 | 0x800), ENOMEM),  # with SHM_HUGETLB
        (319, (HIGH_POINTER, 1), ALLOW),  # memfd_create
        (319, (HIGH_POINTER, 5), ENOMEM),  # with MFD_HUGETLB
        (157, (38, 1), ALLOW),  # prctl PR_SET_NO_NEW_PRIVS
        (157, (22, 2), EPERM),  # PR_SET_SECCOMP
        (317, (1, 0), EPERM),  # seccomp
        (54, (3, 1, 7), ALLOW),  # setsockopt SO_SNDBUF
        *((54, (3, 1, name), EPERM) for name in (26, 50, 51, 52)),
        (54, (3, 41, 26), ALLOW),  # IPV6_V6ONLY has the number of SO_ATTACH_FILTER
        (160, (7, HIGH_POINTER), ALLOW),  # setrlimit RLIMIT_NOFILE
        (160, (4, HIGH_POINTER), DONE),  # RLIMIT_CORE
        (302, (0, 4, 0, HIGH_POINTER), ALLOW),  # prlimit64 reads RLIMIT_CORE
        (302, (0, 4, HIGH_POINTER, 0), DONE),
        (302, (0, 4, HIGH_POINTER | 8, 0), DONE),
        (302, (0, 7, HIGH_POINTER, 0), ALLOW),
        (162, (), DONE),  # sync
        (306, (3,), DONE),  # syncfs
    ],
)
def test_filter_decides_by_arguments(number: int, arguments: tuple[int, ...], action: int) -> None:
    assert run_filter(build_filter("x86_64"), X86_64, number, *arguments) == action


@given(st.integers(0, 600))
def test_filter_ends_for_every_number_and_architecture(number: int) -> None:
    assert run_filter(build_filter("x86_64"), 0x40000003, number, 0) == KILL
    assert run_filter(build_filter("x86_64"), X86_64, number, 1) in (ALLOW, EPERM, ENOSYS, DONE)
    assert run_filter(build_filter("aarch64"), 0xC00000B7, number, 1) in (ALLOW, EPERM, ENOSYS, DONE)
