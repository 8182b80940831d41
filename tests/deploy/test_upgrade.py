"""A rolling upgrade: each service is replaced during a run by one of the next version, and the run goes on.

The next version has a further field in every request and response, which its clients set, and a further recipe key.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures.sandbox import skip_unless_possible

ROOT = Path(__file__).parents[2]
ORDER = ("sandbox", "reward", "buffer", "rollout", "trainer", "coordinator")
PEERS = {
    "reward": ("sandbox",),
    "trainer": ("buffer",),
    "coordinator": ("buffer", "trainer", "reward"),
    "rollout": ("buffer", "coordinator"),
}
WAIT_S = 240.0
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        "PERIGEE_TEST_UPGRADE" not in os.environ, reason="needs PERIGEE_TEST_UPGRADE, since it takes minutes"
    ),
]


def write_next_version(folder: Path) -> Path:
    """The sources with another contract, clients that use it, and another configuration of a run."""
    for name in ("perigee", "services", "protos"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    protos = sorted((folder / "protos").rglob("*.proto"))
    for proto in protos:
        text = re.sub(r"^(message \w+Request) \{\}", r"\1 {\n}", proto.read_text(), flags=re.MULTILINE)
        header = re.compile(r"^message \w+(?:Request|Response) \{\n", re.MULTILINE)
        proto.write_text(header.sub(lambda match: f"{match[0]}  string later_note = 900;\n", text))
    outputs = (f"--python_out={folder}", f"--grpc_python_out={folder}")
    command = (sys.executable, "-m", "grpc_tools.protoc", f"-I{folder / 'protos'}", *outputs, *map(str, protos))
    subprocess.run(command, check=True)
    change(
        folder / "perigee/rpc.py", "stream = call(request,", "request.later_note = 'x'\n        stream = call(request,"
    )
    change(
        folder / "perigee/rpc.py",
        "return await call(request,",
        "request.later_note = 'x'\n            return await call(request,",
    )
    change(
        folder / "services/coordinator/run_config.py",
        "class RunConfig(Model):\n",
        "class RunConfig(Model):\n    later_key: int = 3\n",
    )
    return folder


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file}: {old}"
    file.write_text(text.replace(old, new))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def write_recipe(folder: Path, ports: dict[str, int]) -> Path:
    """The arithmetic recipe for services on these ports, with small iterations and without an end."""
    values = yaml.safe_load((ROOT / "examples/arithmetic/recipe.yaml").read_text())
    values["prepare"] = str(ROOT / "examples/arithmetic/prepare.py")
    values["run"] |= {"iterations": 100_000, "sft": [], "max_live_groups": 8, "group_size": 4}
    values["run"]["evaluation"] = {"every": 0, "samples": 1}
    for service, port in ports.items():
        section = values.setdefault(service, {})
        section["server"] = {"port": port, "drain_seconds": 5.0}
        section |= {f"{peer}_address": f"127.0.0.1:{ports[peer]}" for peer in PEERS.get(service, ())}
    values["buffer"]["data_path"] = str(folder / "buffer")
    values["sandbox"] |= {"slots": 1, "max_sessions": 0, "state_path": str(folder / "sandbox")}
    values["coordinator"]["run_path"] = str(folder / "coordinator")
    values["trainer"]["run_path"] = str(folder / "trainer")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


class Stack:
    """Processes of the services, and of the command that follows the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, tree: Path, *command: str | Path) -> None:
        """Starts a command, the service of this name unless told otherwise, with the sources of a tree."""
        service = (sys.executable, "-m", f"services.{name}", "--config", self.folder / "prepared/recipe.yaml")
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command or service,
                cwd=tree,
                env=os.environ | {"PYTHONPATH": str(tree)},
                stdout=log,
                stderr=log,
            )

    def stop(self, name: str) -> int:
        """Asks a process to end; returns its exit code."""
        self.processes[name].terminate()
        return self.processes[name].wait(60)

    def lines(self) -> list[dict[str, Any]]:
        """The iterations recorded so far."""
        path = self.folder / "runs/latest/metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition; fails with the log of the command when it does not come."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            ended = "train" in self.processes and self.processes["train"].poll() is not None
            if ended or time.monotonic() > deadline:
                pytest.fail((self.folder / "train.log").read_text()[-3000:])
            time.sleep(0.1)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    skip_unless_possible("zygote")
    stack = Stack(tmp_path)
    yield stack
    for process in stack.processes.values():
        process.terminate()
    for process in stack.processes.values():
        process.wait(60)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_run_goes_on_while_each_service_becomes_one_of_the_next_version(stack: Stack, tmp_path: Path) -> None:
    later = write_next_version(tmp_path / "later")
    ports = dict(zip(ORDER, free_ports(len(ORDER)), strict=True))
    recipe = write_recipe(tmp_path, ports)
    perigee = Path(sys.executable).with_name("perigee")
    subprocess.run([perigee, "prepare", recipe, "--out", tmp_path / "prepared"], check=True)
    for service in ORDER:
        stack.start(service, ROOT)
    stack.wait(lambda: is_listening(ports["coordinator"]))
    follow = ("--coordinator", f"127.0.0.1:{ports['coordinator']}", "--runs-dir", tmp_path / "runs")
    stack.start("train", ROOT, perigee, "train", tmp_path / "prepared/recipe.yaml", *follow)
    stack.wait(lambda: len(stack.lines()) >= 2)
    for service in ORDER:
        assert stack.stop(service) == 0
        stack.start(service, later)
        seen = len(stack.lines())
        stack.wait(lambda seen=seen: len(stack.lines()) >= seen + 3)  # type: ignore[misc]
    lines = stack.lines()
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    assert sum(line["rollout/failures"] + line["reward/failures"] + line["train/groups_failed"] for line in lines) == 0
    assert all(stack.processes[service].poll() is None for service in ORDER)
