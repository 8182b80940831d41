"""`perigee sandbox run`: the request that options make, and the exit code that an end makes."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from perigee.cli.sandbox.app import service_command
from perigee.cli.sandbox.run import describe_end, exit_code, make_request, stats_line
from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb


@pytest.mark.parametrize(
    ("response", "code", "reported"),
    [
        (pb.ExecuteResponse(status=pb.STATUS_OK), 0, []),
        (pb.ExecuteResponse(status=pb.STATUS_RUNTIME_ERROR, exit_code=7), 7, []),
        (
            pb.ExecuteResponse(status=pb.STATUS_RUNTIME_ERROR, exit_code=-1, signal=signal.SIGSEGV),
            139,
            ["x.c was ended by SIGSEGV"],
        ),
        (pb.ExecuteResponse(status=pb.STATUS_RUNTIME_ERROR, exit_code=-1), 1, []),
        (
            pb.ExecuteResponse(status=pb.STATUS_TIME_LIMIT, exit_code=-1, signal=9, reason="CPU limit of 5 ms"),
            124,
            ["x.c was ended: CPU limit of 5 ms"],
        ),
        (pb.ExecuteResponse(status=pb.STATUS_MEMORY_LIMIT, exit_code=-1), 137, ["x.c was ended: memory limit"]),
        (
            pb.ExecuteResponse(status=pb.STATUS_OUTPUT_LIMIT, stdout_truncated=True, reason="output limit of 9 bytes"),
            153,
            ["x.c was ended: output limit of 9 bytes", "standard output of x.c is cut at the output limit"],
        ),
        (pb.ExecuteResponse(status=pb.STATUS_COMPILE_ERROR, reason="code 1"), 126, ["x.c does not compile: code 1"]),
        (pb.ExecuteResponse(status=pb.STATUS_INFRA_ERROR, reason="x"), 125, ["the sandbox failed: x; try again"]),
        (pb.ExecuteResponse(), 125, ["the sandbox failed; try again"]),
    ],
)  # fmt: skip
def test_how_a_program_ended_is_reported(response: pb.ExecuteResponse, code: int, reported: list[str]) -> None:
    assert exit_code(response) == code
    assert describe_end("x.c", response) == reported


def test_stats_name_the_compiler_where_there_was_one() -> None:
    response = pb.ExecuteResponse(wall_ms=12, cpu_ms=10, peak_memory_bytes=3 << 19)
    assert stats_line(response) == "wall 12 ms, CPU 10 ms, memory 1.5 MiB"
    response.compile.wall_ms = 300
    assert stats_line(response).endswith(", compiler 300 ms")


def test_options_make_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("main.py").write_text("print(1)")
    Path("data").mkdir()
    Path("data/run.sh").write_bytes(b"\xff")
    Path("data/run.sh").chmod(0o755)
    Path("in.txt").write_text("5")
    request = make_request(
        file=Path("main.py"),
        arguments=["-x", "y"],
        stdin="in.txt",
        files=["./data/run.sh"],
        outputs=["./out/a.txt"],
        env=["A=B=C", "EMPTY="],
        limits=pb.Limits(wall_ms=5),
    )
    assert request == pb.ExecuteRequest(
        language="python",
        source=b"print(1)",
        stdin=b"5",
        args=["-x", "y"],
        limits=pb.Limits(wall_ms=5),
        files=[pb.File(path="data/run.sh", content=b"\xff", executable=True)],
        env={"A": "B=C", "EMPTY": ""},
        output_files=["out/a.txt"],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: make_request(Path("gone.py")), "gone.py: cannot be read: No such file or directory"),
        (
            lambda: make_request(Path("notes.txt")),
            "notes.txt: the suffix .txt stands for no known language; known are",
        ),
        (lambda: make_request(Path("notes")), "notes: without a suffix it is of no known language"),
        (lambda: make_request(Path("a.py"), files=["/etc/passwd"]), "--file: '/etc/passwd' must be a relative path"),
        (lambda: make_request(Path("a.py"), files=["b/../../c"]), "--file: 'b/../../c' must be a relative path"),
        (lambda: make_request(Path("a.py"), files=["gone"]), "gone: cannot be read"),
        (lambda: make_request(Path("a.py"), outputs=["../x"]), "--output: '../x' must be a relative path"),
        (lambda: make_request(Path("a.py"), outputs=[""]), "--output: '' must be a relative path"),
        (lambda: make_request(Path("a.py"), env=["A"]), "--env: 'A' is not of the form NAME=VALUE"),
        (lambda: make_request(Path("a.py"), stdin="gone"), "gone: cannot be read"),
        (lambda: make_request(Path("large.py")), "large.py: makes a request of 5,000,"),
    ],
)
def test_a_mistake_names_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[], pb.ExecuteRequest], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text("print(1)")
    Path("large.py").write_bytes(b"#" * 5_000_000)
    with pytest.raises(InvalidArgumentError) as caught:
        change()
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message


def test_what_is_set_by_hand_wins_when_serving() -> None:
    command = service_command(50056, 8056, 4, ["slots=2", "isolation=crun"])
    assert command[:3] == [sys.executable, "-m", "services.sandbox"]
    assert command[3::2] == ["--set"] * 5
    assert command[4::2] == ["server.port=50056", "http.port=8056", "slots=4", "slots=2", "isolation=crun"]
