"""What is written to a slot's control groups and read from them, on trees that stand in for the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perigee.errors import FailedPreconditionError, InternalError
from services.sandbox.agent.usage import open_usage
from services.sandbox.runtime import cgroups
from services.sandbox.runtime.cgroups import (
    CgroupHost,
    SlotCgroup,
    find_cgroups,
    find_groups,
    group_folders,
    remove_group,
    weigh_instances,
    weigh_jobs,
)
from services.sandbox.runtime.delegation import SERVICE_FOLDER, delegate_own_group
from services.sandbox.runtime.isolation import Machine, find_problem

INSTANCE = "1-2-0"
V2_FILES = {
    "memory.max": "max",
    "memory.swap.max": "max",
    "pids.max": "max",
    "cpu.max": "max 100000",
    "cpu.stat": "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\n",
    "memory.events": "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n",
    "memory.peak": "4096\n",
    "memory.current": "1024\n",
    "memory.stat": "anon 5\nfile 700\nkernel 3\nshmem 200\nfile_mapped 1\n",
    "cgroup.procs": "11\n12\n",
}
V1_FILES = {
    "memory": {
        "memory.limit_in_bytes": "9223372036854771712",
        "memory.memsw.limit_in_bytes": "9223372036854771712",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
        "memory.max_usage_in_bytes": "8192\n",
        "memory.usage_in_bytes": "2048\n",
        "memory.stat": "cache 1\nshmem 0\ntotal_cache 900\ntotal_rss 5\ntotal_shmem 300\n",
    },
    "pids": {"pids.max": "max"},
    "cpuacct": {"cpuacct.usage": "1500000\n"},
    "cpu": {"cpu.cfs_quota_us": "-1"},
}


def fill(folder: Path, files: dict[str, str]) -> None:
    """Files as the kernel shows them in a group."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def read(folder: Path, *names: str) -> list[str]:
    return [(folder / name).read_text() for name in names]


@pytest.fixture
def v2(tmp_path: Path) -> tuple[SlotCgroup, Path]:
    """A created group of cgroup v2, and its folder."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids")
    host = find_cgroups(f"35 29 0:33 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    assert host is not None
    folder = tmp_path / "perigee-sandbox" / INSTANCE / "slot-0"
    fill(folder, V2_FILES)
    group = SlotCgroup(host, INSTANCE, "slot-0")
    group.create()
    return group, folder


@pytest.fixture
def v1(tmp_path: Path) -> tuple[SlotCgroup, dict[str, Path]]:
    """A created group of cgroup v1, and its folders by controller."""
    host = CgroupHost(1, {name: tmp_path / name for name in V1_FILES}, ())
    folders = {name: tmp_path / name / "perigee-sandbox" / INSTANCE / "slot-0" for name in V1_FILES}
    for name, files in V1_FILES.items():
        fill(folders[name], files)
    group = SlotCgroup(host, INSTANCE, "slot-0")
    group.create()
    return group, folders


def test_v2_controllers_are_passed_down_to_the_slot(v2: tuple[SlotCgroup, Path]) -> None:
    _, folder = v2
    for parent in list(folder.parents)[:3]:
        assert (parent / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    assert not (folder / "cgroup.subtree_control").exists()  # a group with processes may not pass controllers on


def test_v2_has_one_core_and_no_swap(v2: tuple[SlotCgroup, Path]) -> None:
    _, folder = v2
    assert read(folder, "cpu.max", "memory.swap.max", "memory.max", "pids.max") == ["100000 100000", "0", "max", "max"]


def test_v2_without_swap_accounting(tmp_path: Path) -> None:
    folder = tmp_path / "perigee-sandbox" / INSTANCE / "slot-0"
    fill(folder, {"memory.max": "max", "pids.max": "max"})
    SlotCgroup(CgroupHost(2, {"unified": tmp_path}, ()), INSTANCE, "slot-0").create()
    assert not (folder / "memory.swap.max").exists()


def test_v2_limits_of_a_job(v2: tuple[SlotCgroup, Path]) -> None:
    group, folder = v2
    group.limit(64 << 20, 10)
    assert read(folder, "memory.max", "pids.max") == [str(64 << 20), "26"]  # the sandbox's own processes have room
    assert read(folder, "memory.swap.max", "cpu.max") == ["0", "100000 100000"]
    group.limit(32 << 20, 10)
    assert read(folder, "memory.max", "pids.max") == [str(32 << 20), "26"]


def test_limits_that_stay_are_not_written_again(v2: tuple[SlotCgroup, Path]) -> None:
    group, folder = v2
    group.limit(64 << 20, 10)
    fill(folder, {"memory.max": "untouched", "pids.max": "untouched"})
    group.limit(64 << 20, 10)
    assert read(folder, "memory.max", "pids.max") == ["untouched", "untouched"]
    group.limit(64 << 20, 11)
    assert read(folder, "memory.max", "pids.max") == ["untouched", "27"]


def test_v2_is_entered_by_one_file(v2: tuple[SlotCgroup, Path]) -> None:
    group, folder = v2
    assert group.procs_paths == [str(folder / "cgroup.procs")]
    assert group.processes() == [11, 12]


def test_v2_usage(v2: tuple[SlotCgroup, Path]) -> None:
    group, folder = v2
    usage = open_usage(group.version, group.usage_paths)
    assert (usage.cpu_ns(), usage.oom_kills(), usage.peak_bytes(), usage.current_bytes()) == (1_500_000, 2, 4096, 1024)
    assert usage.cached_bytes() == 500
    fill(folder, {"memory.current": "99\n", "memory.peak": "100\n"})
    assert (usage.current_bytes(), usage.peak_bytes()) == (99, 100)  # read anew each time, by the same descriptors


def test_v2_forgets_its_peak_where_the_kernel_can(v2: tuple[SlotCgroup, Path]) -> None:
    group, folder = v2
    fill(folder, {"memory.peak": "7"})
    assert open_usage(group.version, group.usage_paths).reset_peak()
    assert (folder / "memory.peak").read_text() == "0"


def test_v2_tells_when_the_kernel_cannot_forget_the_peak(v2: tuple[SlotCgroup, Path]) -> None:
    """Before Linux 6.12 the file is read-only; root may open it all the same, and the write fails."""
    group, _ = v2
    usage = open_usage(group.version, group.usage_paths)
    read_only = os.open(group.usage_paths["peak"], os.O_RDONLY)
    os.dup2(read_only, usage.peak)
    assert not usage.reset_peak()
    assert usage.peak_bytes() == 4096


def test_v1_limits_of_a_job(v1: tuple[SlotCgroup, dict[str, Path]]) -> None:
    group, folders = v1
    limits = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    assert read(folders["cpu"], "cpu.cfs_quota_us") == ["100000"]
    for memory_bytes in (64 << 20, 32 << 20, 128 << 20):
        group.limit(memory_bytes, 10)
        assert read(folders["memory"], *limits) == [str(memory_bytes)] * 2
    assert read(folders["pids"], "pids.max") == ["26"]


def test_v1_usage(v1: tuple[SlotCgroup, dict[str, Path]]) -> None:
    group, folders = v1
    usage = open_usage(group.version, group.usage_paths)
    assert (usage.cpu_ns(), usage.oom_kills(), usage.peak_bytes(), usage.current_bytes()) == (1_500_000, 4, 8192, 2048)
    assert usage.cached_bytes() == 600
    assert group.procs_paths == [str(folder / "cgroup.procs") for folder in folders.values()]


def test_v1_with_controllers_on_one_mount_is_entered_once(tmp_path: Path) -> None:
    joint = tmp_path / "cpu,cpuacct"
    host = CgroupHost(1, {"memory": tmp_path / "memory", "pids": tmp_path / "pids", "cpuacct": joint, "cpu": joint}, ())
    assert len(SlotCgroup(host, INSTANCE, "slot-0").procs_paths) == 3


@pytest.mark.parametrize(
    ("version", "mount", "name", "one", "most"),
    [(1, "cpu", "cpu.shares", 1024, 1 << 18), (2, "unified", "cpu.weight", 100, 10_000)],
)
def test_jobs_weigh_as_much_as_the_slots(
    version: int, mount: str, name: str, one: int, most: int, tmp_path: Path
) -> None:
    host = CgroupHost(version, {mount: tmp_path}, ())
    top = tmp_path / "perigee-sandbox"
    for folder in (top, top / INSTANCE, top / "3-4"):
        fill(folder, {name: str(one)})
    weigh_jobs(host, INSTANCE, 16)
    assert [(top / path / name).read_text() for path in ("", INSTANCE)] == [str(17 * one), str(16 * one)]
    weigh_jobs(host, INSTANCE, 1000)
    assert [(top / path / name).read_text() for path in ("", INSTANCE)] == [str(most), str(most)]
    (top / INSTANCE / name).unlink()
    weigh_instances(host)
    assert (top / name).read_text() == str(one)


def test_groups_of_all_instances_are_found(v2: tuple[SlotCgroup, Path]) -> None:
    _, folder = v2
    (folder.parents[1] / "3-4").mkdir()
    (folder.parents[1] / "foreign").mkdir()
    host = CgroupHost(2, {"unified": folder.parents[2]}, ())
    assert find_groups(host) == [*group_folders(host, INSTANCE), folder.parents[1] / "3-4"]


def test_a_process_without_a_number_is_not_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another container; to kill 0 would be to kill this test."""
    monkeypatch.setattr(cgroups, "_REMOVAL_S", 0.0)
    (tmp_path / "1-2").mkdir()
    (tmp_path / "1-2" / "cgroup.procs").write_text("0\n")
    with pytest.raises(InternalError, match="1-2 cannot be removed"):
        remove_group(tmp_path / "1-2")


def container(top: Path, processes: str = "1\n7\n") -> CgroupHost:
    """The group of a container as the top of its own mount."""
    fill(top, {"cgroup.type": "domain", "cgroup.procs": processes})
    return CgroupHost(2, {"unified": top}, ())


def test_a_containers_group_hands_its_processes_down_and_controllers_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = container(tmp_path)
    moved: list[str] = []

    def move(path: Path, text: str) -> int:
        """As the kernel: a process that enters a group leaves its old one."""
        if path == tmp_path / SERVICE_FOLDER / "cgroup.procs":
            moved.append(text)
            fill(tmp_path, {"cgroup.procs": "".join(f"{pid}\n" for pid in (1, 7) if str(pid) not in moved)})
            if text == "7":
                raise ProcessLookupError  # it ended meanwhile
            return 0
        return open(path, "w").write(text)

    monkeypatch.setattr(Path, "write_text", move)
    delegate_own_group(host)
    assert moved == ["1", "7"]
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"


def test_the_top_of_the_hierarchy_and_v1_are_left_as_they_are(tmp_path: Path) -> None:
    delegate_own_group(CgroupHost(2, {"unified": tmp_path}, ()))
    delegate_own_group(CgroupHost(1, {"memory": tmp_path}, ()))
    assert list(tmp_path.iterdir()) == []


def test_a_group_that_cannot_be_written_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(mount: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(mount))

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(FailedPreconditionError, match="SYS_ADMIN and a control group namespace of its own"):
        delegate_own_group(container(tmp_path), refuse)


def test_a_mount_from_outside_of_the_namespace_is_seen(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids")
    mounts = f"35 29 0:33 /../.. {tmp_path} rw - cgroup2 cgroup2 rw\n"
    host = find_cgroups(mounts)
    assert host is not None
    assert host.foreign
    problem = find_problem("zygote", Machine(root=True, cgroups=host, instance="i"))
    assert problem is not None
    assert "leave the host's /sys/fs/cgroup out" in problem
