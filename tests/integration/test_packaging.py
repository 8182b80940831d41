"""The two distributions: the clients alone in an empty environment, and what their command says of the rest."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import perigee

ROOT = Path(__file__).parents[2]
# The command line, and what it alone uses, need the extra `cli`.
NEEDS_CLI = ("perigee.cli", "perigee.config", "perigee.report", "perigee.curation", "perigee.testgen")


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=cwd, timeout=100)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels by the names of their distributions, built from a copy of the sources without any index."""
    folder = tmp_path_factory.mktemp("wheels")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("perigee", "services"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    built = run(sys.executable, "-m", "pip", "wheel", *options, source, source / "services")
    assert built.returncode == 0, built.stderr
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


def closure(requirements: Iterator[Requirement]) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that satisfy requirements, and all that those require in turn."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        for text in found[name].requires or ():
            inner = Requirement(text)
            if inner.marker is None or inner.marker.evaluate({"extra": ""}):
                waiting.append(inner)
    return found


def requirements_of(wheel: Path, extra: str = "") -> Iterator[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    for line in lines:
        if line.startswith("Requires-Dist: "):
            requirement = Requirement(line.removeprefix("Requires-Dist: "))
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield requirement


class Environment:
    """A virtual environment that holds the client wheel and what this environment has of its requirements."""

    def __init__(self, folder: Path, wheel: Path, extra: str = "") -> None:
        venv.create(folder)
        self.bin = folder / "bin"
        (site,) = folder.glob("lib/*/site-packages")
        for distribution in closure(requirements_of(wheel, extra)).values():
            for file in distribution.files or ():
                if ".." not in file.parts:
                    (site / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(Path(str(file.locate())), site / file)
        uv = Path(sys.executable).with_name("uv")
        options = ("--quiet", "--offline", "--no-deps", "--python", self.bin / "python")
        installed = run(uv, "pip", "install", *options, wheel)
        assert installed.returncode == 0, installed.stderr

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(self.bin / program, *arguments, cwd=self.bin)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Environment:
    return Environment(tmp_path_factory.mktemp("client"), wheels["perigee"])


@pytest.fixture(scope="module")
def command_line(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Environment:
    return Environment(tmp_path_factory.mktemp("cli"), wheels["perigee"], extra="cli")


def test_the_clients_need_grpc_and_protobuf_alone(wheels: dict[str, Path]) -> None:
    names = {requirement.name for requirement in requirements_of(wheels["perigee"])}
    assert names == {"grpcio", "grpcio-status", "protobuf"}


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


def test_every_client_module_is_imported_without_anything_else(client: Environment) -> None:
    modules = sorted(
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in (ROOT / "perigee").rglob("*.py")
    )
    code = "\n".join(f"import {module}" for module in modules if not module.startswith(NEEDS_CLI))
    ended = client.run("python", "-c", code + "\nprint(perigee.__version__)")
    assert (ended.returncode, ended.stdout.strip()) == (0, perigee.__version__), ended.stderr


def test_the_command_says_what_to_install(client: Environment) -> None:
    ended = client.run("perigee", "train")
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
