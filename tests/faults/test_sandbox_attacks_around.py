"""Attacks by what comes beside a program: archives, reports of tests, patches, replies of cells, E2B's requests."""

# ruff: noqa: E501

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.apply_patch import apply_all
from services.sandbox.judge.suites import PROTECTED
from tests.fixtures.sandbox import function_tests
from tests.fixtures.sandbox_fronts import Fronts

COUNTED = {
    pb.TEST_VERDICT_WRONG_ANSWER,
    pb.TEST_VERDICT_RUNTIME_ERROR,
    pb.TEST_VERDICT_TIME_LIMIT,
    pb.TEST_VERDICT_MEMORY_LIMIT,
    pb.TEST_VERDICT_OUTPUT_LIMIT,
}


def pack(*members: tarfile.TarInfo, mode: str = "w", content: bytes = b"") -> bytes:
    """A tar of members without contents, or all with one."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode, format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
        for member in members:
            tar.addfile(member, io.BytesIO(content) if member.size else None)
    return packed.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", bytes_: int = 0, **pax: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.pax_headers = kind, target, bytes_, pax
    return info


def zipped(*names: str, method: int = zipfile.ZIP_STORED, content: bytes = b"x") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return packed.getvalue()


SPARSE = member("x.xml", **{"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 42), "GNU.sparse.name": "y.xml"})
MANY_HEADERS = pack(member("a" * 200))[:1024] * 600  # each says how the next entry is called
LINK = tarfile.SYMTYPE

# archive; what is refused, or None where it is unpacked below the folder
ARCHIVES: dict[str, tuple[bytes, str | None]] = {
    "sparse file of a terabyte": (pack(SPARSE), "does not fit"),
    "header of a gigabyte": (pack(member("x", tarfile.XHDTYPE))[:124] + b"10000000000\0", "neither"),
    "headers without an entry": (MANY_HEADERS, "damaged"),
    "time that there is none": (pack(member("x", mtime="1e300")), "damaged"),
    "name that is no text": (pack(member("x", path="a\ud800".encode("utf-8", "surrogatepass").decode("latin-1"))), None),
    "name with a nul": (pack(member("x", path="a\0b")), "no valid name"),
    "file with a slash": (pack(member("x", path="a/")), None),
    "file for the folder": (pack(member("x", path="./")), None),
    "dots that look alike": (pack(member("x", path="\uff0e\uff0e/\u2025/x")), None),
    "backslashes": (zipped("..\\..\\etc\\x"), None),
    "link, then below it": (pack(member("a", LINK, "b"), member("a/x")), "link"),
    "link through a link": (pack(member("d", tarfile.DIRTYPE), member("d/l", LINK, ".."), member("m", LINK, "d/l/../.."), ), "links out"),
    "hard link to a link": (pack(member("l", LINK, "x"), member("h", tarfile.LNKTYPE, "l")), None),
    "hard link out": (pack(member("h", tarfile.LNKTYPE, "../../etc/passwd")), "leaves"),
    "link by a header": (pack(member("l", LINK, "x", linkpath="/etc/passwd")), "links out"),
    "size by a header": (pack(member("x", bytes_=1, size=str(1 << 40)), content=b"x"), "damaged"),
    "zip that says it is small": (zipped("x", content=b"x" * 4096).replace(struct.pack("<II", 4096, 4096), struct.pack("<II", 1, 1)), "damaged"),
    "zip bomb": (zipped(*"abcdefgh", method=zipfile.ZIP_DEFLATED, content=bytes(8 << 20)), "does not fit"),
    "zip within a zip": (zipped("a.zip", content=zipped("../x")), None),
    "zip by a codec of its own": (zipped("x", method=zipfile.ZIP_LZMA), None),
    "zip of which the end lies": (zipped("x")[:-6] + struct.pack("<I", 1 << 31)[:4] + b"\0\0", "cannot be written"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ARCHIVES)
async def test_an_archive_stays_below_its_folder(fronts: Fronts, attack: str) -> None:
    archive, refused = ARCHIVES[attack]
    look = "import os\nprint(sorted(os.listdir('/box')), os.path.exists('/box/in') and os.listdir('/box/in'))"
    limits = pb.Limits(memory_bytes=64 << 20, file_bytes=4 << 20, files=100)
    request = pb.ExecuteRequest(language="python", source=look.encode(), limits=limits)
    request.archives.add(content=archive, folder="in")
    if refused is not None:
        with pytest.raises(InvalidArgumentError, match=refused):
            await fronts.grpc.execute(request)
        return
    response = await fronts.grpc.execute(request)
    assert response.stdout.startswith((b"['in', 'main.py']", b"['main.py']")), response


XML = "<testsuite><testcase name='x'>%s</testcase></testsuite>"
# framework and what the code under test writes for a report
REPORTS: dict[str, tuple[pb.TestFramework.ValueType, bytes]] = {
    "sparse report of four terabytes": (pb.TEST_FRAMEWORK_JUNIT, pack(SPARSE)),
    "report of headers": (pb.TEST_FRAMEWORK_JUNIT, MANY_HEADERS),
    "report with a map of no numbers": (pb.TEST_FRAMEWORK_JUNIT, pack(member("x.xml", **{"GNU.sparse.map": "a,b"}))),
    "report with a size of no number": (pb.TEST_FRAMEWORK_JUNIT, pack(member("x.xml", size="-1"))),
    "report that ends too soon": (pb.TEST_FRAMEWORK_JUNIT, pack(member("x.xml", bytes_=99), content=b"x" * 99)[:520]),
    "entities": (pb.TEST_FRAMEWORK_JUNIT, b"<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>"),
    "elements in each other": (pb.TEST_FRAMEWORK_JUNIT, b"<a>" * 100_000),
    "encoding that there is none": (pb.TEST_FRAMEWORK_JUNIT, b"<?xml version='1.0' encoding='utf-99'?><a/>"),
    "duration that is no float": (pb.TEST_FRAMEWORK_JEST, json.dumps({"testResults": [{"assertionResults": [{"duration": 10**400}]}]}).encode()),
    "lists in each other": (pb.TEST_FRAMEWORK_JEST, b'{"testResults": [{"name": ' + b"[" * 900 + b"]" * 900 + b"}]}"),
    "halves of characters": (pb.TEST_FRAMEWORK_JEST, b'{"testResults": [{"assertionResults": [{"fullName": "\\ud800"}]}]}'),
    "number of 9,999 digits": (pb.TEST_FRAMEWORK_GO_TEST, b'{"Action": "pass", "Test": "x", "Elapsed": ' + b"9" * 9999 + b"}"),
    "package that is a list": (pb.TEST_FRAMEWORK_GO_TEST, b'{"Action": "fail", "Test": [1], "Package": {"a": 1}, "Elapsed": []}'),
}  # fmt: skip


async def test_reports_are_read_as_what_anybody_wrote(fronts: Fronts) -> None:
    """A report that is none is the tests' failure: no error of the call, and no memory of the service."""
    async with fronts.grpc.session() as session:
        for attack, (framework, report) in REPORTS.items():
            run = pb.TestRun(framework=framework, command=["true"], report="r")
            file = pb.File(path="r", content=report)
            cell = pb.RunCellRequest(session_id=session.id, files=[file], tests=run)
            response = await fronts.grpc.run_cell(cell)
            assert response.status == pb.STATUS_OK, (attack, response)
            assert response.reason or response.tests, attack


async def test_an_exit_code_may_be_forged(fronts: Fronts) -> None:
    async with fronts.grpc.session() as session:
        await session.run(
            "import subprocess\nclass R:\n    def __repr__(self): return '9' * 9999\nR.returncode = R()\n"
            "subprocess.run = lambda *_, **__: R"
        )
        run = pb.TestRun(framework=pb.TEST_FRAMEWORK_JUNIT, command=["true"])
        response = await fronts.grpc.run_cell(pb.RunCellRequest(session_id=session.id, tests=run))
        assert response.reason


TAG = sys.implementation.cache_tag
# what a patch adds beside the protected tests/helper.py and conftest.py
PLANTED = {
    f"tests/__pycache__/helper.{TAG}.pyc": bytes(32),
    "tests/helper/__init__.py": b"def expected(): return 7\n",
    f"tests/helper.{TAG}-x86_64-linux-gnu.so": b"x\n",
    "pytest.toml": b"[pytest]\naddopts = ['-p', 'evil']\n",
    ".pytest.toml": b"[pytest]\naddopts = ['-p', 'evil']\n",
    "tests/conftest/__init__.py": b"x\n",
    "sub/conftest.py": b"x\n",
    "evil.egg-info/entry_points.txt": b"[pytest11]\nx = evil\n",
    "sitecustomize.py": b"x\n",
    "x.pth": b"import evil\n",
}  # fmt: skip


@pytest.mark.parametrize("path", PLANTED)
def test_a_patch_adds_nothing_that_stands_in_for_protected_files(tmp_path: Path, path: str) -> None:
    patch = git_binary_patch(path, PLANTED[path])
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/helper.py").write_text("def expected(): return 6\n")
    protected = [*PROTECTED[pb.TEST_FRAMEWORK_PYTEST], "tests/helper.py"]
    assert "patch" not in apply_all(tmp_path, b"", patch + git_binary_patch("kept.py", b"x\n"), protected)
    assert (tmp_path / "kept.py").exists()
    assert not (tmp_path / path).exists()
    assert (tmp_path / "tests/helper.py").exists()


def git_binary_patch(path: str, content: bytes) -> bytes:
    """A patch that adds a file of any bytes."""
    packed = zlib.compress(content)
    lines = []
    for start in range(0, len(packed), 52):
        part = packed[start : start + 52]
        length = chr(ord("A") + len(part) - 1) if len(part) <= 26 else chr(ord("a") + len(part) - 27)
        lines.append(length + base64.b85encode(part, pad=True).decode())
    head = f"diff --git a/{path} b/{path}\nnew file mode 100644\nindex {'0' * 40}..{'1' * 40}\nGIT binary patch\n"
    digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    head = head.replace("1" * 40, digest)
    return (head + f"literal {len(content)}\n" + "\n".join(lines) + "\n\nliteral 0\nHcmV?d00001\n\n").encode()


E2B = "/e2b"


async def test_e2b_keeps_to_its_sandboxes(fronts: Fronts) -> None:
    http = fronts.http
    for timeout in (1e300, 1e12, 1e9):
        made = await http.post(f"{E2B}/sandboxes", json={"timeout": timeout})
        described = made.json()  # no longer than a session
        assert described["endAt"][:4] <= str(int(described["startedAt"][:4]) + 1)
        assert (await http.delete(f"{E2B}/sandboxes/{described['sandboxID']}")).status_code == 204
    made = await http.post(f"{E2B}/sandboxes", json={}, headers={"x-api-key": "mine"})
    name = made.json()["sandboxID"]
    of = {"e2b-sandbox-id": name}
    others = await http.get(f"{E2B}/sandboxes", headers={"x-api-key": "another"})
    assert others.json() == []
    for guess in ("", "../", name[:-1], name.upper() + "x", "%00"):
        answered = await http.get(f"{E2B}/health", headers={"e2b-sandbox-id": guess})
        assert answered.status_code == 502, guess
    for path in ("../x", "/etc/passwd", "/home/user/../../etc/passwd", "", ".", "a\0b", "/home/user"):
        for answered in (
            await http.get(f"{E2B}/files", params={"path": path}, headers=of),
            await http.post(f"{E2B}/files", params={"path": path}, headers=of, content=b"x"),
        ):
            assert 400 <= answered.status_code < 500, (path, answered.text)
    start = struct.pack(">BI", 0, 1 << 31)
    for body in (
        b"",
        b"\0",
        start,
        start + b"{",
        start + b"[]",
        start + b'{"process": 1}',
        start + b'{"process": {"cmd": 1, "args": 2}}',
        start + b'{"process": {"cmd": "id", "envs": [1]}}',
    ):
        answered = await http.post(f"{E2B}/process.Process/Start", headers=of, content=body)
        assert answered.status_code == 400, (body, answered.text)
    for method, body in (
        ("Stat", {"path": 1}),
        ("ListDir", {"path": ["x"], "depth": "x"}),
        ("Stat", {"path": "x\0"}),
        ("__class__", {}),
    ):
        answered = await http.post(f"{E2B}/filesystem.Filesystem/{method}", json=body, headers=of)
        assert answered.status_code in (400, 404, 501), (method, answered.text)
    for timeout in (1e300, 1e12):
        answered = await http.post(f"{E2B}/sandboxes/{name}/timeout", json={"timeout": timeout})
        assert answered.status_code == 204, answered.text
    await http.delete(f"{E2B}/sandboxes/{name}")
    assert (await http.get(f"{E2B}/health", headers=of)).status_code == 502


REPLY = """
import json, os, sys
frame = sys._getframe()
while frame and 'reply_file' not in frame.f_locals: frame = frame.f_back
os.write(frame.f_locals['reply_file'], json.dumps(%s).encode())
frame.f_locals['channel'].send(b'replied %%d' %% frame.f_locals['header']['number'])
"""
# what a cell says that it has replied
REPLIES = [
    "{'ok': True, 'result': 5, 'displays': 5}",
    "{'ok': 1, 'displays': [{'contents': [['a', 1, 0]], 'is_result': 0}]}",
    "{'ok': True, 'displays': [{'contents': [['\\ud800', 'x', False]], 'is_result': True}]}",
    "{'ok': True, 'displays': [{'contents': [['a', '\\ud800', True]], 'is_result': 'x'}]}",
    "{'ok': True, 'error_name': '\\ud800', 'result': '\\ud800'}",
    "[[]]",
]


async def test_a_cell_forges_replies_of_its_own_alone(fronts: Fronts) -> None:
    async with fronts.grpc.session() as session:
        for reply in REPLIES:
            response = await fronts.grpc.run_cell(
                pb.RunCellRequest(session_id=session.id, code=(REPLY % reply).encode())
            )
            assert response.status != pb.STATUS_INFRA_ERROR, response
            if not response.alive:
                break
    async with fronts.grpc.session() as session:
        assert (await session.run("6 * 7")).result == "42"
        early = "import os, sys\nframe = sys._getframe()\nwhile 'channel' not in frame.f_locals: frame = frame.f_back\n"
        early += "number = frame.f_locals['header']['number']\n"
        early += "for n in range(number + 1, number + 4): frame.f_locals['channel'].send(b'replied %d' % n)"
        await session.run(early)
        answered = await session.run("print('later')\n6 * 7")
        assert answered.status != pb.STATUS_INFRA_ERROR, answered


# what holds for function tests: f gives 6 for 3 and 10 for 5, and none of these computes it
FUNCTIONS = {
    "replies before questions": "import os, struct\nfrom itertools import count\ndef f(x):\n"
    "    import sys\n    g = sys._getframe(1)\n    while '_reply' not in g.f_globals: g = g.f_back\n"
    "    reply = g.f_globals['_reply']\n    kind = g.f_globals['VALUE']\n"
    "    for _ in range(9): reply(kind, '10', 1000)\n    return 0",
    "a reply of half a head": "import os\ndef f(x):\n    os.write(3, b'\\0')\n    os.close(3)\n    return 6",
    "a reply of four gigabytes": "import os\ndef f(x):\n    os.write(3, b'\\xff' * 12)\n    return 6",
    "an end of the inputs": "import os\ndef f(x):\n    os.dup2(os.open('/dev/null', 0), 4)\n    return 0",
    "inputs as replies": "import os\ndef f(x):\n    os.dup2(4, 3)\n    return 0",
    "a name for a number": "class N(float):\n    def __repr__(self): return '6'\ndef f(x): return N(0)",
    "infinite": "def f(x): return float('inf')",
    "numbers of 9,999 digits": "import sys\nsys.set_int_max_str_digits(0)\ndef f(x): return 10 ** 9999",
    "keys twice": "import json\ndef f(x):\n    json.dumps = lambda *_, **__: '[6][10]'\n    return 0",
    "lists in each other": "import json\ndef f(x):\n    json.dumps = lambda *_, **__: '[' * 99999\n    return 0",
}


@pytest.mark.parametrize("attack", FUNCTIONS)
async def test_function_tests_are_not_outwitted(fronts: Fronts, attack: str) -> None:
    tests = function_tests([([3], 6), ([5], 10)])
    request = pb.JudgeRequest(language="python", source=FUNCTIONS[attack].encode(), tests=tests, function_name="f")
    request.limits.wall_ms = 2000
    response = await fronts.grpc.judge(request)
    assert response.verdict in COUNTED, response


SOCKETS = """
import socket
found = []
def reach(family, address):
    with socket.socket(family) as s:
        s.settimeout(0.3)
        try:
            s.connect(address); found.append(address)
        except OSError: pass
for host in {hosts!r}:
    for port in {ports!r}:
        reach(socket.AF_INET, (host, port))
for port in {ports!r}: reach(socket.AF_INET6, ('::1', port))
for name in open('/proc/net/unix').read().splitlines()[1:]:
    if '@' in name: reach(socket.AF_UNIX, '\\0' + name.rpartition('@')[2])
for kind in (socket.SOCK_RAW, 10):
    try: socket.socket(socket.AF_INET, kind, 1); found.append(kind)
    except OSError: pass
for family in (socket.AF_NETLINK, socket.AF_VSOCK, socket.AF_ALG, socket.AF_PACKET, socket.AF_BLUETOOTH):
    try: socket.socket(family, socket.SOCK_DGRAM if family != socket.AF_ALG else 5); found.append(family)
    except OSError: pass
here = socket.create_server(('127.0.0.1', 0))
reach(socket.AF_INET, here.getsockname())
print(len(found))
"""


async def test_the_loopback_device_leads_nowhere(fronts: Fronts) -> None:
    ports = [int(fronts.grpc.target.rsplit(":", 1)[1]), fronts.http.base_url.port or 0, 22]
    hosts = ["127.0.0.1", "127.0.0.2", "0.0.0.0", "169.254.169.254", "10.0.0.1", "172.17.0.1"]
    source = SOCKETS.format(hosts=hosts, ports=ports).encode()
    response = await fronts.grpc.execute(pb.ExecuteRequest(language="python", source=source, loopback=True))
    assert response.stdout == b"1\n", response


# variables of a request that interpreters and loaders heed
VARIABLES = {
    "PYTHONHOME": "/absent", "PYTHONPATH": "/box", "PYTHONINSPECT": "1", "PYTHONMALLOC": "debug", "LD_PRELOAD": "/box/x.so",
    "LD_LIBRARY_PATH": "/box", "PYTHONSTARTUP": "/box/main.py", "PYTHONBREAKPOINT": "os._exit", "GCONV_PATH": "/box",
    "PYTHONWARNINGS": "error", "PYTHONHASHSEED": "0", "PERIGEE_TOKEN": "x", "BASH_ENV": "/box/main.py", "PATH": "/box",
}  # fmt: skip


async def test_variables_reach_the_submission_alone(fronts: Fronts) -> None:
    files = [pb.File(path=f"{name}.py", content=b"raise SystemExit(9)") for name in ("json", "sitecustomize", "agent")]
    test = pb.TestCase(
        code=pb.CodeTest(
            code="import os\nassert not set(os.environ) & {'LD_PRELOAD', 'PERIGEE_TOKEN'}\nassert f(3) == 6"
        )
    )
    for source, expected in ((b"def f(x): return 2 * x", {pb.TEST_VERDICT_ACCEPTED}), (b"def f(x): return 0", COUNTED)):
        request = pb.JudgeRequest(language="python", source=source, tests=[test], function_name="f", env=VARIABLES)
        request.files.extend(files)
        response = await fronts.grpc.judge(request)
        assert response.verdict in expected, response


async def test_many_requests_of_zeros_are_refused_or_served(fronts: Fronts) -> None:
    requests = [
        fronts.http.post("/v1/execute", content=body, headers={"content-type": "application/json"})
        for body in (b"[" * 100_000, b'{"language": 1e999}', b'{"args": [' + b'"",' * 99_999 + b'""]}', b"\0" * 99_999)
    ]
    assert {each.status_code for each in await asyncio.gather(*requests)} <= {400, 413, 422}
