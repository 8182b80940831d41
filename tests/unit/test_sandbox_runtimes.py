"""Descriptions of runtimes: what is wrong with one is told when the service starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from perigee.errors import InvalidArgumentError
from services.sandbox.config import SandboxConfig
from services.sandbox.languages.catalog import load_catalog

RIGHT = 'name: mine\ntitle: Mine\nsource: main.sh\nrun: [sh, "{source}"]\nrequires: [sh]\n'


def described(folder: Path, text: str) -> SandboxConfig:
    """A configuration with one description more."""
    (folder / "mine.yaml").write_text(text)
    return SandboxConfig(runtimes_path=str(folder))


def test_braces_of_one_s_own_are_written_twice(tmp_path: Path) -> None:
    run = '["awk", "{{print $1}}", "{source}", "{memory_mib}"]'
    catalog = load_catalog(described(tmp_path, RIGHT.replace('[sh, "{source}"]', run)))
    runtime = catalog.find("mine")
    assert runtime is not None
    assert runtime.command(runtime.config.run, 64 << 20) == ["awk", "{print $1}", "main.sh", "64"]


def test_a_folder_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"sandbox\.runtimes_path: .*gone is no folder"):
        load_catalog(SandboxConfig(runtimes_path=str(tmp_path / "gone")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RIGHT + "titel: Mine\n", "titel: unknown key; did you mean title?"),
        (RIGHT.replace('"{source}"', '"{print $1}"'), "run: '{print $1}' may hold {source}, {memory_mib} and {main}"),
        (RIGHT.replace('"{source}"', '"{source.name}"'), "run: '{source.name}' may hold"),
        (RIGHT + 'compile: [cc, "{0}"]\n', "compile: '{0}' may hold"),
        (RIGHT + 'compile: [cc, "}"]\n', "compile: '}' may hold"),
        (RIGHT.replace("run", "version"), "run is required where python is not true"),
        (RIGHT + "limits: {memory_bytes: 1}\n", "limits.memory_bytes: "),
    ],
)
def test_a_wrong_description_is_reported_with_its_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        load_catalog(described(tmp_path, text))
    assert words in error.value.message
    assert "mine.yaml" in error.value.message
