"""A container's control group on a real kernel: a group of cgroup v2 in a namespace of its own, mounted read-only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Enters a new group and makes it the top of a control group namespace, as a container runtime does; then delegates.
CONTAINER = """
import os, sys
from pathlib import Path
from perigee.errors import FailedPreconditionError
from services.sandbox.agent import kernel
from services.sandbox.runtime.cgroups import CgroupHost
from services.sandbox.runtime.delegation import SERVICE_FOLDER, delegate_own_group

host, own = Path(sys.argv[1]), Path(sys.argv[2])
kernel.unshare(kernel.CLONE_NEWNS)
kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
kernel.mount("none", str(host), "cgroup2", 0)
group = host / f"perigee-test-{os.getpid()}"
group.mkdir()
(group / "cgroup.procs").write_text(str(os.getpid()))
kernel.unshare(kernel.CLONE_NEWCGROUP)
kernel.mount("none", str(own), "cgroup2", kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
try:
    delegate_own_group(CgroupHost(2, {"unified": own}, ()))
except FailedPreconditionError as error:
    print(error.message)  # the controllers of this machine may be those of cgroup v1
print("left:", (own / "cgroup.procs").read_text().split())
print("moved:", str(os.getpid()) in (own / SERVICE_FOLDER / "cgroup.procs").read_text().split())
roots = [line.split()[3] for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {host} " in line]
print("seen from inside, the host's mount is", roots)
(host / "cgroup.procs").write_text(str(os.getpid()))
(group / SERVICE_FOLDER).rmdir()
group.rmdir()
"""


def test_processes_move_down_and_the_mount_becomes_writable(tmp_path: Path) -> None:
    folders = [tmp_path / "host", tmp_path / "own"]
    for folder in folders:
        folder.mkdir()
    command = [sys.executable, "-c", CONTAINER, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if os.geteuid() != 0 or "cgroup2" in done.stderr or "unshare" in done.stderr:
        pytest.skip("needs root and the right to mount cgroup v2: a container's control group")
    assert done.returncode == 0, done.stderr
    assert "left: []\nmoved: True\n" in done.stdout
    assert "the host's mount is ['/..']" in done.stdout
