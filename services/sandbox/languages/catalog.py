"""Catalog of runtimes: languages as YAML files describe them, resolved against what this machine has."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from packaging.requirements import Requirement
from pydantic import Field, field_validator, model_validator

from perigee.config import Model, read_yaml, validate
from perigee.errors import FailedPreconditionError, InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent import ENVIRONMENT, OWN_FOLDER, start_code
from services.sandbox.config import LimitsConfig, SandboxConfig
from services.sandbox.languages.images import Image, find_images
from services.sandbox.languages.java_names import find_java_names

_PROBE = """
import platform, sys
from importlib import metadata
print(platform.python_version(), sys.base_prefix, sep="\\n")
print(*sorted({f"{found.metadata['Name']} {found.version}" for found in metadata.distributions()}), sep="\\n")
"""
_PROBE_S = 30
_PROBE_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}  # chroot is in sbin
_OLDEST = (3, 9)


@dataclass(frozen=True)
class Python:
    """Interpreter: its path inside the sandbox, its version, the folder that it needs there, and the distributions that
    it can import, each with its version.
    """

    path: str
    version: str
    prefix: str
    packages: tuple[str, ...] = ()

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
    version, prefix, *packages = result.stdout.splitlines()
    python = Python(path, version, prefix, tuple(filter(None, packages)))
    if python.minor_version < _OLDEST:
        raise FailedPreconditionError(f"sandbox.python_path: {path} is Python {version}; name a Python 3.9 or later")
    return python


PACKAGES_FOLDER = "/opt/perigee/packages"
# what changes in a root when something is installed there
_SIGNS_OF_CHANGE = ("", "/usr", "/usr/bin", "/usr/lib", "/var/lib/dpkg/status", "/lib/apk/db/installed", "/var/lib/rpm")


@dataclass(frozen=True)
class Packages:
    """Distributions of the service's environment: the paths of their files, and each name with its version."""

    paths: frozenset[Path] = frozenset()
    versions: frozenset[str] = frozenset()

    @property
    def mounts(self) -> tuple[tuple[str, str], ...]:
        """Paths on the host with those inside."""
        return tuple((str(path), f"{PACKAGES_FOLDER}/{path.name}") for path in sorted(self.paths))

    def __or__(self, other: Packages) -> Packages:
        return Packages(self.paths | other.paths, self.versions | other.versions)


def find_packages(name: str, seen: set[str]) -> Packages:
    """Finds a distribution and all that it requires but for what was `seen`; raises metadata.PackageNotFoundError."""
    if name.lower() in seen:
        return Packages()
    seen.add(name.lower())
    found, required = _read_distribution(name)
    for another in required:
        found |= find_packages(another, seen)
    return found


@lru_cache(maxsize=256)  # several runtimes have the same ones
def _read_distribution(name: str) -> tuple[Packages, tuple[str, ...]]:
    """Returns a distribution's own part, and the names of those that it requires."""
    distribution = metadata.distribution(name)
    own = Packages(frozenset(_top_paths(distribution)), frozenset({f"{distribution.name} {distribution.version}"}))
    return own, tuple(_requirements(distribution))


def _top_paths(distribution: metadata.Distribution) -> Iterator[Path]:
    """Yields the files and folders that a distribution has directly below site-packages, with its metadata."""
    names = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    for name in sorted(names):
        path = Path(str(distribution.locate_file(name)))
        if path.exists():
            yield path


def _requirements(distribution: metadata.Distribution) -> Iterator[str]:
    """Yields the distributions that a distribution requires here, without its extras."""
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name


HOST_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/etc/alternatives")
# what no bind may be, hold or lie in: files of the sandbox's own, of the kernel, of users, and secrets
_NEVER_BOUND = (
    *("/box", "/dev", "/proc", "/run", "/sys", "/tmp", "/var/run", "/var/tmp", OWN_FOLDER, "/boot", "/home", "/root"),
    *("/etc/passwd", "/etc/shadow", "/etc/gshadow", "/etc/ssh", "/etc/ssl/private", "/etc/kubernetes"),
    *("/etc/shadow-", "/etc/gshadow-", "/etc/sudoers", "/etc/sudoers.d", "/etc/security/opasswd", "/etc/krb5.keytab"),
    *("/etc/docker", "/etc/rancher", "/etc/wireguard", "/var/backups", "/var/spool", "/var/log", "/var/lib/private"),
    *("/var/lib/docker", "/var/lib/containerd", "/var/lib/containers", "/var/lib/kubelet", "/var/lib/rancher"),
)
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


class OutOfMemory(Model):
    """How a language's own runtime ends a program whose heap is full, below the memory limit."""

    exit_code: int
    """Exit code."""
    message: str
    """Beginning of the last line of standard error."""


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
    kernel: bool = False
    """Sessions are IPython's, with magics and display data; IPython is among the packages or in the image."""
    interpreter: str | None = None
    """Path of Python in the image; unset takes the configured one on the host."""
    preload: tuple[str, ...] = ()
    """Modules that the warm interpreter imports before any job comes."""
    packages: tuple[str, ...] = ()
    """Distributions of the service's own environment that programs can import, with what they require."""
    optional_packages: tuple[str, ...] = ()
    """Further ones, of which those are taken that are installed."""
    version: tuple[str, ...] = ()
    """Command that prints the version."""
    requires: tuple[str, ...] = ()
    """Executables by name, and files by path, without which the runtime cannot be used."""
    binds: tuple[str, ...] = ()
    """Further paths of the host that programs see, read-only and under the same names. `*` stands for any characters,
    and such a path need not be there."""
    files: dict[str, str] = {}
    """Further files beside each source, as text; not for Python."""
    install: str = ""
    """Packages to install when they are missing."""
    environment: dict[str, str] = {}
    """Environment variables."""
    loopback: bool = False
    """Whether programs have a loopback device and may make sockets, whatever their request says."""
    out_of_memory: OutOfMemory | None = None
    """Ending that counts as the memory limit."""
    limits: RuntimeLimits = RuntimeLimits()
    """Default limits of programs."""
    compile_limits: RuntimeLimits = RuntimeLimits()
    """Default limits of the compiler."""

    @field_validator("binds")
    @classmethod
    def _check_binds(cls, binds: tuple[str, ...]) -> tuple[str, ...]:
        for path in binds:
            if reason := refuse_bind(path):
                raise ValueError(reason)
        return binds

    @field_validator("compile", "run")
    @classmethod
    def _check_command(cls, command: tuple[str, ...]) -> tuple[str, ...]:
        for part in command:
            try:
                part.format(source="", memory_mib="", main="", python="")
            except (LookupError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"{part!r} may hold {{source}}, {{memory_mib}}, {{main}} and {{python}}; others are written twice"
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
    packages: Packages
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

    @property
    def python_path(self) -> str:
        """Path or name of Python inside, for commands."""
        return "python3" if self.python is None else self.python.path

    @cached_property
    def importable(self) -> list[str]:
        """Distributions that programs in Python can import, each with its version."""
        return sorted({*(self.python.packages if self.python else ()), *self.packages.versions}, key=str.lower)

    def root_options(self, uids: Iterable[int]) -> dict[str, Any]:
        """Returns the parts of the root; the agent adds the folder to build in."""
        mounts = [list(pair) for pair in self.packages.mounts]
        return {"image": self.image, "binds": list(self.binds), "mounts": mounts, "uids": list(uids), "folder": ""}

    def root_state(self) -> list[list[int]]:
        """Returns what tells the files of the root from others at its paths: device, inode, size and time of the last
        change of the folders that packages are installed in, of the packages' records, and of the compiler.
        """
        compiler = self.config.compile[0] if self.config.compile else ""
        programs = [f"{folder}/{compiler}" for folder in self.environment["PATH"].split(":")]
        paths = [f"{self.image}{path}" for path in (*_SIGNS_OF_CHANGE, compiler, *programs)]
        return [_read_state(path) for path in (*paths, *self.binds, *(source for source, _ in self.packages.mounts))]

    def for_source(self, source: bytes) -> Runtime:
        """Returns the runtime with the names that a source asks for."""
        if not self.config.java_names:
            return self
        names = find_java_names(source)
        config = self.config.model_copy(update={"source": names.source})
        return dataclasses.replace(self, config=config, main=names.main)

    def command(self, template: Iterable[str], memory_bytes: int) -> list[str]:
        """Returns a command of the description with its placeholders filled in."""
        values = {
            "source": self.config.source,
            "memory_mib": str(memory_bytes >> 20),
            "main": self.main,
            "python": self.python_path,
        }
        return [part.format(**values) for part in template]

    def python_command(self) -> list[str]:
        """Returns the command that runs one of Python's modes in a container; the mode is appended."""
        assert self.python is not None
        return [self.python.path, "-c", start_code(OWN_FOLDER, "modes")]


class Catalog:
    """All runtimes by name and alias; `missing_aliases` has the names of those that are missing by their aliases."""

    def __init__(
        self,
        runtimes: Iterable[Runtime],
        missing: Iterable[pb.MissingRuntime],
        missing_aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.runtimes = sorted(runtimes, key=lambda runtime: runtime.name)
        self.missing = sorted(missing, key=lambda entry: entry.language)
        self._missing_aliases = missing_aliases
        self._by_name = {name: runtime for runtime in self.runtimes for name in runtime.config.aliases}
        self._by_name.update({runtime.name: runtime for runtime in self.runtimes})

    def find(self, language: str) -> Runtime | None:
        """Finds the runtime of a name or an alias, in upper or lower case."""
        return self._by_name.get(language) or self._by_name.get(language.lower())

    def find_missing(self, language: str) -> pb.MissingRuntime | None:
        """Finds the runtime of a name or an alias, in upper or lower case, among those that cannot be used here."""
        name = self._missing_aliases.get(language.lower(), language.lower())
        return next((entry for entry in self.missing if entry.language == name), None)

    def explain(self, language: str) -> str:
        """Returns why a language cannot be used."""
        if (entry := self.find_missing(language)) is not None:
            return f"{language} cannot be used here: {entry.reason}"
        return f"{language!r} is unknown; known: {', '.join(runtime.name for runtime in self.runtimes)}"


def load_catalog(config: SandboxConfig) -> Catalog:
    """Reads the descriptions that come with the service, then those of the configured folder, which may replace them.

    Raises InvalidArgumentError for an invalid file, a missing folder, and extra time of an unknown language.
    """
    if config.runtimes_path is not None and not Path(config.runtimes_path).is_dir():
        raise InvalidArgumentError.for_field("sandbox.runtimes_path", f"{config.runtimes_path} is no folder")
    described: dict[str, RuntimeConfig] = {}
    for folder in (OWN_RUNTIMES, *([Path(config.runtimes_path)] if config.runtimes_path else [])):
        for path in sorted(folder.glob("*.yaml")):
            runtime = validate(RuntimeConfig, read_yaml(path), str(path), "")
            described[runtime.name] = runtime
    resolved = {name: resolve(runtime, config) for name, runtime in described.items()}
    for image in find_images(Path(config.images_path)):
        for name in image.recipe.runtimes:
            names = [image.runtime_name(name)]
            if isinstance(resolved.get(name), pb.MissingRuntime):  # what the host lacks is the image's
                names.append(name)
            for called in names:
                resolved[called] = resolve(runtime_in(image, name, described, called), config)
    missing = {name: entry for name, entry in resolved.items() if isinstance(entry, pb.MissingRuntime)}
    catalog = Catalog(
        [entry for entry in resolved.values() if isinstance(entry, Runtime)],
        missing.values(),
        {alias: name for name in missing if name in described for alias in described[name].aliases},
    )
    for name in config.extra_time:
        if catalog.find(name) is None and catalog.find_missing(name) is None:
            raise InvalidArgumentError.for_field(f"sandbox.extra_time.{name}", catalog.explain(name))
    return catalog


def runtime_in(image: Image, name: str, described: dict[str, RuntimeConfig], called: str) -> RuntimeConfig:
    """Returns the description of a runtime that an image offers, under the name `called`."""
    if name not in described:
        raise InvalidArgumentError.for_field(f"{image.root.parent}: runtimes.{name}", "is the name of no runtime")
    own = described[name].model_dump()
    aliases = own["aliases"] if called == name else ()
    values = {**own, "binds": (), **image.recipe.runtimes[name], "image": str(image.root)}
    return validate(RuntimeConfig, {**values, "name": called, "aliases": aliases}, str(image.root.parent), name)


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
    binds: tuple[str, ...] = () if image else HOST_FOLDERS
    for pattern in config.binds:
        paths = tuple(map(str, sorted(Path("/").glob(pattern.lstrip("/")))))
        if not paths and "*" not in pattern:
            return _missing(config, f"{pattern} is not there: {hint}")
        refused = [reason for path in paths if (reason := refuse_bind(os.path.realpath(path), service.state_path))]
        if refused:
            return _missing(config, refused[0])
        binds += paths
    if config.python:
        try:
            python = find_python(image, config.interpreter or service.python_path)
        except FailedPreconditionError as error:
            return _missing(config, error.message)
        if not image and not any(is_below(python.prefix, folder) for folder in HOST_FOLDERS):
            binds = (*binds, python.prefix)
    packages = Packages()
    if config.packages:
        if python is None or python.minor_version != sys.version_info[:2]:
            wanted = ".".join(map(str, sys.version_info[:2]))
            return _missing(config, f"its packages are those of Python {wanted}: set sandbox.python_path to one")
        for name in (*config.packages, *config.optional_packages):
            try:
                packages |= find_packages(name, set())
            except metadata.PackageNotFoundError as error:
                if name in config.packages:
                    return _missing(config, f"the Python package {error.name} is not installed beside the service")
        environment["PYTHONPATH"] = PACKAGES_FOLDER
    return Runtime(
        config=config,
        image=image,
        binds=binds,
        packages=packages,
        environment=environment,
        python=python,
        limits=overlay(service.default_limits, config.limits),
        compile_limits=overlay(service.compile_limits, config.compile_limits),
    )


def refuse_bind(path: str, state_path: str = "/run") -> str | None:
    """Returns why a path of the host may not be shown to programs; None when it may."""
    if not path.startswith("/") or os.path.normpath(path) != path:
        return f"{path} must be an absolute path without . and .."
    for closed in (*_NEVER_BOUND, state_path):
        if is_below(path, closed) or is_below(closed, path.rstrip("/")):
            return f"{path} must not be bound: no program may see {closed}"
    return None


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
    """Returns whether the root has an executable, given by its name, or any file, given by its path."""
    if not image and "/" not in executable:
        return shutil.which(executable, path=search_path) is not None
    candidates = [executable] if executable.startswith("/") else [f"{p}/{executable}" for p in search_path.split(":")]
    # a link in an image points to a path of that image
    return any(os.path.lexists(f"{image}{candidate}") for candidate in candidates)


def _read_state(path: str) -> list[int]:
    """Returns device, inode, size and time of the last change of a file, through links; nothing where there is none."""
    try:
        status = Path(path).stat()
    except OSError:
        return []
    return [status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns]


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
