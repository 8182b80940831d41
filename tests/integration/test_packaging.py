"""The two distributions: the clients alone in an empty environment, and what their command says of the rest."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

import perigee
from tests.fixtures.packaging import ROOT, Environment, requirements_of, run

# The command line, and what it alone uses, need the extra `cli`.
NEEDS_CLI = ("perigee.cli", "perigee.config", "perigee.report", "perigee.curation", "perigee.testgen")


@pytest.fixture(scope="module")
def command_line(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Environment:
    return Environment(tmp_path_factory.mktemp("cli"), wheels["perigee"], extra="cli")


def test_the_clients_need_grpc_and_protobuf_alone(wheels: dict[str, Path]) -> None:
    names = {requirement.name for requirement in requirements_of(wheels["perigee"])}
    assert names == {"grpcio", "grpcio-status", "protobuf"}


def test_an_empty_environment_gets_nothing_else(client_environment: Environment) -> None:
    """googleapis-common-protos is grpcio-status's, typing-extensions grpcio's."""
    code = "import importlib.metadata as m; print(*(each.metadata['Name'] for each in m.distributions()))"
    installed = client_environment.run("python", "-c", code)
    expected = {"googleapis-common-protos", "grpcio", "grpcio-status", "perigee", "protobuf", "typing-extensions"}
    assert set(map(canonicalize_name, installed.stdout.split())) == expected, installed.stderr


def test_the_clients_import_grpc_and_protobuf_alone(client_environment: Environment) -> None:
    code = (
        "import sys, perigee.reward.client, perigee.reward.adapters.blocking, perigee.sandbox.blocking\n"
        "files = [str(getattr(module, '__file__', '')) for module in sys.modules.values()]\n"
        "print(*sorted({file.split('/site-packages/')[1].split('/')[0] for file in files if 'site-packages' in file}))"
    )
    imported = client_environment.run("python", "-c", code)
    assert imported.stdout.split() == ["google", "grpc", "perigee", "typing_extensions.py"], imported.stderr


def test_each_distribution_holds_its_package(wheels: dict[str, Path]) -> None:
    for name, package in (("perigee", "perigee"), ("perigee_services", "services")):
        with zipfile.ZipFile(wheels[name]) as archive:
            tops = {path.split("/")[0] for path in archive.namelist()}
            packed = {path for path in archive.namelist() if path.startswith(f"{package}/")}
        assert {top for top in tops if not top.endswith(".dist-info")} == {package}
        tracked = run("git", "ls-files", package, cwd=ROOT).stdout.split()
        packaging = {f"{package}/pyproject.toml", f"{package}/setup.py"}
        assert [path for path in tracked if path not in packed | packaging and (ROOT / path).is_file()] == []


def test_the_versions_agree() -> None:
    services = tomllib.loads((ROOT / "services" / "pyproject.toml").read_text())["project"]
    assert services["version"] == perigee.__version__
    assert f"perigee=={perigee.__version__}" in services["dependencies"]


def test_every_client_module_is_imported_without_anything_else(client_environment: Environment) -> None:
    modules = sorted(
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in (ROOT / "perigee").rglob("*.py")
    )
    code = "\n".join(f"import {module}" for module in modules if not module.startswith(NEEDS_CLI))
    ended = client_environment.run("python", "-c", code + "\nprint(perigee.__version__)")
    assert (ended.returncode, ended.stdout.strip()) == (0, perigee.__version__), ended.stderr


def test_the_command_says_what_to_install(client_environment: Environment) -> None:
    ended = client_environment.run("perigee", "train")
    assert ended.returncode == 1
    pattern = r"perigee: the command line needs \w+, which is not installed: pip install 'perigee\[cli\]'\n"
    assert re.fullmatch(pattern, ended.stderr)


def test_a_command_of_the_services_says_what_to_install(command_line: Environment, tmp_path: Path) -> None:
    assert command_line.run("perigee", "--help").returncode == 0
    (tmp_path / "recipe.yaml").write_text("name: x\nbuffer: {}\n")
    ended = command_line.run("perigee", "up", str(tmp_path))
    assert ended.returncode == 1
    assert ended.stderr == (
        "perigee: this command needs the services, which are not installed: pip install perigee-services\n"
    )


def test_a_command_that_calls_a_service_needs_no_services(command_line: Environment, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("print(1)\n")
    ended = command_line.run("perigee", "sandbox", "run", str(tmp_path / "program.py"), "--address", "127.0.0.1:1")
    assert ended.returncode == 125
    assert "127.0.0.1:1 cannot be reached" in ended.stderr
