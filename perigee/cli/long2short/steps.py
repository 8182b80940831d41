"""Steps that make files of files: each is done once for its inputs, and goes on where it was cut short.

A line of steps.jsonl has a step, the digest of its inputs, and the digest of its outputs once it is done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perigee.errors import FailedPreconditionError, InvalidArgumentError
from perigee.files import Journal

STEPS_FILE = "steps.jsonl"


@dataclass(frozen=True)
class Step:
    """Step with a folder of its name, which it fills.

    `work` makes what is missing of the outputs, whatever an earlier call left in the folder.
    """

    name: str
    work: Callable[[], Awaitable[None]]
    outputs: Sequence[Path]
    """Files and folders in the step's folder that others read."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: Sequence[str] = ()
    """Steps whose outputs it reads."""
    files: Sequence[Path] = ()
    """Files and folders from elsewhere that it reads."""
    command: str = ""
    """Command that does the step alone."""


class StepLog:
    """What was done of the steps in a folder; another process cannot open it meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._journal = Journal(folder / STEPS_FILE)
        self._records = {line["step"]: line for line in self._journal.lines}
        self._digests: dict[Path, str] = {}

    async def run(self, steps: Iterable[Step], note: Callable[[str], None]) -> None:
        """Does the steps in turn that are not done for their inputs.

        A step whose inputs differ from those of its folder begins anew. Raises what a step raises, and
        FailedPreconditionError when a folder of its name was not made here.
        """
        for step in steps:
            inputs = self._inputs(step)
            if self.is_done(step):
                note(f"{step.name}: done before")
                continue
            if self._records.get(step.name, {}).get("inputs") != inputs:
                self._clear(step)
                self._write(step, inputs, None)
                note(f"{step.name}: begins" + (f" ({step.command})" if step.command else ""))
            else:
                note(f"{step.name}: goes on")
            await step.work()
            self._write(step, inputs, digest_files(step.outputs))

    def is_done(self, step: Step) -> bool:
        """Returns whether the step was done for the inputs that it has now."""
        record = self._records.get(step.name, {})
        made = record.get("outputs") is not None and all(path.exists() for path in step.outputs)
        return made and record["inputs"] == self._inputs(step)

    def close(self) -> None:
        """Lets other processes open the folder."""
        self._journal.close()

    def _inputs(self, step: Step) -> str:
        made = {name: self._records.get(name, {}).get("outputs") for name in step.needs}
        return digest([dict(step.settings), made, list(map(self._digest_of, step.files))])

    def _digest_of(self, path: Path) -> str:
        """Returns the digest of what lies at a path, read once."""
        if path not in self._digests:
            self._digests[path] = digest_files([path])
        return self._digests[path]

    def _clear(self, step: Step) -> None:
        """Removes the step's folder, which counts for nothing from now on."""
        folder = self.folder / step.name
        if not folder.exists():
            return
        if step.name not in self._records:
            raise FailedPreconditionError(f"{folder} is in the way and no step's: move it, or name another --out")
        self._write(step, "", None)
        shutil.rmtree(folder)

    def _write(self, step: Step, inputs: str, outputs: str | None) -> None:
        line = {"step": step.name, "inputs": inputs, "outputs": outputs}
        self._journal.append([line])
        self._records[step.name] = line


def choose_steps(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """Returns the named steps with those that they need, in order; all without names.

    Raises InvalidArgumentError when a name is unknown.
    """
    by_name = {step.name: step for step in steps}
    for name in names:
        if name not in by_name:
            raise InvalidArgumentError.for_field("--only", f"{name} is no step; choose from {', '.join(by_name)}")
    chosen, left = set[str](), list(names or by_name)
    while left:
        chosen.add(name := left.pop())
        left += by_name[name].needs
    return [step for step in steps if step.name in chosen]


def digest(values: Any) -> str:
    """Returns the digest of JSON values."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def digest_files(paths: Iterable[Path]) -> str:
    """Returns the digest of the contents of files, and of all files in folders, wherever these lie.

    Raises InvalidArgumentError when there is none.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise InvalidArgumentError.for_field(str(path), "is not there")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as opened:
                    content = hashlib.file_digest(opened, "blake2b").hexdigest()
                found.append([str(file.relative_to(path)), content])
    return digest(found)
