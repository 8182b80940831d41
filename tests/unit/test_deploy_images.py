"""The images' Dockerfile against the project: extras, languages, libraries, users."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tools.missing_libraries import find_missing

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "deploy" / "images"
TARGETS = ("control", "reward", "trainer", "rollout", "sandbox", "sandbox-full")


@pytest.fixture(scope="module")
def stages() -> dict[str, list[str]]:
    """The instructions of each stage, `FROM` first, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (IMAGES / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in filter(None, text.splitlines()):
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            current = found.setdefault(match[2], [])
        elif not found:
            continue
        current.append(line)
    return found


def lines_of(stages: dict[str, list[str]], name: str) -> list[str]:
    """The instructions of a stage and of those that it is made from."""
    parent = stages[name][0].split()[1]
    return [*(lines_of(stages, parent) if parent in stages else ()), *stages[name]]


def test_every_image_is_a_target_and_each_has_its_size_stated(stages: dict[str, list[str]]) -> None:
    assert set(TARGETS) <= set(stages)
    assert f"set -- {' '.join(TARGETS)}" in (IMAGES / "build.sh").read_text()
    assert set(re.findall(r"^\| `([a-z-]+)` \|", (IMAGES / "README.md").read_text(), re.MULTILINE)) == set(TARGETS)


def test_extras_exist_and_each_image_has_those_of_its_services(stages: dict[str, list[str]]) -> None:
    known: set[str] = set()
    for project in ("pyproject.toml", "services/pyproject.toml"):
        known |= set(tomllib.loads((ROOT / project).read_text())["project"]["optional-dependencies"])
    text = " ".join(stages["locks"]).replace("${rollout}", "rollout-cpu rollout-gpu")
    text = text.replace("${weights}", "weights weights-cuda")
    extras = {
        image: set(words.split())
        for image, words in re.findall(
            r"lock\.sh (\w+) ([a-z0-9 -]+)", text.replace("${weights}", "weights weights-cuda")
        )
    }
    assert extras == {
        "control": {"cli", "coordinator", "buffer", "s3"},
        "reward": {"reward"},
        "trainer": {"cli", "trainer", "weights", "weights-cuda", "s3"},
        "rollout": {"rollout-cpu", "rollout-gpu", "weights", "weights-cuda", "s3"},
        "sandbox": {"sandbox"},
    }
    assert set().union(*extras.values()) <= known
    for image in extras:
        assert f"COPY --from=locks /locks/{image}.txt /tmp/packages.txt" in stages[f"{image}-packages"]
        assert f"COPY --from={image}-packages /opt/perigee /opt/perigee" in stages[image]


@pytest.mark.parametrize("target", TARGETS)
def test_only_the_sandbox_runs_as_root_and_has_compilers(stages: dict[str, list[str]], target: str) -> None:
    lines = lines_of(stages, target)
    user = [line.split()[1] for line in lines if line.startswith("USER")][-1]
    assert user == ("0:0" if target.startswith("sandbox") else "10001:10001")
    compilers = [line for line in lines if re.search(r"\bgcc\b", line) and "ACCELERATOR" not in line]
    assert bool(compilers) == target.startswith("sandbox")
    assert any("org.opencontainers.image.title" in line for line in stages[target])


def test_the_full_sandbox_or_an_image_of_the_sandbox_has_every_language(stages: dict[str, list[str]]) -> None:
    sandbox = ROOT / "services" / "sandbox"
    images = [set(yaml.safe_load(path.read_text())["packages"]) for path in (sandbox / "images").glob("*.yaml")]
    full = set(" ".join(lines_of(stages, "sandbox-full")).split()) | {"bash", "perl", "python3"}
    for path in (sandbox / "languages").glob("*.yaml"):
        install = (yaml.safe_load(path.read_text()).get("install") or "").replace("default-jre", "default-jdk")
        wanted = set(re.split(r" and |, ", install)) - {""}
        assert any(wanted - full <= image for image in [full, *images]) or "the " in install, path.name


def test_libraries_of_the_images_are_installed_for_development_too(stages: dict[str, list[str]]) -> None:
    libraries = {word for line in stages["engine"] for word in line.split() if re.fullmatch(r"lib[a-z]+\d", word)}
    assert libraries
    needed = (ROOT / "tools" / "system-packages.sh").read_text()
    assert [name for name in libraries if f"need {name} " not in needed] == []


def test_no_library_of_this_environment_is_missing() -> None:
    assert find_missing(Path(sys.prefix)) == {}
