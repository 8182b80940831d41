"""Images of runtimes: roots with the packages that many languages need, built from Debian's by mmdebstrap."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perigee.config import Model, read_yaml, validate
from perigee.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError

RECIPES = Path(__file__).parent.parent / "images"
_RECIPE_FILE = "image.yaml"
_NAME = re.compile(r"[a-z][a-z0-9_+.-]*")
# the folders of manual pages stay: the JDK fails to install without them
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*/*", "/usr/share/info/*", "/usr/share/locale/*")


class ImageRecipe(Model):
    """What an image holds: the YAML file that it is built from, and that is kept in it."""

    title: str
    """Name for people."""
    packages: tuple[str, ...] = ()
    """Packages of Debian, with what they depend on."""
    archive_folder: str | None = None
    """Folder of the image in which the archive that its build is given is unpacked; unset: it takes none."""
    archive: str = ""
    """What that archive is, for people."""
    runtimes: dict[str, dict[str, Any]]
    """Runtimes that the image offers, by name, each with the keys that differ from its description."""


@dataclass(frozen=True)
class Image:
    """Image that has been built: its name, its root and its recipe."""

    name: str
    root: Path
    recipe: ImageRecipe

    def runtime_name(self, runtime: str) -> str:
        """Returns the name by which requests choose a runtime of this image."""
        return runtime if runtime == self.name else f"{self.name}.{runtime}"


def find_recipes() -> dict[str, Path]:
    """Finds the recipes that come with the service, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Finds a recipe by its name, or by the path of a file of one's own; raises NotFoundError."""
    path = Path(name) if name.endswith(".yaml") else find_recipes().get(name)
    if path is None or not path.is_file():
        raise NotFoundError(f"there is no recipe {name}; name one of {', '.join(find_recipes())}, or a YAML file")
    return path


def read_recipe(path: Path) -> ImageRecipe:
    """Reads a recipe; raises InvalidArgumentError naming its file and the key that is wrong."""
    return validate(ImageRecipe, read_yaml(path), str(path), "")


def find_images(folder: Path) -> Iterator[Image]:
    """Yields the images in a folder, none where it is not there."""
    for path in sorted(folder.glob(f"[!.]*/{_RECIPE_FILE}")):
        yield Image(path.parent.name, path.parent / "rootfs", read_recipe(path))


def build_image(name: str, folder: Path, archive: Path | None, suite: str | None) -> Path:
    """Builds an image below `folder`, in place of one of its name, and returns its folder; needs root and the network.

    Raises FailedPreconditionError when a tool is missing or fails, InvalidArgumentError when the archive does not fit.
    """
    path = find_recipe(name)
    name, recipe = path.stem, read_recipe(path)
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError.for_field("NAME", f"{name} must be of small letters, digits and _+.-")
    if (archive is None) != (recipe.archive_folder is None):
        expected = f"give {recipe.archive}" if recipe.archive_folder else "it takes none"
        raise InvalidArgumentError.for_field("--archive", f"of the image {name}: {expected}")
    staging = folder / f".{name}.build"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        root = staging / "rootfs"
        _run(_bootstrap_command(recipe, root, suite or platform.freedesktop_os_release().get("VERSION_CODENAME", "")))
        if archive is not None and recipe.archive_folder is not None:
            target = root / recipe.archive_folder.strip("/")
            target.mkdir(parents=True)
            _run(["tar", "-xaf", str(archive), "--strip-components=1", "--no-same-owner", "-C", str(target)])
        shutil.copyfile(path, staging / _RECIPE_FILE)
        shutil.rmtree(folder / name, ignore_errors=True)
        staging.rename(folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder / name


def _bootstrap_command(recipe: ImageRecipe, root: Path, suite: str) -> list[str]:
    left_out = [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    include = [f"--include={','.join(recipe.packages)}"] if recipe.packages else []
    sources = map(
        str, [*Path("/etc/apt").glob("sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.sources"))]
    )
    return ["mmdebstrap", "--mode=root", "--variant=minbase", *left_out, *include, suite, str(root), *sources]


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    except FileNotFoundError as error:
        raise FailedPreconditionError(f"{command[0]} is not there: apt-get install {command[0]}") from error
    except subprocess.CalledProcessError as error:
        raise FailedPreconditionError(f"{command[0]} ended with exit code {error.returncode}: see above") from error
