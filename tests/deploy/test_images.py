"""The images: what is in them, and the services that need no model started from them with the rights of the stack."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.podman import PREFIX, ROOT, Podman
from tests.unit.test_deploy_compose import SERVICES
from tests.unit.test_deploy_images import TARGETS

if "PERIGEE_TEST_IMAGES" not in os.environ:
    pytest.skip("images and the compose stack are for `make test-deploy`", allow_module_level=True)

pytestmark = pytest.mark.timeout(3600)
WANTED = os.environ["PERIGEE_TEST_IMAGES"].split() or TARGETS
# Megabytes, a tenth above what was measured: who adds a package sees what it weighs.
LARGEST = {"control": 620, "reward": 1600, "trainer": 1800, "rollout": 3230, "sandbox": 920, "sandbox-full": 2820}
TOKEN = "of-the-tests"
STARTED = {"buffer": "control", "reward": "reward", "sandbox": "sandbox"}


@pytest.fixture(scope="module", params=WANTED)
def target(request: pytest.FixtureRequest, podman: Podman) -> str:
    """An image that is built."""
    print(podman.build(request.param))
    return str(request.param)


def test_an_image_has_its_packages_and_no_others(podman: Podman, target: str) -> None:
    image = f"{PREFIX}/{target}:latest"
    about = json.loads(podman("image", "inspect", image))[0]
    assert about["Size"] < LARGEST[target] * 1e6
    assert about["Config"]["User"] == ("0:0" if target.startswith("sandbox") else "10001:10001")
    labels = about["Config"]["Labels"]
    assert {"title", "description", "version", "revision", "licenses"} <= {name.split(".")[-1] for name in labels}
    search = "for name in cc gcc g++ ld make pip uv git; do command -v $name; done; true"
    tools = podman("run", "--rm", image, "sh", "-c", search).split()
    assert bool(tools) == target.startswith("sandbox"), tools
    script = (ROOT / "tools/missing_libraries.py").read_text()
    run = ["run", "--rm", "-i", "--read-only", "--cap-drop", "ALL", "--user", "10001", image]
    assert podman(*run, "python", "-", "/opt/perigee", check=False, text=script) == ""


def options_of(name: str) -> list[str]:
    """The rights that compose.yaml gives a service, as options of podman."""
    service = SERVICES[name]
    flags = ["--read-only", "--cap-drop", "ALL", "--memory", service["mem_limit"]]
    flags += [word for capability in service.get("cap_add", ()) for word in ("--cap-add", capability)]
    flags += [word for option in service["security_opt"] for word in ("--security-opt", option)]
    flags += [word for mount in service["tmpfs"] for word in ("--tmpfs", mount)]
    settings = {name: str(value) for name, value in service["environment"].items() if "TOKEN" not in name}
    flags += [word for each in settings.items() for word in ("--env", "=".join(each))]
    return flags


@pytest.fixture(scope="module", params=[name for name, image in STARTED.items() if image in WANTED])
def container(request: pytest.FixtureRequest, podman: Podman) -> Iterator[tuple[str, str]]:
    """The service and its container, ready, with the rights and limits of the stack."""
    service = str(request.param)
    podman.build(STARTED[service])
    name = f"perigee-test-{service}"
    volumes = ["--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw"] if service == "sandbox" and on_cgroup_v1() else []
    command = ["python", "-m", f"services.{service}"]
    if service == "buffer":
        command += ["--set", "data_path=/tmp/data"]
    image = f"{PREFIX}/{STARTED[service]}:latest"
    podman("rm", "--force", "--ignore", name)
    options = ["--name", name, "--env", f"PERIGEE_TOKEN={TOKEN}", *options_of(service), *volumes]
    podman("run", "--detach", *options, image, *command)
    try:
        print(f"{service} is ready {podman.wait_ready(name):.1f} s after its container started")
        yield service, name
    finally:
        podman("rm", "--force", "--time", "20", name)


def on_cgroup_v1() -> bool:
    """Whether the host's control groups are of version 1."""
    return not Path("/sys/fs/cgroup/cgroup.controllers").exists()


async def test_a_service_starts_with_the_rights_of_the_stack(podman: Podman, container: tuple[str, str]) -> None:
    service, name = container
    assert podman("exec", name, "id", "-u") == ("0" if service == "sandbox" else "10001")
    assert podman("exec", name, "sh", "-c", "touch /opt/perigee/x", check=False) != ""
    if service == "sandbox":
        cpp = "#include <iostream>\nint main() { std::cout << 6 * 7; }"
        address = f"{podman.address_of(name)}:50056"
        async with SandboxClient.connect(address, token=TOKEN) as sandbox:
            for language, source in (("python", "print(6 * 7, end='')"), ("cpp", cpp)):
                result = await sandbox.run(source, language=language)
                assert result.stdout == b"42", result
                assert result.status == pb.STATUS_OK, result
            assert (await sandbox.run("x = bytearray(1 << 30)")).status == pb.STATUS_MEMORY_LIMIT
