"""The bundle of an OCI container as the sandbox's: namespaces, read-only root of the host's folders, no privileges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOST_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/etc/alternatives")
UID = 64001
NAMESPACES = ("pid", "ipc", "uts", "mount", "network", "cgroup")
REFUSED_CALLS = [
    "acct", "add_key", "bpf", "chroot", "clock_settime", "delete_module", "fanotify_init", "finit_module", "fsconfig",
    "fsmount", "fsopen", "fspick", "init_module", "io_setup", "io_uring_enter", "io_uring_register", "io_uring_setup",
    "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load", "keyctl", "mount", "mount_setattr", "move_mount",
    "name_to_handle_at", "open_by_handle_at", "open_tree", "perf_event_open", "personality", "pidfd_getfd",
    "pivot_root", "process_vm_readv", "process_vm_writev", "ptrace", "quotactl", "reboot", "request_key", "setns",
    "settimeofday", "swapoff", "swapon", "syslog", "umount2", "unshare", "userfaultfd",
]  # fmt: skip
EPERM, ENOSYS, AF_UNIX, CLONE_NEWUSER = 1, 38, 1, 0x10000000
_LIMITS = {"CPU": 10, "NOFILE": 256, "FSIZE": 16 << 20, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0, "NPROC": 64}


def make_bundle(folder: Path, command: Sequence[str], seccomp: bool = True) -> None:
    """Writes a bundle whose process is `command`; `seccomp` says whether system calls are filtered."""
    mounted = _make_rootfs(folder / "rootfs")
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in NAMESPACES],
        "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/acpi"],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    }
    if seccomp:
        linux["seccomp"] = _seccomp()
    config = {
        "ociVersion": "1.0.2",
        "hostname": "box",
        "root": {"path": "rootfs", "readonly": True},
        "process": {
            "terminal": False,
            "user": {"uid": UID, "gid": UID, "umask": 0o077},
            "args": list(command),
            "env": ["PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/box", "TMPDIR=/tmp", "LANG=C.UTF-8"],
            "cwd": "/box",
            "capabilities": {},
            "rlimits": [{"type": f"RLIMIT_{kind}", "soft": value, "hard": value} for kind, value in _LIMITS.items()],
            "noNewPrivileges": True,
        },
        "mounts": [*(_bind(path) for path in mounted), *_own_mounts()],
        "linux": linux,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _make_rootfs(rootfs: Path) -> list[str]:
    for name in ("proc", "dev", "box", "tmp", "etc"):
        (rootfs / name).mkdir(parents=True)
    mounted = []
    for path in map(Path, HOST_FOLDERS):
        target = rootfs / path.relative_to("/")
        if path.is_symlink():
            target.symlink_to(path.readlink())
        elif path.is_dir():
            target.mkdir(parents=True)
            mounted.append(str(path))
    return mounted


def _bind(path: str) -> dict[str, Any]:
    return {"destination": path, "type": "bind", "source": path, "options": ["bind", "ro", "nosuid", "nodev"]}


def _own_mounts() -> list[dict[str, Any]]:
    space = "size=16m,nr_inodes=1024"
    tmpfs = {
        "/dev": ["nosuid", "noexec", "size=64k", "mode=755"],
        "/dev/shm": ["nosuid", "nodev", "size=16m"],
        "/tmp": ["nosuid", "nodev", "mode=1777", *space.split(",")],
        "/box": ["nosuid", "nodev", "mode=700", f"uid={UID}", f"gid={UID}", *space.split(",")],
    }
    proc = {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "nodev", "noexec"]}
    rest = [
        {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": options} for path, options in tmpfs.items()
    ]
    return [proc, *rest]


def _seccomp() -> dict[str, Any]:
    def refuse(names: Sequence[str], errno: int = EPERM, **rule: Any) -> dict[str, Any]:
        return {"names": list(names), "action": "SCMP_ACT_ERRNO", "errnoRet": errno, **rule}

    user_namespace = {"index": 0, "value": CLONE_NEWUSER, "valueTwo": CLONE_NEWUSER, "op": "SCMP_CMP_MASKED_EQ"}
    other_family = {"index": 0, "value": AF_UNIX, "op": "SCMP_CMP_NE"}
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            refuse(REFUSED_CALLS),
            refuse(["clone3"], ENOSYS),
            refuse(["clone"], args=[user_namespace]),
            refuse(["socket", "socketpair"], args=[other_family]),
        ],
    }
