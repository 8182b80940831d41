"""Run folders: names, `latest`, stacks that run, and files that are whole or not there."""

import os
from pathlib import Path

import pytest

from perigee.cli.run_folder import RunFolder, StackFile, find_run, find_stack, new_run, point_latest
from perigee.errors import InvalidArgumentError

NO_PROCESS = 2**22 + 1  # above the kernel's highest number


def make_run(runs: Path, name: str) -> RunFolder:
    run = RunFolder(runs / name)
    run.create()
    run.recipe_path.write_text("name: x\n")
    return run


def test_ids_are_unique_within_a_second(tmp_path: Path) -> None:
    first = new_run(tmp_path, "small")
    first.create()
    second = new_run(tmp_path, "small")
    assert first.run_id.startswith("small-")
    assert second.path != first.path
    assert not second.path.exists()


def test_runs_are_found_by_id_path_and_latest(tmp_path: Path) -> None:
    old, new = make_run(tmp_path, "small-1"), make_run(tmp_path, "small-2")
    point_latest(old.path)
    point_latest(new.path)
    assert find_run(tmp_path, "latest") == new
    assert find_run(tmp_path, "small-1") == old
    assert find_run(Path("elsewhere"), str(old.path)) == old
    assert (tmp_path / "latest").readlink() == Path("small-2")


def test_an_unknown_run_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    make_run(tmp_path, "small-1")
    with pytest.raises(InvalidArgumentError, match=r"nothing: no such run; the runs in .* are small-1"):
        find_run(tmp_path, "nothing")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match="cannot be made: Not a directory"):
        RunFolder(tmp_path / "file" / "run").create()


def test_the_newest_living_stack_is_found(tmp_path: Path) -> None:
    dead, alive = make_run(tmp_path, "a"), make_run(tmp_path, "b")
    alive.write_stack(StackFile(pid=os.getpid(), addresses={"buffer": "127.0.0.1:1"}))
    dead.write_stack(StackFile(pid=NO_PROCESS, addresses={}))
    found = find_stack(tmp_path)
    assert found is not None
    assert found[0] == alive
    assert found[1].addresses == {"buffer": "127.0.0.1:1"}
    assert find_stack(tmp_path / "a") is None
