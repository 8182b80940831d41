"""Runtimes of one's own: described in a folder of YAML files, rooted in a folder or in an unpacked OCI bundle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import yaml

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox import function_tests, running_sandbox, skip_unless_possible, stdio_tests

APPLETS = ("sh", "cat", "echo", "ls", "tr", "sleep", "env")
LOOK = b"""
ls / | tr '\\n' ' '
echo
for path in /usr /etc/shadow /bin/bash /lib; do [ -e $path ] && echo "there is $path"; done
cat
echo "$1"
echo wrong >&2
exit 3
"""


def link_or_copy(source: str, target: str) -> None:
    """A hard link where both are on one file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def make_busybox_root(folder: Path) -> None:
    """A root with nothing but busybox; skips the test where there is no static one."""
    busybox = shutil.which("busybox")
    if busybox is None or subprocess.run(["ldd", busybox], capture_output=True).returncode == 0:
        pytest.skip("needs a static busybox: apt-get install busybox-static")
    (folder / "bin").mkdir(parents=True)
    shutil.copy2(busybox, folder / "bin/busybox")
    for applet in APPLETS:
        (folder / "bin" / applet).symlink_to("busybox")


def make_python_root(folder: Path) -> None:
    """A root with Debian's Python and what it is linked to; skips the test where that is not there."""
    python = Path("/usr/bin/python3").resolve()
    library = Path("/usr/lib") / python.name
    if not python.is_file() or not library.is_dir():
        pytest.skip("needs Python in /usr: apt-get install python3")
    modules = [str(path) for path in (library / "lib-dynload").glob("_ctypes.*")]
    linked = subprocess.run(["ldd", str(python), *modules], capture_output=True, text=True, check=True).stdout.split()
    for name in sorted({word for word in linked if word.startswith("/") and word[-1] != ":"}):
        (folder / name.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(os.path.realpath(name), str(folder / name.lstrip("/")))
    (folder / "usr/bin").mkdir(parents=True, exist_ok=True)
    link_or_copy(str(python), str(folder / "usr/bin/python3"))
    left_out = shutil.ignore_patterns("__pycache__", "test", "idlelib", "ensurepip", "tkinter", "dist-packages")
    target = folder / "usr/lib" / python.name
    shutil.copytree(library, target, symlinks=True, ignore=left_out, copy_function=link_or_copy)


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["zygote", "crun"])
async def images(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[SandboxClient]:
    """A sandbox with a folder, a bundle, a Python of its own, and an image that is not there."""
    skip_unless_possible(request.param)
    top = tmp_path_factory.mktemp("images")
    make_busybox_root(top / "folder")
    make_busybox_root(top / "bundle/rootfs")
    (top / "folder/only-here").write_text("folder\n")
    environment = ["PATH=/bin", "FROM_BUNDLE=yes", "REPLACED=no"]
    (top / "bundle/config.json").write_text(json.dumps({"ociVersion": "1.0.0", "process": {"env": environment}}))
    make_python_root(top / "python")
    shell = {"title": "BusyBox", "source": "main.sh", "run": ["/bin/sh", "{source}"], "requires": ["sh"]}
    described = [
        {**shell, "name": "folder-shell", "image": str(top / "folder"), "environment": {"PATH": "/bin"}},
        {**shell, "name": "bundle-shell", "image": str(top / "bundle"), "environment": {"REPLACED": "yes"}},
        {**shell, "name": "absent-shell", "image": str(top / "absent")},
        {**shell, "name": "toolless-shell", "image": str(top / "folder"), "requires": ["ksh"], "install": "ksh"},
        {**shell, "name": "bound-shell", "binds": ["/etc/hosts"], "files": {"beside": "here\n"}},
        {
            **{"name": "own-python", "title": "Python", "source": "main.py", "python": True, "preload": ["json"]},
            "image": str(top / "python"),
        },
    ]
    (top / "runtimes").mkdir()
    for runtime in described:
        (top / "runtimes" / f"{runtime['name']}.yaml").write_text(yaml.safe_dump(runtime))
    state = tmp_path_factory.mktemp("sandbox")
    async with running_sandbox(
        state, isolation=request.param, runtimes_path=str(top / "runtimes"), slots=2, max_sessions=1
    ) as client:
        yield client


async def test_a_program_sees_the_folder_and_nothing_of_the_host(images: SandboxClient) -> None:
    request = pb.ExecuteRequest(language="folder-shell", source=LOOK, stdin=b"input\n", args=["argument"])
    response = await images.execute(request)
    assert (response.status, response.exit_code, response.stderr) == (pb.STATUS_RUNTIME_ERROR, 3, b"wrong\n"), response
    listed, *said = response.stdout.decode().splitlines()
    assert said == ["input", "argument"]
    assert set(listed.split()) <= {"bin", "only-here", "box", "dev", "etc", "proc", "run", "tmp", "sys", "old"}
    assert {"bin", "only-here", "box"} <= set(listed.split())


async def test_a_bundle_brings_its_environment(images: SandboxClient) -> None:
    source = b'echo "$PATH $FROM_BUNDLE $REPLACED $REQUESTED"; [ -e /only-here ] || echo "not there"'
    request = pb.ExecuteRequest(language="bundle-shell", source=source, env={"REQUESTED": "yes"})
    response = await images.execute(request)
    assert (response.status, response.stdout) == (pb.STATUS_OK, b"/bin yes yes yes\nnot there\n"), response


async def test_an_image_is_not_written_to(images: SandboxClient) -> None:
    source = b"echo changed > /only-here || echo changed > /bin/new || cat /only-here"
    for _ in range(2):
        response = await images.execute(pb.ExecuteRequest(language="folder-shell", source=source))
        assert response.stdout == b"folder\n"


async def test_a_bound_path_is_read_and_not_written_to(images: SandboxClient) -> None:
    source = b"cat beside; [ -s /etc/hosts ] && echo read; ls -d /etc/ho*; (echo changed >> /etc/hosts) || echo kept"
    response = await images.execute(pb.ExecuteRequest(language="bound-shell", source=source))
    assert response.stdout == b"here\nread\n/etc/hosts\nkept\n", response


async def test_images_change_from_request_to_request(images: SandboxClient) -> None:
    """In one slot, so that each finds the other's image there."""
    sources = {
        "folder-shell": b"cat /only-here",
        "bundle-shell": b"echo $FROM_BUNDLE",
        "bash": b"[ -d /usr/lib ] && echo host",
        "python": b"import os; print(os.path.isdir('/usr/lib/locale') or os.path.isdir('/usr/lib'))",
        "own-python": b"import os; print(sorted(os.listdir('/usr')))",
    }
    expected = {
        "folder-shell": b"folder\n",
        "bundle-shell": b"yes\n",
        "bash": b"host\n",
        "python": b"True\n",
        "own-python": b"['bin', 'lib']\n",
    }
    for language in [*sources, *reversed(sources)]:
        response = await images.execute(pb.ExecuteRequest(language=language, source=sources[language]))
        assert (language, response.stdout) == (language, expected[language]), response


async def test_submissions_are_judged_in_an_image(images: SandboxClient) -> None:
    tests = stdio_tests([(b"a", b"A"), (b"b", b"B"), (b"c", b"c")])
    response = await images.judge(pb.JudgeRequest(language="folder-shell", source=b"tr a-z A-Z", tests=tests))
    assert [result.verdict for result in response.results] == [
        *[pb.TEST_VERDICT_ACCEPTED] * 2,
        pb.TEST_VERDICT_WRONG_ANSWER,
    ]


async def test_python_of_an_image_has_all_of_python_s_modes(images: SandboxClient) -> None:
    tests = function_tests([([number], 2 * number) for number in range(3)])
    request = pb.JudgeRequest(language="own-python", source=b"def f(x): return 2 * x", function_name="f", tests=tests)
    assert (await images.judge(request)).verdict == pb.TEST_VERDICT_ACCEPTED
    async with images.session("own-python") as session:
        await session.run("import json, os")
        cell = await session.run("json.dumps([os.path.exists('/usr/lib/locale'), 6 * 7])")
    assert cell.result == "'[false, 42]'"


async def test_what_an_image_lacks_is_reported(images: SandboxClient) -> None:
    missing = {entry.language: entry.reason for entry in (await images.list_runtimes(pb.ListRuntimesRequest())).missing}
    assert missing["absent-shell"].startswith("there is no image at ")
    assert missing["toolless-shell"] == "ksh is not there: install ksh"
