"""Worker slots whose last job does not end."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.sandbox.config import SandboxConfig
from services.sandbox.languages.catalog import load_catalog
from services.sandbox.runtime import worker_slots
from services.sandbox.runtime.cgroups import CgroupHost, SlotCgroup
from services.sandbox.runtime.compile_cache import CompileCache
from services.sandbox.runtime.failure import SandboxFailedError
from services.sandbox.runtime.isolation import Isolation
from services.sandbox.runtime.sandboxes import SandboxFactory, Zygotes
from services.sandbox.runtime.worker_slots import WorkerSlot

NO_PROCESS = 2**22 + 1  # above the kernel's highest number


async def test_no_job_comes_to_one_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_slots, "_EMPTY_S", 0.05)
    cgroup = SlotCgroup(CgroupHost(2, {"unified": tmp_path}, ()), "1-2", "slot-0")
    folder = tmp_path / "perigee-sandbox" / "1-2" / "slot-0"
    folder.mkdir(parents=True)
    (folder / "cgroup.procs").write_text(f"{NO_PROCESS}\n")
    slot = WorkerSlot("slot-0", 60001, tmp_path / "slot-0", cgroup)
    factory = SandboxFactory(
        Isolation(warm=True, container=None),
        Zygotes(tmp_path, None, [60001], isolated=True),
        None,
        CompileCache(0, 0),
    )
    python = load_catalog(SandboxConfig()).find("python")
    assert python is not None
    await factory.clear(slot)
    with pytest.raises(SandboxFailedError, match="processes of an earlier job in slot-0 do not end"):
        async with factory.open(python, slot):
            pass
    (folder / "cgroup.procs").write_text("")
    await factory.clear(slot)
    assert slot.is_empty
