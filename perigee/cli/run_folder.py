"""Run folders: `runs/<id>` with the recipe, data, logs and results of one run, and `runs/latest`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from perigee.errors import InvalidArgumentError
from perigee.files import write_atomically

LATEST = "latest"


@dataclass(frozen=True)
class StackFile:
    """Contents of `stack.json`: the process that runs the local stack, and where its services listen."""

    pid: int
    # host:port by process name: buffer, sandbox, reward, trainer, coordinator, rollout-0, ...
    addresses: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """Folder of one run; its name is the run's id."""

    path: Path

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self.path.name

    @property
    def data_path(self) -> Path:
        """Data that the recipe's prepare script made."""
        return self.path / "data"

    @property
    def recipe_path(self) -> Path:
        """The recipe with all overrides, expanded for this folder."""
        return self.path / "recipe.yaml"

    @property
    def logs_path(self) -> Path:
        """One log per process."""
        return self.path / "logs"

    @property
    def stack_path(self) -> Path:
        """Addresses of the local stack; there only while it runs."""
        return self.path / "stack.json"

    def create(self) -> None:
        """Makes the folder. Raises InvalidArgumentError when it cannot be made."""
        try:
            self.logs_path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgumentError.for_field(str(self.path), f"cannot be made: {error.strerror}") from error

    def write_stack(self, stack: StackFile) -> None:
        """Writes `stack.json`."""
        write_atomically(self.stack_path, f"{json.dumps(asdict(stack), indent=2)}\n".encode())

    def read_stack(self) -> StackFile | None:
        """Returns the running local stack of this run; None when there is none, or when its owner is gone."""
        try:
            stack = StackFile(**json.loads(self.stack_path.read_text()))
        except FileNotFoundError:
            return None
        return stack if _is_alive(stack.pid) else None


def new_run(runs_path: Path, name: str) -> RunFolder:
    """Returns a folder for a new run, not made yet: name and local time, with a number when that is taken."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = runs_path / stem, 2
    while path.exists():
        path, number = runs_path / f"{stem}-{number}", number + 1
    return RunFolder(path.absolute())


def find_run(runs_path: Path, name: str) -> RunFolder:
    """Returns the run that `name` stands for: an id below `runs_path`, `latest`, or a path.

    Raises InvalidArgumentError when there is no such run.
    """
    for path in (runs_path / name, Path(name)):
        if (path / "recipe.yaml").is_file():
            return RunFolder(path.resolve())
    known = sorted(entry.parent.name for entry in runs_path.glob("*/recipe.yaml") if not entry.parent.is_symlink())
    hint = f"the runs in {runs_path} are {', '.join(known[-5:])}" if known else f"{runs_path} holds no run"
    raise InvalidArgumentError.for_field(name, f"no such run; {hint}")


def find_stack(runs_path: Path) -> tuple[RunFolder, StackFile] | None:
    """Returns the local stack started last of those that run below `runs_path`, with its run folder."""
    found = sorted(runs_path.glob("*/stack.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        run = RunFolder(path.parent.resolve())
        if (stack := run.read_stack()) is not None:
            return run, stack
    return None


def point_latest(path: Path) -> None:
    """Makes `latest` beside a run folder a link to it, in one step."""
    staging = path.parent / f".{LATEST}.{os.getpid()}"
    staging.unlink(missing_ok=True)
    staging.symlink_to(path.name)
    staging.rename(path.parent / LATEST)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
