"""The chart's pods in podman, each container as a kubelet would start it: they prepare the example and train it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.test_helm import container_of, environment
from tests.fixtures.helm import NAMESPACE, RECIPE, RELEASE, Manifest, Render, of_kind, pods
from tests.fixtures.podman import PREFIX, ROOT, Podman

if "PERIGEE_TEST_IMAGES" not in os.environ:
    pytest.skip("the chart's pods are for `make test-deploy`", allow_module_level=True)

pytestmark = pytest.mark.timeout(5400)
NETWORK, SUBNET = "perigee-pods", "10.97.31"
SERVICES = ("buffer", "sandbox", "reward", "trainer", "coordinator", "rollout")


class Pods:
    """A network of pods, whose names lead to fixed addresses, with volumes and files of their own."""

    def __init__(self, podman: Podman, folder: Path, manifests: list[Manifest]) -> None:
        self.podman = podman
        self._folder = folder
        self._templates = dict(pods(manifests))
        self._addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(self._templates, 10)}
        (config_map,) = of_kind(manifests, "ConfigMap")
        (folder / "recipe.yaml").write_text(config_map["data"]["recipe.yaml"])
        (folder / "auth").mkdir()
        (folder / "auth/token").write_text("token-of-the-pods\n")

    def name(self, component: str) -> str:
        """Returns the name of a container."""
        return f"{NETWORK}-{component}"

    def start(self, component: str, *options: str) -> None:
        """Starts a pod's container with what its manifest says, as far as podman has it."""
        template = self._templates[component]
        security = template["spec"]["securityContext"] | container_of(template)["securityContext"]
        assert security["readOnlyRootFilesystem"]
        command = ["run", "--detach", "--name", self.name(component), "--network", NETWORK, "--read-only"]
        command += ["--ip", self._addresses[component], "--cap-drop", "ALL"]
        command += [f"--cap-add={each}" for each in security["capabilities"].get("add", ())]
        command += ["--user", f"{security['runAsUser']}:{security['runAsGroup']}"]
        command += [] if security["allowPrivilegeEscalation"] else ["--security-opt", "no-new-privileges"]
        command += ["--memory", container_of(template)["resources"]["limits"]["memory"].removesuffix("i")]
        command += [f"--add-host={host}:{address}" for host, address in self._hosts()]
        filled = environment(template) | {"POD_IP": self._addresses[component]}
        for each in container_of(template)["env"]:
            value = each.get("value", filled[each["name"]]).replace("$(POD_IP)", filled["POD_IP"])
            command += ["--env", f"{each['name']}={value.replace('$(POD_NAME)', filled.get('POD_NAME', ''))}"]
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for mount in container_of(template)["volumeMounts"]:
            command += self._volume(volumes.get(mount["name"], {}), mount)
        image = container_of(template)["image"].rpartition("/")[2].partition(":")[0]
        self.podman(*command, *options, f"{PREFIX}/{image}", *container_of(template)["args"])

    def wait_end(self, component: str) -> str:
        """Waits for the end of a job; returns what it printed."""
        code = self.podman("wait", self.name(component))
        log = self.podman("logs", self.name(component), check=False)
        assert code == "0", log[-3000:]
        return log

    def _hosts(self) -> Iterator[tuple[str, str]]:
        for component, address in self._addresses.items():
            service = f"{RELEASE}-{component}.{NAMESPACE}.svc"
            yield from ((service, address), (f"{RELEASE}-{component}-0.{service}", address))

    def _volume(self, volume: Manifest, mount: Manifest) -> list[str]:
        path, flag = mount["mountPath"], ":ro" if mount.get("readOnly") else ""
        if "configMap" in volume or "projected" in volume:
            source = self._folder / ("auth" if "projected" in volume else mount["subPath"])
            return ["--volume", f"{source}:{path}:ro"]
        if "emptyDir" in volume:
            size = volume["emptyDir"].get("sizeLimit", "1Gi").removesuffix("i").lower()
            return ["--shm-size", size] if path == "/dev/shm" else ["--tmpfs", f"{path}:rw,mode=1777,size={size}"]
        return ["--volume", f"{NETWORK}-{mount['name']}:{path}{flag}"]


@pytest.fixture(scope="module")
def started(podman: Podman, render: Render, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    """The pods of values/local-cpu.yaml, with a shorter recipe, ready."""
    folder = tmp_path_factory.mktemp("pods")
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(0o755)
    values: dict[str, Any] = yaml.safe_load(RECIPE.read_text())
    run = values["run"]
    run |= {"iterations": 3, "max_live_groups": 32, "evaluation": {"every": 3, "samples": 1, "problems": 16}}
    run["sft"] = [run["sft"][0] | {"steps": 60}]
    values["rollout"] |= {"max_num_seqs": 64, "kv_cache_bytes": 134217728}
    (folder / "short.yaml").write_text(yaml.safe_dump(values))
    shorter = ("--set-file", f"recipe={folder / 'short.yaml'}")
    made = Pods(podman, folder, render("local-cpu", *shorter, "--set", "train.enabled=true"))
    for image in ("control", "sandbox", "reward", "trainer", "rollout"):
        print(podman.build(image))
    file = f"FROM {PREFIX}/trainer\nCOPY . /recipe\n"
    podman(
        "build", "--quiet", "--tag", f"{PREFIX}/arithmetic", "--file", "-", str(ROOT / "examples/arithmetic"), text=file
    )
    podman("network", "create", "--subnet", f"{SUBNET}.0/24", NETWORK)
    try:
        made.start("prepare")
        print(made.wait_end("prepare"))
        on_v1 = not Path("/sys/fs/cgroup/cgroup.controllers").exists()
        for service in SERVICES:
            hierarchy = ("--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw") if service == "sandbox" and on_v1 else ()
            made.start(service, *hierarchy)
        for service in SERVICES:
            print(f"{service} is ready {podman.wait_ready(made.name(service)):.1f} s after the one before")
        yield made
    finally:
        names = podman("ps", "--all", "--format", "{{.Names}}", "--filter", f"name={NETWORK}-").split()
        podman("rm", "--force", "--time", "20", *names)
        podman("volume", "rm", "--force", *podman("volume", "ls", "--quiet", "--filter", f"name={NETWORK}-").split())
        podman("network", "rm", NETWORK)


def test_the_example_is_trained_by_the_chart_s_pods(started: Pods) -> None:
    started.start("train")
    log = started.wait_end("train")
    assert re.search(r"finished: iteration (\d+) of \1,", log), log


def test_pods_end_within_their_grace(started: Pods) -> None:
    for service in reversed(SERVICES):
        started.podman("stop", "--time", "120", started.name(service))
        state = json.loads(started.podman("inspect", started.name(service)))[0]["State"]
        assert state["ExitCode"] == 0, (service, state)
