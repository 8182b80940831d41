"""The compose stack against the project: settings, addresses, ports, probes, volumes, secrets, profiles, variables."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from perigee.cli.recipe import dump_yaml, load_recipe
from perigee.cli.run_folder import RunFolder
from services.kit.config import ServiceConfig, load_config

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose"
TEXT = (COMPOSE / "compose.yaml").read_text()
STACK: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", TEXT))
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
# The services of the project among those of the stack, by name, each with its section.
OWN = {
    name: match[1]
    for name, service in SERVICES.items()
    if (match := re.search(r"services\.([a-z]+)", str(service.get("command"))))
}
PROFILES = ("stack", "gpu", "reward-only", "sandbox-only", "observability")


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ServiceConfig]:
    """The configuration that each service of the stack reads from the example's prepared recipe and its environment."""
    recipe = load_recipe(ROOT / "examples" / "arithmetic" / "recipe.yaml").expand(RunFolder(tmp_path))
    path = tmp_path / "prepared.yaml"
    path.write_text(dump_yaml({key: value for key, value in recipe.values.items() if key != "prepare"}))
    found = {}
    for name, section in OWN.items():
        config_class = getattr(importlib.import_module(f"services.{section}.config"), f"{section.capitalize()}Config")
        with monkeypatch.context() as patch:
            for variable, value in SERVICES[name]["environment"].items():
                patch.setenv(variable, str(value))
            found[name] = load_config(config_class, ["--config", str(path)])
    return found


def networks_of(name: str) -> set[str]:
    """The networks that a service is in."""
    return set(SERVICES[name]["networks"])


def test_every_service_is_in_the_stack_and_takes_its_token_from_a_secret(configs: dict[str, ServiceConfig]) -> None:
    assert set(OWN.values()) == {"coordinator", "buffer", "trainer", "reward", "rollout", "sandbox"}
    for name, config in configs.items():
        assert config.server.token is None
        assert config.server.token_file == "/run/secrets/token", name
        assert "token" in SERVICES[name]["secrets"]


def test_addresses_lead_to_the_ports_of_services_in_the_same_network(configs: dict[str, ServiceConfig]) -> None:
    for name, config in configs.items():
        for field, address in config:
            if not field.endswith("_address") or address is None:
                continue
            host, _, port = str(address).removeprefix("dns:///").rpartition(":")
            assert configs[host].server.port == int(port), f"{name}.{field}"
            assert networks_of(host) & networks_of(name), f"{name} and {host} share no network"
            assert ("scale" in SERVICES[host]) == address.startswith("dns:///"), f"{name}.{field}"


def test_probes_and_published_ports_are_those_of_the_services(configs: dict[str, ServiceConfig]) -> None:
    for name, config in configs.items():
        assert config.server.host == "0.0.0.0"
        assert f"127.0.0.1:{config.server.metrics_port}/readyz" in SERVICES[name]["healthcheck"]["test"][-1]
        http = getattr(getattr(config, "http", None), "port", None)
        for published in SERVICES[name].get("ports", ()):
            assert published.startswith("127.0.0.1:"), "a port of the stack is open to other machines by default"
            assert int(published.rpartition(":")[2]) in (config.server.port, http)


def test_volumes_networks_secrets_and_images_are_declared() -> None:
    used: dict[str, set[str]] = {"volumes": set(), "networks": set(), "secrets": set()}
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", (ROOT / "deploy/images/Dockerfile").read_text(), re.MULTILINE))
    for name, service in SERVICES.items():
        used["volumes"] |= {each.split(":")[0] for each in service.get("volumes", ()) if each[0] not in "./"}
        used["networks"] |= networks_of(name)
        used["secrets"] |= set(service.get("secrets", ()))
        if "build" in service:
            assert service["build"]["target"] in targets
            assert f"/{service['build']['target']}:" in service["image"]
    for kind, names in used.items():
        assert names == set(STACK[kind]), kind
    setup = (COMPOSE / "setup.sh").read_text()
    assert all(f">{each['file'].removeprefix('./')}" in setup for each in STACK["secrets"].values())


def test_what_a_service_waits_for_is_in_its_profiles() -> None:
    assert {profile for service in SERVICES.values() for profile in service["profiles"]} == set(PROFILES)
    for name, service in SERVICES.items():
        for peer in service.get("depends_on", ()):
            assert set(service["profiles"]) <= set(SERVICES[peer]["profiles"]), f"{name} waits for {peer}"


def test_all_run_read_only_and_only_the_sandbox_has_capabilities() -> None:
    documented = re.search(r"or these capabilities: (.*?) Without", (ROOT / "docs" / "sandbox.md").read_text())
    assert documented is not None
    for name, service in SERVICES.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges" in service["security_opt"]
        # SYS_PTRACE is for sessions where every Python program is in a container.
        wanted = set(re.findall(r"`([A-Z_]+)`", documented[1])) - {"SYS_PTRACE"} if name == "sandbox" else set()
        assert set(service.get("cap_add", ())) == wanted


def test_prometheus_scrapes_every_service_and_what_is_mounted_is_there(configs: dict[str, ServiceConfig]) -> None:
    scraped = yaml.safe_load((ROOT / "deploy/observability/prometheus.yaml").read_text())["scrape_configs"]
    found = {(each["names"][0], each["port"]) for job in scraped for each in job["dns_sd_configs"]}
    assert found == {(section, configs[name].server.metrics_port) for name, section in OWN.items()}
    for name in OWN:
        assert networks_of(name) & networks_of("prometheus")
        aliases = (SERVICES[name]["networks"] or {})["control"]["aliases"] if name.endswith("-gpu") else [name]
        assert aliases == [OWN[name]]
    for service in SERVICES.values():
        for source in (volume.split(":")[0] for volume in service.get("volumes", ()) if volume[0] == "."):
            assert (COMPOSE / source).exists(), source


def test_every_variable_is_in_the_example_of_settings() -> None:
    used = set(re.findall(r"\$\{(\w+)", TEXT))
    named = set(re.findall(r"^(?:# )?([A-Z_]+)=", (COMPOSE / ".env.example").read_text(), re.MULTILINE))
    assert used | {"COMPOSE_PROFILES"} == named
    for variable, default in re.findall(r"\$\{(\w+):-([^}]+)\}", TEXT):
        if default[0] not in "1234567890." or variable.endswith("PORT"):
            continue
        shown = re.search(rf"^# {variable}=(.*)$", (COMPOSE / ".env.example").read_text(), re.MULTILINE)
        assert shown is not None
        assert shown[1] == default or ":" in shown[1], variable
