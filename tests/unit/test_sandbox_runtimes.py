"""Descriptions of runtimes: what is wrong with one is told when the service starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from perigee.cli.sandbox.connection import LANGUAGES
from perigee.config import read_yaml
from perigee.errors import InvalidArgumentError, PerigeeError
from services.sandbox.config import ExtraTimeConfig, SandboxConfig
from services.sandbox.languages.catalog import OWN_RUNTIMES, OutOfMemory, RuntimeConfig, load_catalog
from services.sandbox.languages.images import build_image, find_recipes, read_recipe

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


def test_suffixes_stand_for_all_languages() -> None:
    configs = [RuntimeConfig(**read_yaml(path)) for path in OWN_RUNTIMES.glob("*.yaml")]
    assert set(LANGUAGES.values()) <= {config.name for config in configs}
    assert {Path(config.source).suffix for config in configs} <= set(LANGUAGES)


def test_tests_can_import_what_programs_can() -> None:
    configs = {path.stem: RuntimeConfig(**read_yaml(path)) for path in OWN_RUNTIMES.glob("*.yaml")}
    libraries = {name: {*config.packages, *config.optional_packages} for name, config in configs.items()}
    assert libraries["python"] <= libraries["python-science"]
    for name in ("python-test", "pytest"):
        assert libraries["python-science"] <= libraries[name], name


def test_a_full_heap_of_the_jvm_is_the_memory_limit_in_every_language() -> None:
    configs = [RuntimeConfig(**read_yaml(path)) for path in OWN_RUNTIMES.glob("*.yaml")]
    for config in (config for config in configs if config.run[:1] == ("java",)):
        assert {"-XX:+ExitOnOutOfMemoryError", "-XX:+DisplayVMOutputToStderr"} <= {*config.run}, config.name
        assert config.out_of_memory == OutOfMemory(exit_code=3, message="Terminating due to java.lang.OutOfMemoryError")


def test_a_folder_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"sandbox\.runtimes_path: .*gone is no folder"):
        load_catalog(SandboxConfig(runtimes_path=str(tmp_path / "gone")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RIGHT + "titel: Mine\n", "titel: unknown key; did you mean title?"),
        (
            RIGHT.replace('"{source}"', '"{print $1}"'),
            "run: '{print $1}' may hold {source}, {memory_mib}, {main} and {python}",
        ),
        (RIGHT.replace('"{source}"', '"{source.name}"'), "run: '{source.name}' may hold"),
        (RIGHT + 'compile: [cc, "{0}"]\n', "compile: '{0}' may hold"),
        (RIGHT + 'compile: [cc, "}"]\n', "compile: '}' may hold"),
        (RIGHT.replace("run", "version"), "run is required where python is not true"),
        (RIGHT + "limits: {memory_bytes: 1}\n", "limits.memory_bytes: "),
        (RIGHT + "binds: [etc/R]\n", "binds: etc/R must be an absolute path"),
        (RIGHT + "binds: [/usr/../etc]\n", "/usr/../etc must be an absolute path without . and .."),
        (RIGHT + "binds: [/]\n", "/ must not be bound"),
        (RIGHT + "binds: [/etc]\n", "/etc must not be bound: no program may see /etc/passwd"),
        (RIGHT + "binds: [/proc/sys]\n", "no program may see /proc"),
        (RIGHT + "binds: [/sys]\n", "no program may see /sys"),
        (RIGHT + "binds: [/run/perigee]\n", "no program may see /run"),
        (RIGHT + "binds: ['/proc/1/root*']\n", "no program may see /proc"),
        (RIGHT + "binds: ['/dev/std*']\n", "no program may see /dev"),
        (RIGHT + "binds: [/bin/../etc/shadow]\n", "must be an absolute path without . and .."),
        (RIGHT + "binds: [/var/backups]\n", "no program may see /var/backups"),
        (RIGHT + "binds: [/etc/sudoers.d/mine]\n", "no program may see /etc/sudoers.d"),
    ],
)
def test_a_wrong_description_is_reported_with_its_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        load_catalog(described(tmp_path, text))
    assert words in error.value.message
    assert "mine.yaml" in error.value.message


def test_the_names_of_what_is_missing_say_why(tmp_path: Path) -> None:
    text = RIGHT.replace("requires: [sh]", "requires: [nothing-called-so]\naliases: [my]\ninstall: it\n")
    config = described(tmp_path, text).model_copy(update={"extra_time": {"MY": ExtraTimeConfig()}})
    catalog = load_catalog(config)
    for name in ("mine", "Mine", "my", "MY"):
        assert catalog.explain(name) == f"{name} cannot be used here: nothing-called-so is not there: install it"
    with pytest.raises(InvalidArgumentError, match=r"sandbox\.extra_time\.klingon: 'klingon' is unknown; known: "):
        load_catalog(config.model_copy(update={"extra_time": {"klingon": ExtraTimeConfig()}}))


@pytest.mark.parametrize(
    ("bind", "reason"),
    [
        ("/etc/hosts", ""),
        ("/etc/nothing-called-so*", ""),
        ("/etc/nothing-called-so", "/etc/nothing-called-so is not there: install it"),
        ("/etc/mtab", "must not be bound: no program may see /proc"),  # a link
        ("/srv", "/srv must not be bound: no program may see /srv/state"),
        ("//etc/shadow", "no program may see /etc/shadow"),
        ("/etc/shado[w]*", "no program may see /etc/shadow"),
        ("/etc/shadow*", "no program may see /etc/shadow"),
        ("/etc/s*", "no program may see /etc/s"),
        ("/etc/gshadow-*", "no program may see /etc/gshadow-"),
        ("/e*", "no program may see /etc/"),
    ],
)
def test_binds_are_looked_up_on_the_host(tmp_path: Path, bind: str, reason: str) -> None:
    config = described(tmp_path, f'{RIGHT}binds: ["{bind}"]\n').model_copy(update={"state_path": "/srv/state"})
    catalog = load_catalog(config)
    if reason:
        assert reason in catalog.explain("mine")
    else:
        runtime = catalog.find("mine")
        assert runtime is not None
        assert (bind in runtime.binds) == ("*" not in bind)


def test_an_image_offers_its_runtimes_and_what_the_host_lacks(tmp_path: Path) -> None:
    for folder in ("runtimes", "images/set/rootfs/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "images/set/rootfs/bin/only-here").touch()
    recipe = "title: Set\nruntimes:\n  mine: {environment: {PATH: /bin}}\n  bash: {requires: [only-here]}\n"
    (tmp_path / "images/set/image.yaml").write_text(recipe)
    config = described(tmp_path / "runtimes", RIGHT.replace("requires: [sh]", "requires: [only-here]\naliases: [my]"))
    catalog = load_catalog(config.model_copy(update={"images_path": str(tmp_path / "images")}))
    found = {name: catalog.find(name) for name in ("mine", "my", "set.mine", "set.bash", "bash")}
    roots = {name: runtime.image for name, runtime in found.items() if runtime is not None}
    assert roots == {
        **dict.fromkeys(("mine", "my", "set.mine", "set.bash"), f"{tmp_path}/images/set/rootfs"),
        "bash": "",
    }


def test_an_image_of_an_unknown_runtime_is_reported(tmp_path: Path) -> None:
    (tmp_path / "set/rootfs").mkdir(parents=True)
    (tmp_path / "set/image.yaml").write_text("title: Set\nruntimes: {klingon: {}}\n")
    with pytest.raises(InvalidArgumentError, match=r"set: runtimes\.klingon: is the name of no runtime"):
        load_catalog(SandboxConfig(images_path=str(tmp_path)))


def test_every_recipe_names_runtimes_and_packages() -> None:
    known = {path.stem for path in OWN_RUNTIMES.glob("*.yaml")}
    for path in find_recipes().values():
        recipe = read_recipe(path)
        assert set(recipe.runtimes) <= known
        assert list(recipe.packages) == sorted(recipe.packages)


@pytest.mark.parametrize(
    ("name", "archive", "words"),
    [
        ("klingon", None, "there is no recipe klingon; name one of dmoj, jest, julia"),
        ("lean4", None, "--archive: of the image lean4: give the archive of a release"),
        ("dmoj", "some.tar", "--archive: of the image dmoj: it takes none"),
    ],
)
def test_what_an_image_cannot_be_built_from_is_told_first(
    tmp_path: Path, name: str, archive: str | None, words: str
) -> None:
    with pytest.raises(PerigeeError) as error:
        build_image(name, tmp_path / "images", Path(archive) if archive else None, None)
    assert words in error.value.message
    assert not (tmp_path / "images").exists()
