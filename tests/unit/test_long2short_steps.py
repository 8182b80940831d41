"""Steps are done once for their inputs, and go on where they were cut short."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from perigee.cli.long2short.steps import Step, StepLog, choose_steps, digest_files
from perigee.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError


@dataclass
class Steps:
    """Two steps, the second of which reads what the first has made and a file from elsewhere."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=lambda: {"first": 1, "second": 1})
    fails: set[str] = field(default_factory=set)
    worked: list[str] = field(default_factory=list)

    def make(self, name: str, needs: tuple[str, ...] = (), files: tuple[Path, ...] = ()) -> Step:
        """A step that writes its setting after a file that shows where it went on."""
        out = self.folder / name

        async def work() -> None:
            begun = (out / "part").exists()
            self.worked.append(f"{name} {'goes on' if begun else 'begins'}")
            out.mkdir(exist_ok=True)
            (out / "part").write_text("half")
            if name in self.fails:
                raise UnavailableError("cut short")
            (out / "result").write_text(f"{self.settings[name]}")

        return Step(name, work, [out / "result"], {"setting": self.settings[name]}, needs, files)

    def run(self, *names: str) -> list[str]:
        """Runs both steps, or the named ones; returns what worked."""
        self.worked.clear()
        steps = [self.make("first"), self.make("second", ("first",), (self.folder / "elsewhere",))]
        log = StepLog(self.folder)
        try:
            asyncio.run(log.run(choose_steps(steps, names), lambda text: None))
        finally:
            log.close()
        return list(self.worked)


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    (tmp_path / "elsewhere").write_text("a")
    return Steps(tmp_path)


def test_a_step_is_done_once(steps: Steps) -> None:
    assert steps.run() == ["first begins", "second begins"]
    assert steps.run() == []


def test_a_changed_setting_begins_anew_what_depends_on_it(steps: Steps) -> None:
    steps.run()
    steps.settings["second"] = 2
    assert steps.run() == ["second begins"]
    steps.settings["first"] = 2
    assert steps.run() == ["first begins", "second begins"]
    (steps.folder / "elsewhere").write_text("b")
    assert steps.run() == ["second begins"]


def test_a_step_that_makes_the_same_again_leaves_the_later_ones(steps: Steps) -> None:
    steps.run()
    (steps.folder / "first/result").unlink()
    assert steps.run() == ["first goes on"]


def test_a_step_that_was_cut_short_goes_on(steps: Steps) -> None:
    steps.fails.add("first")
    with pytest.raises(UnavailableError, match="cut short"):
        steps.run()
    steps.fails.clear()
    assert steps.run() == ["first goes on", "second begins"]


def test_what_a_step_began_for_other_settings_is_removed(steps: Steps) -> None:
    steps.fails.add("first")
    with pytest.raises(UnavailableError):
        steps.run()
    steps.fails.clear()
    steps.settings["first"] = 2
    assert steps.run() == ["first begins", "second begins"]


def test_a_step_alone_is_done_after_those_that_it_needs(steps: Steps) -> None:
    assert steps.run("first") == ["first begins"]
    assert steps.run("second") == ["second begins"]
    with pytest.raises(InvalidArgumentError, match="third is no step; choose from first, second"):
        steps.run("third")


def test_a_folder_of_somebody_else_stays(steps: Steps) -> None:
    (steps.folder / "first").mkdir()
    (steps.folder / "first/thesis").write_text("mine")
    with pytest.raises(FailedPreconditionError, match="in the way"):
        steps.run()
    assert (steps.folder / "first/thesis").read_text() == "mine"


def test_two_commands_do_not_work_in_one_folder(steps: Steps) -> None:
    log = StepLog(steps.folder)
    with pytest.raises(FailedPreconditionError, match="in use by another process"):
        steps.run()
    log.close()


def test_a_digest_is_of_contents_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner/file").write_text("same")
    assert digest_files([tmp_path / "one"]) == digest_files([tmp_path / "two"])
    (tmp_path / "two/inner/file").rename(tmp_path / "two/inner/other")
    assert digest_files([tmp_path / "one"]) != digest_files([tmp_path / "two"])
    with pytest.raises(InvalidArgumentError, match="is not there"):
        digest_files([tmp_path / "three"])
