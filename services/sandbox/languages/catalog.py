"""Catalog of runtimes: languages as YAML files describe them, resolved against what this machine has."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from packaging.requirements import Requirement
from pydantic import Field, field_validator, model_validator

from perigee.config import Model, read_yaml, validate
from perigee.errors import FailedPreconditionError, InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent import ENVIRONMENT, OWN_FOLDER, start_code
from services.sandbox.config import LimitsConfig, SandboxConfig
from services.sandbox.languages.java_names import find_java_names

_PROBE = "import platform, sys; print(platform.python_version()); print(sys.base_prefix)"
_PROBE_S = 30
_PROBE_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}  # chroot is in sbin
_OLDEST = (3, 9)


@dataclass(frozen=True)
class Python:
    """Interpreter: its path inside the sandbox, its version, and the folder that it needs there."""

    path: str
    version: str
    prefix: str

    @property
    def minor_version(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


@lru_cache(maxsize=64)
def find_python(image: str, path: str | None) -> Python:
    """Finds the interpreter at `path`; without one, the image's, or Debian's if the service's packages fit it, else the
    one under the service's own. Raises FailedPreconditionError when it does not start.
    """
    if path is not None:
        return probe_python(image, path)
    if image:
        return probe_python(image, "/usr/bin/python3")
    own = getattr(sys, "_base_executable", sys.executable)
    if os.access("/usr/bin/python3", os.X_OK):
        debian = probe_python("", "/usr/bin/python3")
        if debian.minor_version == sys.version_info[:2]:
            return debian
    return probe_python("", own)


def probe_python(image: str, path: str) -> Python:
    """Asks an interpreter for its version and prefix; one in an image is asked inside it, which needs root."""
    command = [path, "-I", "-c", _PROBE]
    if image:
        command = ["chroot", image, *command]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_S, check=True, env=_PROBE_ENVIRONMENT
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise FailedPreconditionError(
            f"sandbox.python_path: {path} does not run ({error}); name a Python 3.9 or later"
        ) from error
    version, prefix = result.stdout.split("\n")[:2]
    python = Python(path, version, prefix)
    if python.minor_version < _OLDEST:
        raise FailedPreconditionError(f"sandbox.python_path: {path} is Python {version}; name a Python 3.9 or later")
    return python


PACKAGES_FOLDER = "/opt/perigee/packages"


def find_packages(names: Iterable[str]) -> tuple[tuple[str, str], ...] | str:
    """Returns the mounts (path on the host, path inside) of distributions and all that they require.

    Returns a sentence instead when one is not installed.
    """
    mounts: dict[str, str] = {}
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            return f"the Python package {name} is not installed beside the service"
        for path in _top_paths(distribution):
            mounts[str(path)] = f"{PACKAGES_FOLDER}/{path.name}"
        waiting += _requirements(distribution)
    return tuple(sorted(mounts.items()))


def _top_paths(distribution: metadata.Distribution) -> Iterator[Path]:
    """Yields the files and folders that a distribution has directly below site-packages."""
    names = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    for name in sorted(names):
        path = Path(str(distribution.locate_file(name)))
        if not name.endswith(".dist-info") and path.exists():
            yield path


def _requirements(distribution: metadata.Distribution) -> Iterator[str]:
    """Yields the distributions that a distribution requires here, without its extras."""
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name


HOST_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/etc/alternatives")
# settings without which an interpreter of the host does not start
_HOST_SETTINGS = ("etc/java-*-openjdk", "etc/php")
_VERSION = re.compile(r"\d+(?:\.\d+)+[\w.+-]*|\d+")
OWN_RUNTIMES = Path(__file__).parent


class RuntimeLimits(Model):
    """Limits that differ from the service's; unset ones are the service's."""

    wall_ms: int | None = Field(None, ge=1)
    """Wall-clock time."""
    cpu_ms: int | None = Field(None, ge=1)
    """CPU time."""
    memory_bytes: int | None = Field(None, ge=1 << 24)
    """Memory."""
    processes: int | None = Field(None, ge=1)
    """Processes and threads."""
    file_bytes: int | None = Field(None, ge=1 << 16)
    """Space in the working folder."""
    output_bytes: int | None = Field(None, ge=1)
    """Output."""
    files: int | None = Field(None, ge=16)
    """Files in the working folder."""


class RuntimeConfig(Model):
    """One runtime's YAML file."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_+#.-]*$")
    """Name in requests."""
    title: str
    """Name for people."""
    aliases: tuple[str, ...] = ()
    """Further names."""
    image: str | None = None
    """Folder of an unpacked image, or of an OCI bundle with `rootfs` and `config.json`; unset takes the host's /usr and
    what belongs to it, read-only."""
    source: str
    """Name that the source gets in the working folder."""
    java_names: bool = False
    """Name the source by its public class and package instead, and fill in its class with `main` for `{main}`."""
    compile: tuple[str, ...] = ()
    """Command that compiles; `{source}` and `{memory_mib}` stand for the source's name and the memory limit."""
    run: tuple[str, ...] = ()
    """Command that runs the program; its arguments follow. `{main}` stands for the class to start."""
    python: bool = False
    """Run by a Python of the sandbox's own modes: warm, with sessions, function tests and code tests."""
    interpreter: str | None = None
    """Path of Python in the image; unset takes the configured one on the host."""
    preload: tuple[str, ...] = ()
    """Modules that the warm interpreter imports before any job comes."""
    packages: tuple[str, ...] = ()
    """Distributions of the service's own environment that programs can import, with what they require."""
    version: tuple[str, ...] = ()
    """Command that prints the version."""
    requires: tuple[str, ...] = ()
    """Executables without which the runtime cannot be used."""
    install: str = ""
    """Packages to install when they are missing."""
    environment: dict[str, str] = {}
    """Environment variables."""
    loopback: bool = False
    """Whether programs have a loopback device and may make sockets, whatever their request says."""
    limits: RuntimeLimits = RuntimeLimits()
    """Default limits of programs."""
    compile_limits: RuntimeLimits = RuntimeLimits()
    """Default limits of the compiler."""

    @field_validator("compile", "run")
    @classmethod
    def _check_command(cls, command: tuple[str, ...]) -> tuple[str, ...]:
        for part in command:
            try:
                part.format(source="", memory_mib="", main="")
            except (LookupError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"{part!r} may hold {{source}}, {{memory_mib}} and {{main}}; other braces are written twice"
                ) from error
        return command

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        if not self.python and not self.run:
            raise ValueError("run is required where python is not true")
        return self


@dataclass(frozen=True)
class Runtime:
    """Runtime that can be used here; `image` is empty for the host's own files."""

    config: RuntimeConfig
    image: str
    binds: tuple[str, ...]
    mounts: tuple[tuple[str, str], ...]
    environment: dict[str, str]
    python: Python | None
    limits: LimitsConfig
    compile_limits: LimitsConfig
    main: str = "Main"
    """Class that a Java program begins in."""

    @property
    def name(self) -> str:
        """Name in requests."""
        return self.config.name

    @cached_property
    def import_path(self) -> list[str]:
        """Folders of packages for a program's Python."""
        return [PACKAGES_FOLDER] if self.config.packages else []

    def root_options(self, uids: Iterable[int]) -> dict[str, Any]:
        """Returns the parts of the root; the agent adds the folder to build in."""
        mounts = [list(pair) for pair in self.mounts]
        return {"image": self.image, "binds": list(self.binds), "mounts": mounts, "uids": list(uids), "folder": ""}

    def for_source(self, source: bytes) -> Runtime:
        """Returns the runtime with the names that a source asks for."""
        if not self.config.java_names:
            return self
        names = find_java_names(source)
        config = self.config.model_copy(update={"source": names.source})
        return dataclasses.replace(self, config=config, main=names.main)

    def command(self, template: Iterable[str], memory_bytes: int) -> list[str]:
        """Returns a command of the description with its placeholders filled in."""
        values = {"source": self.config.source, "memory_mib": str(memory_bytes >> 20), "main": self.main}
        return [part.format(**values) for part in template]

    def python_command(self) -> list[str]:
        """Returns the command that runs one of Python's modes in a container; the mode is appended."""
        assert self.python is not None
        return [self.python.path, "-I", "-c", start_code(OWN_FOLDER, "modes"), *self.import_path]


class Catalog:
    """All runtimes by name and alias."""

    def __init__(self, runtimes: Iterable[Runtime], missing: Iterable[pb.MissingRuntime]) -> None:
        self.runtimes = sorted(runtimes, key=lambda runtime: runtime.name)
        self.missing = sorted(missing, key=lambda entry: entry.language)
        self._by_name = {name: runtime for runtime in self.runtimes for name in runtime.config.aliases}
        self._by_name.update({runtime.name: runtime for runtime in self.runtimes})

    def find(self, language: str) -> Runtime | None:
        """Finds the runtime of a name or an alias, in upper or lower case."""
        return self._by_name.get(language) or self._by_name.get(language.lower())

    def explain(self, language: str) -> str:
        """Returns why a language cannot be used."""
        for entry in self.missing:
            if entry.language == language:
                return f"{language} cannot be used here: {entry.reason}"
        return f"{language!r} is unknown; known: {', '.join(runtime.name for runtime in self.runtimes)}"


def load_catalog(config: SandboxConfig) -> Catalog:
    """Reads the descriptions that come with the service, then those of the configured folder, which may replace them.

    Raises InvalidArgumentError for an invalid file and for a missing folder.
    """
    if config.runtimes_path is not None and not Path(config.runtimes_path).is_dir():
        raise InvalidArgumentError.for_field("sandbox.runtimes_path", f"{config.runtimes_path} is no folder")
    described: dict[str, RuntimeConfig] = {}
    for folder in (OWN_RUNTIMES, *([Path(config.runtimes_path)] if config.runtimes_path else [])):
        for path in sorted(folder.glob("*.yaml")):
            runtime = validate(RuntimeConfig, read_yaml(path), str(path), "")
            described[runtime.name] = runtime
    resolved = [resolve(runtime, config) for runtime in described.values()]
    return Catalog(
        [entry for entry in resolved if isinstance(entry, Runtime)],
        [entry for entry in resolved if isinstance(entry, pb.MissingRuntime)],
    )


def resolve(config: RuntimeConfig, service: SandboxConfig) -> Runtime | pb.MissingRuntime:
    """Returns the runtime on this machine, or what it lacks."""
    image, environment = "", dict(ENVIRONMENT)
    if config.image is not None:
        found = open_image(Path(config.image))
        if found is None:
            return _missing(config, f"there is no image at {config.image}")
        image, own = found
        environment |= own
    environment |= config.environment
    hint = f"install {config.install}" if config.install else "install it"
    for executable in config.requires:
        if not has_executable(image, executable, environment["PATH"]):
            return _missing(config, f"{executable} is not there: {hint}")
    python: Python | None = None
    settings = [str(path) for pattern in _HOST_SETTINGS for path in sorted(Path("/").glob(pattern))]
    binds: tuple[str, ...] = () if image else (*HOST_FOLDERS, *settings)
    if config.python:
        try:
            python = find_python(image, config.interpreter or service.python_path)
        except FailedPreconditionError as error:
            return _missing(config, error.message)
        if not image and not any(is_below(python.prefix, folder) for folder in HOST_FOLDERS):
            binds = (*binds, python.prefix)
    mounts: tuple[tuple[str, str], ...] = ()
    if config.packages:
        if python is None or python.minor_version != sys.version_info[:2]:
            wanted = ".".join(map(str, sys.version_info[:2]))
            return _missing(config, f"its packages are those of Python {wanted}: set sandbox.python_path to one")
        packages = find_packages(config.packages)
        if isinstance(packages, str):
            return _missing(config, packages)
        mounts = packages
        environment["PYTHONPATH"] = PACKAGES_FOLDER
    return Runtime(
        config=config,
        image=image,
        binds=binds,
        mounts=mounts,
        environment=environment,
        python=python,
        limits=overlay(service.default_limits, config.limits),
        compile_limits=overlay(service.compile_limits, config.compile_limits),
    )


def _missing(config: RuntimeConfig, reason: str) -> pb.MissingRuntime:
    return pb.MissingRuntime(language=config.name, reason=reason)


def open_image(folder: Path) -> tuple[str, dict[str, str]] | None:
    """Returns the root of an unpacked image and its environment; None when there is none."""
    if not folder.is_dir():
        return None
    if not (folder / "config.json").is_file() or not (folder / "rootfs").is_dir():
        return str(folder), {}
    process = read_yaml(folder / "config.json").get("process") or {}  # JSON is YAML
    pairs = [entry.partition("=") for entry in process.get("env") or []]
    return str(folder / "rootfs"), {name: value for name, _, value in pairs}


def has_executable(image: str, executable: str, search_path: str) -> bool:
    """Returns whether the root has an executable, given by name or by path."""
    if not image:
        return shutil.which(executable, path=search_path) is not None
    candidates = [executable] if executable.startswith("/") else [f"{p}/{executable}" for p in search_path.split(":")]
    # a link in an image points to a path of that image
    return any(os.path.lexists(f"{image}{candidate}") for candidate in candidates)


def is_below(path: str, folder: str) -> bool:
    """Returns whether a path is a folder or below it."""
    return path == folder or path.startswith(f"{folder}/")


def overlay(limits: LimitsConfig, changes: RuntimeLimits) -> LimitsConfig:
    """Returns the limits with a runtime's changes."""
    return limits.model_copy(update=changes.model_dump(exclude_none=True))


def find_version(text: str) -> str:
    """Finds the version in the output of a command."""
    found = _VERSION.search(text)
    return found.group() if found else text.strip().split("\n")[0][:40]
