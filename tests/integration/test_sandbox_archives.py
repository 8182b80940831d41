"""Archives go into programs and sessions and come out of them; in every isolation."""

from __future__ import annotations

import gzip
import io
import tarfile
from functools import cache

import pytest

from perigee.errors import InvalidArgumentError
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.runtime.jobs import make_tar
from tests.fixtures.sandbox import function_tests, stdio_tests

MANY = make_tar(pb.File(path=f"repository/d{index % 50}/f{index}.txt", content=b"x") for index in range(3200))
COUNT = "import os\nprint(sum(len(names) for _, _, names in os.walk('repository')))"
PIECE_BYTES = 1 << 20


async def test_thousands_of_files_are_unpacked_for_one_program_and_packed_after_it(sandbox: SandboxClient) -> None:
    request = pb.ExecuteRequest(
        language="python",
        source=f"{COUNT}\nopen('repository/new', 'w').write('new')".encode(),
        archives=[pb.Archive(content=MANY)],
        output_folders=["repository"],
    )
    response = await sandbox.execute(request)
    assert (response.status, response.stdout) == (pb.STATUS_OK, b"3200\n"), response
    with tarfile.open(fileobj=io.BytesIO(response.files[0].content)) as tar:
        names = tar.getnames()
        assert len(names) == 3251
        assert tar.extractfile("new").read() == b"new"  # type: ignore[union-attr]


async def test_a_session_takes_a_large_archive_in_pieces(sandbox: SandboxClient) -> None:
    async with sandbox.session() as session:
        for start in range(0, len(MANY), PIECE_BYTES):
            piece = pb.File(path="all.tar", content=MANY[start : start + PIECE_BYTES], append=True)
            sent = await sandbox.run_cell(pb.RunCellRequest(session_id=session.id, files=[piece]))
            assert sent.status == pb.STATUS_OK, sent
        archives = [pb.Archive(file="all.tar", folder="in")]
        cell = pb.RunCellRequest(
            session_id=session.id, code=COUNT.replace("repository", "in").encode(), archives=archives
        )
        assert (await sandbox.run_cell(cell)).stdout == b"3200\n"
        with pytest.raises(InvalidArgumentError, match=r"'absent\.zip' cannot be opened: No such file"):
            await sandbox.run_cell(pb.RunCellRequest(session_id=session.id, archives=[pb.Archive(file="absent.zip")]))
        assert (await session.run("6 * 7")).result == "42"


@cache
def bomb() -> bytes:
    """A small archive with a header of 64 MiB."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 64 << 20
    return gzip.compress(member.tobuf(tarfile.USTAR_FORMAT) + bytes(member.size), compresslevel=1)


@pytest.mark.parametrize("language", ["python", "c"])
async def test_an_archive_that_does_not_fit_is_a_wrong_request(sandbox: SandboxClient, language: str) -> None:
    links = io.BytesIO()
    with tarfile.open(fileobj=links, mode="w") as tar:
        link = tarfile.TarInfo("out")
        link.type, link.linkname = tarfile.SYMTYPE, "../../etc"
        tar.addfile(link)
    refused = {
        "takes more memory than the job has": (bomb(), pb.Limits(memory_bytes=32 << 20)),
        "links out of the folder": (links.getvalue(), pb.Limits()),
        "raise limits.files": (MANY, pb.Limits(files=100)),
        "raise limits.file_bytes": (MANY, pb.Limits(file_bytes=1 << 20)),
    }
    for reason, (content, limits) in refused.items():
        request = pb.ExecuteRequest(
            language=language,
            source=b"int x;" if language == "c" else b"echo 1",
            archives=[pb.Archive(content=make_tar([pb.File(path="a")])), pb.Archive(content=content)],
            limits=limits,
            compile_limits=limits,
        )
        with pytest.raises(InvalidArgumentError, match=rf"archives\[1\].*{reason}"):
            await sandbox.execute(request)
    assert (await sandbox.run("print(1)")).stdout == b"1\n"


async def test_a_command_runs_among_the_files_of_an_archive(sandbox: SandboxClient) -> None:
    for language in ("python", "bash"):
        request = pb.ExecuteRequest(
            language=language,
            command=["sh", "-c", 'cat a/b c; exit "$0"', "3"],
            archives=[pb.Archive(content=make_tar([pb.File(path="a/b", content=b"one ")]))],
            files=[pb.File(path="c", content=b"two")],
        )
        response = await sandbox.execute(request)
        assert (response.exit_code, response.stdout) == (3, b"one two"), response


LOOPBACK = """
import socket, threading
for family, host in ((socket.AF_INET, "localhost"), (socket.AF_INET6, "::1")):
    with socket.create_server((host, 0), family=family) as server:
        def serve():
            connection, _ = server.accept()
            connection.sendall(connection.recv(9).upper())
            connection.close()
        threading.Thread(target=serve).start()
        with socket.create_connection(server.getsockname()[:2]) as client:
            client.sendall(b"hello")
            print(client.recv(9).decode())
print(sorted(line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]))
for what in (
    lambda: socket.create_connection(("192.0.2.1", 80), 5),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262),
    lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
):
    try:
        what()
        print("reached")
    except OSError as error:
        print(error.errno)
"""


HOARD = """
import socket
held, pairs = 0, []
with socket.create_server(("127.0.0.1", 0)) as server:
    for _ in range(20):
        pairs += [socket.create_connection(server.getsockname()), server.accept()[0]]
        for end in pairs[-2:]:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 30)
            end.setblocking(False)
            try:
                while True:
                    held += end.send(bytes(65536))
            except BlockingIOError:
                pass
print(held >> 20)
"""


async def test_sockets_hold_no_more_than_the_memory_limit(sandbox: SandboxClient) -> None:
    limits = pb.Limits(memory_bytes=64 << 20)
    request = pb.ExecuteRequest(language="python", source=HOARD.encode(), loopback=True, limits=limits)
    response = await sandbox.execute(request)
    assert int(response.stdout) <= 64, response


async def test_loopback_sockets_reach_the_program_alone(sandbox: SandboxClient) -> None:
    request = pb.ExecuteRequest(language="python", source=LOOPBACK.encode(), loopback=True)
    response = await sandbox.execute(request)
    assert response.stdout.decode().splitlines() == ["HELLO", "HELLO", "['lo']", "101", "1", "1", "1", "1"], response
    request.loopback = False
    assert b"PermissionError" in (await sandbox.execute(request)).stderr


async def test_submissions_are_judged_among_the_files_of_an_archive(sandbox: SandboxClient) -> None:
    files = [
        pb.File(path="part/answer.h", content=b"#define ANSWER 42"),
        pb.File(path="more.py", content=b"answer = 42"),
    ]
    archives = [pb.Archive(content=make_tar(files))]
    compiled = b'#include <stdio.h>\n#include "part/answer.h"\nint main(void) { printf("%d", ANSWER); }'
    printed = stdio_tests([(b"", b"42"), (b"", b"42")])
    called = function_tests([([], 42)])
    for request in (
        pb.JudgeRequest(language="c", source=compiled, tests=printed),
        pb.JudgeRequest(language="python", source=b"from more import answer\nprint(answer)", tests=printed),
        pb.JudgeRequest(
            language="python", source=b"import more\ndef f(): return more.answer", function_name="f", tests=called
        ),
    ):
        request.archives.extend(archives)
        response = await sandbox.judge(request)
        assert response.verdict == pb.TEST_VERDICT_ACCEPTED, response
