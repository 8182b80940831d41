"""The chart: rendered with each file of values, checked against Kubernetes' schemas and against the services."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import re
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.main import get_command

import perigee
from perigee.cli.main import app
from perigee.cli.recipe import build_recipe, load_recipe
from perigee.cli.run_folder import RunFolder
from perigee.rpc import VARIABLES
from services.kit.config import SERVER_ALIASES, ServiceConfig, environment_values, validate
from services.kit.health import serving_probes
from tests.fixtures.helm import CHART, NAMESPACE, RECIPE, RELEASE, Helm, Manifest, Render, of_kind, pods
from tests.unit.test_documents import ROOT

VALUES = sorted(path.stem for path in (CHART / "values").glob("*.yaml"))
# What no file of values has, each rendered with one of them.
OVERLAYS = {
    "gpu-multi-node": (
        ("--set", "runs.url=s3://bucket/folder,runs.secret=bucket,train.enabled=true"),
        ("--set", "services.trainer.controller=LeaderWorkerSet"),
        ("--set", "autoscaling.kind=hpa"),
        ("--set", "services.rollout.rdma.ipcLock=true"),
    ),
    "local-cpu": (
        ("--set", "train.enabled=true,tls.secret=certificates,tls.mutual=false"),
        ("--set", "services.sandbox.enabled=false,peers.sandbox=sandbox.other.svc:50056"),
    ),
    "sandbox-only": (("--set", "services.sandbox.hostUsers=false,services.sandbox.runtimeClassName=gvisor"),),
}
CASES = [(values, options) for values in VALUES for options in ((), *OVERLAYS.get(values, ()))]
# From the oldest version that Chart.yaml allows to the newest with a schema.
KUBERNETES = ("1.31.0", "1.32.0", "1.33.0", "1.34.0", "1.35.0", "1.36.0", "1.37.0")
SANDBOX_CAPABILITIES = {
    *("CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "MKNOD", "NET_ADMIN"),
    *("SETGID", "SETPCAP", "SETUID", "SYS_ADMIN", "SYS_CHROOT"),
}
JOBS = ("prepare", "train")
# The buffer's own folder, a volume only without `redis.secret`.
DATA = "/data"
LOCATION = "services.buffer.env.PERIGEE_BUFFER__OFFLOAD__LOCATION"

each_case = pytest.mark.parametrize(
    ("values", "options"), CASES, ids=[" ".join((values, *options)) for values, options in CASES]
)


def config_class(service: str) -> type[ServiceConfig]:
    return getattr(importlib.import_module(f"services.{service}.config"), f"{service.capitalize()}Config")  # type: ignore[no-any-return]


def container_of(template: Manifest) -> Manifest:
    return template["spec"]["containers"][0]  # type: ignore[no-any-return]


# Helm and Kubernetes.


@pytest.mark.parametrize("values", VALUES)
def test_each_file_of_values_passes_the_strict_lint(helm: Helm, values: str) -> None:
    files = ("--values", CHART / f"values/{values}.yaml", "--set-file", f"recipe={RECIPE}")
    linted = helm.run("lint", "--strict", CHART, *files)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize(
    "wrong",
    [
        "services.reward.repilcas=2",
        "services.rewards.enabled=true",
        "services.rollout.nodes=2",
        "services.coordinator.replicas=2",
        "services.trainer.replicas=2",
        "services.reward.resources.requests.memroy=1Gi",
        "services.reward.resources.limits.memory=1GB",
        "services.rollout.env.perigee_model=x",
        "services.reward.tag=latest",
        "network.calers.reward=x",
        "autoscaling.kind=vpa",
        "peers.sandbox=no-port",
    ],
)
def test_wrong_values_are_refused(helm: Helm, wrong: str) -> None:
    refused = helm.run("template", CHART, "--set-file", f"recipe={RECIPE}", "--set", wrong)
    assert refused.returncode != 0
    assert "values don't meet the specifications of the schema" in refused.stderr
    assert wrong.split("=")[0].split(".")[0] in refused.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "recipe: is required for trainer and rollout: --set-file recipe=recipe.yaml"),
        (
            ("--set-file", f"recipe={RECIPE}", "--set", "services.sandbox.enabled=false"),
            "peers.sandbox: is required, since services.sandbox.enabled is false: give host:port",
        ),
        (
            ("--set-file", f"recipe={RECIPE}", "--set", f"{LOCATION}={DATA}/offload,redis.secret=redis"),
            f"buffer.offload.location: {DATA}/offload is on no volume of the buffer",
        ),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(helm: Helm, options: tuple[str, ...], sentence: str) -> None:
    assert sentence in helm.run("template", CHART, *options).stderr


@pytest.mark.parametrize(
    ("location", "options", "mounts", "secrets"),
    [
        ("{run}/offload", (), {"/runs"}, set()),
        ("s3://bucket/offload", ("--set", "runs.secret=bucket"), set(), {"bucket"}),
        ("{run}/offload", ("--set", "runs.url=s3://bucket/runs,runs.secret=bucket"), set(), {"bucket"}),
        ("", ("--set", "runs.url=s3://bucket/runs,runs.secret=bucket"), set(), set()),
    ],
)
def test_the_buffer_reaches_where_it_moves_long_trajectories(
    render: Render, tmp_path: Path, location: str, options: tuple[str, ...], mounts: set[str], secrets: set[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{RECIPE.read_text()}\nbuffer: {{offload: {{location: '{location}'}}}}\n")
    template = dict(pods(render("gpu-multi-node", "--set-file", f"recipe={recipe}", *options)))["buffer"]
    container = container_of(template)
    assert {each["mountPath"] for each in container["volumeMounts"] if each["name"] == "runs"} == mounts
    assert {each["secretRef"]["name"] for each in container.get("envFrom", ())} == secrets


@cache
def schemas(version: str) -> dict[str, Any]:
    """Kubernetes' definitions of a version, in which unknown fields are errors."""
    spec = importlib.util.find_spec("kubernetes_validate")
    if spec is None:
        pytest.skip("kubernetes-validate is not in the environment: make setup")
    folder = Path(str(spec.origin)).parent / f"kubernetes-json-schema/v{version}-local-strict"
    return json.loads((folder / "_definitions.json").read_bytes())["$defs"]  # type: ignore[no-any-return]


@cache
def names_of_kinds(version: str) -> dict[tuple[str, str], str]:
    """Names of definitions by API version and kind."""
    return {
        (f"{each['group']}/{each['version']}".strip("/"), each["kind"]): name
        for name, schema in schemas(version).items()
        for each in schema.get("x-kubernetes-group-version-kind", ())
    }


@cache
def custom_schemas() -> dict[str, Any]:
    text = (Path(__file__).parent / "custom_resources.yaml").read_text()
    text = re.sub(r"\{\$kubernetes: (\S+?)\}", r"{$ref: '#/$defs/\1'}", text)
    return yaml.safe_load(text)  # type: ignore[no-any-return]


def find_faults(manifest: Manifest, version: str) -> list[str]:
    """Returns what Kubernetes would refuse in a manifest."""
    if custom := custom_schemas().get(manifest["kind"]):
        schema: dict[str, Any] = {"properties": {"spec": custom}}
    else:
        schema = {"$ref": f"#/$defs/{names_of_kinds(version)[manifest['apiVersion'], manifest['kind']]}"}
    validator = jsonschema.Draft202012Validator(schema | {"$defs": schemas(version)})
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(manifest)]


def test_manifests_meet_the_schemas_of_kubernetes(render: Render) -> None:
    distinct = {json.dumps(each, sort_keys=True): each for case in CASES for each in render(case[0], *case[1])}
    kinds = {each["kind"] for each in distinct.values()}
    assert kinds >= {"Deployment", "StatefulSet", "Job", *custom_schemas()}
    faults = {
        (version, each["kind"], each["metadata"]["name"]): found
        for version in KUBERNETES
        for each in distinct.values()
        if (found := find_faults(each, version))
    }
    assert faults == {}


def test_unknown_fields_are_faults(render: Render) -> None:
    (deployment,) = of_kind(render("sandbox-only"), "Deployment")
    wrong = json.loads(json.dumps(deployment).replace("readOnlyRootFilesystem", "readOnlyRootFilesytem"))
    assert "readOnlyRootFilesytem" in find_faults(wrong, KUBERNETES[-1])[0]
    scaled = of_kind(render("gpu-multi-node"), "ScaledObject")[0]
    scaled["spec"]["triggers"][0]["metadata"]["treshold"] = "1"
    assert "treshold" in find_faults(scaled, KUBERNETES[-1])[0]
    del scaled["spec"]["triggers"][0]["metadata"]["treshold"]


# A linter's rules.


def find_unrestricted(template: Manifest) -> list[str]:
    """Returns what Pod Security level `restricted` forbids in a pod."""
    pod = template["spec"]
    security = pod["securityContext"]
    faults = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    if not security.get("runAsNonRoot") or security.get("runAsUser") == 0:
        faults.append("root")
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        faults.append("seccomp")
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
    faults += [volume["name"] for volume in pod["volumes"] if not allowed >= volume.keys() - {"name"}]
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        inner = container["securityContext"]
        if inner["allowPrivilegeEscalation"] or inner["capabilities"] != {"drop": ["ALL"]} or "privileged" in inner:
            faults.append(container["name"])
    return faults


@each_case
def test_all_pods_but_the_sandbox_are_restricted(render: Render, values: str, options: tuple[str, ...]) -> None:
    for service, template in pods(render(values, *options)):
        faults = find_unrestricted(template)
        if service == "sandbox":
            assert faults == ["root", "sandbox"]
            security = container_of(template)["securityContext"]
            assert security["capabilities"]["drop"] == ["ALL"]
            assert set(security["capabilities"]["add"]) == SANDBOX_CAPABILITIES
            assert security["appArmorProfile"] == {"type": "Unconfined"}
        elif "ipcLock" in "".join(options) and service == "rollout":
            assert faults == ["root", "rollout"]
        else:
            assert faults == []


@each_case
def test_pods_have_what_a_linter_asks_for(render: Render, values: str, options: tuple[str, ...]) -> None:
    manifests = render(values, *options)
    accounts = {each["metadata"]["name"] for each in of_kind(manifests, "ServiceAccount")}
    assert all(each["automountServiceAccountToken"] is False for each in of_kind(manifests, "ServiceAccount"))
    for service, template in pods(manifests):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert re.fullmatch(rf"\S+/\S+:{re.escape(perigee.__version__)}(-cuda)?", container["image"])
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
        if service not in JOBS:
            assert pod["serviceAccountName"] in accounts
            assert pod["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"].items() <= labels(template)
            container = container_of(template)
            drain = int(environment(template)[f"PERIGEE_{service.upper()}__SERVER__DRAIN_SECONDS"])
            assert pod["terminationGracePeriodSeconds"] >= drain + 10
            for probe, path in (("startup", "/healthz"), ("liveness", "/healthz"), ("readiness", "/readyz")):
                assert path in json.dumps(container[f"{probe}Probe"])


def test_images_are_those_that_are_built(render: Render) -> None:
    dockerfile = (ROOT / "deploy/images/Dockerfile").read_text()
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, flags=re.MULTILINE))
    images = {container_of(template)["image"] for values in VALUES for _, template in pods(render(values))}
    assert {image.rpartition("/")[2].partition(":")[0] for image in images} <= {*targets, "arithmetic"}
    assert 'ENTRYPOINT ["tini", "--"]' in dockerfile  # pods give arguments alone
    assert set(re.findall(r"^USER (\d+)", dockerfile, flags=re.MULTILINE)) == {"0", "10001"}


# References between manifests.


def labels(template: Manifest) -> Any:
    return template["metadata"]["labels"].items()


@each_case
def test_selectors_and_names_lead_somewhere(render: Render, values: str, options: tuple[str, ...]) -> None:
    manifests = render(values, *options)
    names = {(each["kind"], each["metadata"]["name"]) for each in manifests}
    assert len(names) == len(manifests)
    templates = [template for _, template in pods(manifests)]
    for service in of_kind(manifests, "Service"):
        (template,) = (each for each in templates if service["spec"]["selector"].items() <= labels(each))
        ports = {port["name"] for port in container_of(template)["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for each in of_kind(manifests, "PodDisruptionBudget", "Deployment", "StatefulSet", "PodMonitor"):
        assert any(each["spec"]["selector"]["matchLabels"].items() <= labels(template) for template in templates)
    for each in of_kind(manifests, "StatefulSet"):
        assert ("Service", each["spec"]["serviceName"]) in names
    for each in of_kind(manifests, "ScaledObject", "HorizontalPodAutoscaler"):
        target = each["spec"]["scaleTargetRef"]
        (scaled,) = (
            other for other in of_kind(manifests, target["kind"]) if other["metadata"]["name"] == target["name"]
        )
        assert "replicas" not in scaled["spec"]
    for service, template in pods(manifests):
        pod = template["spec"]
        claimed = [each for each in of_kind(manifests, "StatefulSet") if each["spec"]["template"] is template]
        claims = [
            claim["metadata"]["name"] for each in claimed for claim in each["spec"].get("volumeClaimTemplates", ())
        ]
        mounts = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]} | set(claims), service
        for volume in pod["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in names
            if config := volume.get("configMap"):
                assert ("ConfigMap", config["name"]) in names
        if pod.get("priorityClassName"):
            assert ("PriorityClass", pod["priorityClassName"]) in names


@each_case
def test_peers_are_services_that_let_their_callers_in(render: Render, values: str, options: tuple[str, ...]) -> None:
    manifests = render(values, *options)
    templates = dict(pods(manifests))
    for service, template in templates.items():
        for name, address in environment(template).items():
            named = re.fullmatch(r"PERIGEE_[A-Z]+__(?!MASTER)([A-Z]+)_ADDRESS", name)
            if named is None or "other.svc" in address:
                continue
            peer = named[1].lower()
            host, _, port = address.removeprefix("dns:///").rpartition(":")
            first = f"{RELEASE}-trainer-0." if peer == "trainer" else ""
            assert host == f"{first}{RELEASE}-{peer}.{NAMESPACE}.svc"
            assert {"name": "grpc", "containerPort": int(port)} in container_of(templates[peer])["ports"]
            assert any(labels_match(each, template) for each in callers(manifests, peer)), (service, peer)


def callers(manifests: list[Manifest], service: str) -> list[Manifest]:
    """The peers that the NetworkPolicy of a service lets in to its gRPC port."""
    (policy,) = (
        each for each in of_kind(manifests, "NetworkPolicy") if each["metadata"]["name"] == f"{RELEASE}-{service}"
    )
    return [
        peer for rule in policy["spec"]["ingress"] if {"port": "grpc"} in rule.get("ports", ()) for peer in rule["from"]
    ]


def labels_match(peer: Manifest, template: Manifest) -> bool:
    return "podSelector" in peer and bool(peer["podSelector"]["matchLabels"].items() <= labels(template))


def policy_rules(manifests: list[Manifest], service: str) -> dict[str, list[str]]:
    """Components that reach each port of a service, "all" for every port."""
    found: dict[str, list[str]] = {}
    for policy in of_kind(manifests, "NetworkPolicy"):
        if policy["metadata"]["name"] == f"{RELEASE}-{service}":
            for rule in policy["spec"]["ingress"]:
                components = [
                    peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in rule["from"]
                ]
                for port in rule.get("ports", [{"port": "all"}]):
                    found["-".join(str(port[key]) for key in ("port", "endPort") if key in port)] = components
    return found


def test_ports_without_tokens_are_fenced(render: Render) -> None:
    manifests = render("gpu-multi-node")
    assert policy_rules(manifests, "rollout") == {
        "grpc": ["coordinator", "trainer", "rollout"],
        "15000-16999": ["trainer", "rollout"],
    }
    assert policy_rules(manifests, "trainer") == {
        "grpc": ["coordinator", "rollout"],
        "15000-16999": ["rollout"],
        "all": ["trainer"],
    }
    for service in ("rollout", "trainer"):
        weights = config_class(service).model_fields["weights"].default
        assert (weights.min_rpc_port, weights.max_rpc_port) == (15000, 16999)
    fenced = {json.dumps(each["spec"]["podSelector"]["matchLabels"]) for each in of_kind(manifests, "NetworkPolicy")}
    assert all(
        any(json.loads(selector).items() <= labels(template) for selector in fenced) for _, template in pods(manifests)
    )
    (sandbox,) = (
        each for each in of_kind(manifests, "NetworkPolicy") if each["metadata"]["name"] == f"{RELEASE}-sandbox"
    )
    assert sandbox["spec"]["egress"] == []


# References to the services.


def environment(template: Manifest) -> dict[str, str]:
    """The environment of a pod's container, with what Kubernetes fills in."""
    filled = {
        "metadata.name": "rl-0",
        "status.podIP": "10.0.0.1",
        "metadata.labels['apps.kubernetes.io/pod-index']": "1",
    }
    found = {"LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "leader"}
    for each in container_of(template)["env"]:
        source = each.get("valueFrom", {})
        value = each.get("value") or filled.get(source.get("fieldRef", {}).get("fieldPath"), "4")
        found[each["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
    return found


def recipe_of(manifests: list[Manifest]) -> dict[str, Any]:
    (config_map,) = of_kind(manifests, "ConfigMap")
    return yaml.safe_load(config_map["data"]["recipe.yaml"])  # type: ignore[no-any-return]


def parameters_of(manifests: list[Manifest], job: str) -> dict[str, Any]:
    """What the command line understands of a job's arguments."""
    name, command, *arguments = container_of(dict(pods(manifests))[job])["args"]
    assert (name, command) == ("perigee", job)
    assert set(environment(dict(pods(manifests))[job])) - {"HOME", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"} <= {
        *VARIABLES.values()
    }
    return get_command(app).commands[job].make_context(job, arguments).params  # type: ignore[attr-defined,no-any-return]


def test_pods_read_the_recipe_that_prepare_writes(render: Render) -> None:
    manifests = render("local-cpu", *OVERLAYS["local-cpu"][0])
    out = parameters_of(manifests, "prepare")["out"]
    prepared = load_recipe(RECIPE).expand(RunFolder(out))
    kept = {key: value for key, value in prepared.values.items() if key in ("model", "run", "rollout", "sandbox")}
    read = build_recipe(RunFolder(out).recipe_path, recipe_of(manifests), [])
    assert {key: value for key, value in read.values.items() if key in kept} == kept
    assert "prepare" not in recipe_of(manifests)
    (waiting,) = dict(pods(manifests))["trainer"]["spec"]["initContainers"]
    assert waiting["args"][-1] == str(RunFolder(out).recipe_path)
    (waiting,) = dict(pods(manifests))["train"]["spec"]["initContainers"]
    training = parameters_of(manifests, "train")
    assert waiting["args"][-1] == training["coordinator"]
    assert training["recipe"] == Path("/etc/perigee/recipe.yaml")
    assert (
        training["coordinator"] == environment(dict(pods(manifests))["rollout"])["PERIGEE_ROLLOUT__COORDINATOR_ADDRESS"]
    )


@each_case
def test_services_accept_their_configuration(
    render: Render, monkeypatch: pytest.MonkeyPatch, values: str, options: tuple[str, ...]
) -> None:
    manifests = render(values, *options)
    recipe = recipe_of(manifests)
    for service, template in pods(manifests):
        if service in JOBS:
            continue
        with monkeypatch.context() as patch:
            for name, value in environment(template).items():
                patch.setenv(name, value)
            kind = config_class(service)
            # Two ranks, since a pod of several has to have its own.
            model = {"model": recipe["model"]} if "model" in kind.model_fields and "model" in recipe else {}
            section = model | dict(recipe.get(service) or {}) | ({"data_parallel": 2} if service == "trainer" else {})
            config = validate(kind, section | environment_values(kind), "chart", service)
        ports = {port["name"]: port["containerPort"] for port in container_of(template)["ports"]}
        assert ports.pop("grpc") == config.server.port
        assert ports.pop("metrics") == config.server.metrics_port
        http_port = config.http.port if hasattr(config, "http") else None
        assert ports == ({"http": http_port} if http_port else {})
        check_paths(template, config)


def check_paths(template: Manifest, config: ServiceConfig) -> None:
    """Every file and folder of the configuration lies on a volume, and every key of a secret is one that is mounted."""
    text = config.model_dump(mode="json")
    strings = [
        value
        for name, value in walk(text)
        # A prefix of keys in etcd is no path, and the folder of sandbox images need not be there.
        if isinstance(value, str) and re.match(r"/(?!/)", value) and not name.endswith((".prefix", "images_path"))
    ]
    container = container_of(template)
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    outside = [path for path in strings if not any(path == each or path.startswith(f"{each}/") for each in mounts)]
    assert outside == []
    assert container["args"] == ["python", "-m", f"services.{config.section}", "--config", "/etc/perigee/recipe.yaml"]
    assert "/etc/perigee/recipe.yaml" in mounts
    known = SERVER_ALIASES | config.environment_aliases
    names = [name for name in environment(template) if name.startswith("PERIGEE_")]
    assert [
        name for name in names if not name.startswith(f"PERIGEE_{config.section.upper()}__") and name not in known
    ] == []


def walk(values: Any, path: str = "") -> Any:
    """Yields the leaves of nested mappings."""
    for key, value in values.items():
        yield from walk(value, f"{path}{key}.") if isinstance(value, dict) else [(f"{path}{key}", value)]


async def test_the_paths_of_probes_are_answered() -> None:
    text = (CHART / "templates/_helpers.tpl").read_text()
    paths = set(re.findall(r'"path" "([^"]+)"', text))
    async with serving_probes("127.0.0.1", 0, lambda: None) as address:
        for path in paths:
            asked = await asyncio.to_thread(urllib.request.urlopen, f"http://{address}{path}")
            assert asked.status == 200
    assert paths == {"/healthz", "/readyz"}


def test_autoscalers_ask_for_metrics_that_exist(render: Render) -> None:
    scaled = {
        each["spec"]["scaleTargetRef"]["name"].removeprefix(f"{RELEASE}-"): each["spec"]["triggers"][0]["metadata"]
        for each in of_kind(render("gpu-multi-node"), "ScaledObject")
    }
    assert scaled.keys() == {"rollout", "sandbox", "reward"}
    source = "".join(path.read_text() for path in (ROOT / "services").rglob("*.py"))
    names = {name for each in scaled.values() for name in re.findall(r"perigee_\w+", each["query"])}
    assert len(names) == 5
    assert {name for name in names if f'Gauge("{name}"' not in source} == set()


def test_the_page_names_every_value() -> None:
    page = (CHART / "README.md").read_text()
    schema = json.loads((CHART / "values.schema.json").read_text())
    keys = set(schema["definitions"]["service"]["properties"])
    for key, each in schema["properties"].items():
        keys |= {f"{key}.{inner}" for inner in each["properties"]} if "properties" in each else {key}
    missing = {key for key in keys if f"`{key}`" not in page}
    assert {key for key in missing if key != "global" and not key.startswith("services.")} == set()


def test_the_release_is_the_chart_s() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == perigee.__version__
    assert chart["kubeVersion"] == f">={KUBERNETES[0]}-0"
