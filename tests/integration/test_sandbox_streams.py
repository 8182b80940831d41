"""Output as it is written, batches, output files, environments, and keys: over gRPC and HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import aclosing
from typing import Any

import grpc
import pytest

from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox import stdio_tests
from tests.fixtures.sandbox_fronts import Fronts

TALKING = b"""
import sys
print("first", flush=True)
print("wrong", file=sys.stderr, flush=True)
input()
print("last")
sys.exit(4)
"""
DRAW = b"import secrets; print(secrets.token_hex(8))"


async def read_lines(fronts: Fronts, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a stream of lines."""
    async with fronts.http.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("application/x-ndjson")
        return [json.loads(line) async for line in response.aiter_lines()]


@pytest.mark.parametrize("language", ["python", "bash"])
async def test_output_comes_as_it_is_written(fronts: Fronts, language: str) -> None:
    """Long before the program ends."""
    sources = {
        "python": b"import time\nprint('first', flush=True)\ntime.sleep(90)\nprint('last')",
        "bash": b"echo first; sleep 90; echo last",
    }
    limits = pb.Limits(wall_ms=100_000)
    request = pb.ExecuteRequest(language=language, source=sources[language], limits=limits)
    async with aclosing(fronts.grpc.execute_stream(request)) as events:  # type: ignore[type-var]
        assert (await anext(events)).stdout == b"first\n"


async def test_a_stream_ends_with_how_the_program_ended(fronts: Fronts) -> None:
    request = pb.ExecuteRequest(language="python", source=TALKING, stdin=b"\n")
    events = [event async for event in fronts.grpc.execute_stream(request)]
    assert b"".join(event.stdout for event in events) == b"first\nlast\n"
    assert b"".join(event.stderr for event in events) == b"wrong\n"
    finished = events[-1].finished
    assert (finished.status, finished.exit_code) == (pb.STATUS_RUNTIME_ERROR, 4)
    assert (finished.stdout, finished.stderr) == (b"", b"")
    broken = [event async for event in fronts.grpc.execute_stream(pb.ExecuteRequest(language="c", source=b"x"))]
    assert [event.finished.status for event in broken] == [pb.STATUS_COMPILE_ERROR]
    assert broken[0].finished.compile.stderr


async def test_a_stream_over_http(fronts: Fronts) -> None:
    body = {"execute": {"language": "python", "source": TALKING.decode(), "stdin": "\n"}}
    lines = await read_lines(fronts, "/v1/execute/stream", body)
    assert "".join(line.get("stdout", "") for line in lines) == "first\nlast\n"
    assert (lines[-1]["finished"]["status"], lines[-1]["finished"]["exit_code"]) == ("runtime_error", 4)


async def test_a_batch_answers_each_item(fronts: Fronts) -> None:
    requests = [
        pb.ExecuteRequest(language="python", source=b"print(input())", stdin=b"zero"),
        pb.ExecuteRequest(language="cobol", source=b"x"),
        pb.ExecuteRequest(language="python", source=b"1/0"),
        pb.ExecuteRequest(language="c", source=b"int main(void) { return 3; }"),
        pb.ExecuteRequest(language="python", source=b"while True: pass", limits=pb.Limits(cpu_ms=200)),
    ]
    answers = {
        answer.index: answer async for answer in fronts.grpc.execute_batch(pb.ExecuteBatchRequest(requests=requests))
    }
    assert sorted(answers) == [0, 1, 2, 3, 4]
    assert answers[0].response.stdout == b"zero\n"
    assert answers[1].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert list(answers[1].error.field_violations) == ["language"]
    assert answers[2].response.status == pb.STATUS_RUNTIME_ERROR
    assert answers[3].response.exit_code == 3
    assert answers[4].response.status == pb.STATUS_TIME_LIMIT


async def test_a_batch_of_submissions_answers_each_item(fronts: Fronts) -> None:
    tests = stdio_tests([(b"1", b"2"), (b"2", b"4")])
    requests = [
        pb.JudgeRequest(language="python", source=b"print(2 * int(input()))", tests=tests),
        pb.JudgeRequest(language="python", source=b"print(2)", tests=tests),
        pb.JudgeRequest(language="python", source=b"print(2)"),
        pb.JudgeRequest(language="python", source=b"print(2", tests=tests),
    ]
    answers = {
        answer.index: answer async for answer in fronts.grpc.judge_batch(pb.JudgeBatchRequest(requests=requests))
    }
    assert answers[0].response.verdict == pb.TEST_VERDICT_ACCEPTED
    assert answers[1].response.verdict == pb.TEST_VERDICT_WRONG_ANSWER
    assert list(answers[2].error.field_violations) == ["tests"]
    assert answers[3].response.verdict == pb.TEST_VERDICT_COMPILE_ERROR


async def test_batches_over_http(fronts: Fronts) -> None:
    body = {"requests": [{"language": "python", "source": "print(1)"}, {"source": "print(1)"}]}
    lines = {line["index"]: line for line in await read_lines(fronts, "/v1/execute/batch", body)}
    assert lines[0]["response"]["stdout"] == "1\n"
    assert list(lines[1]["error"]["field_violations"]) == ["language"]
    tests = [{"stdio": {"stdin": "1", "expected_stdout": "1"}}]
    body = {
        "requests": [{"language": "python", "source": source, "tests": tests} for source in ("print(1)", "print(2)")]
    }
    lines = {line["index"]: line for line in await read_lines(fronts, "/v1/judge/batch", body)}
    assert [lines[index]["response"]["verdict"] for index in (0, 1)] == ["accepted", "wrong_answer"]
    empty = await fronts.http.post("/v1/judge/batch", json={"requests": []})
    assert (empty.status_code, empty.json()["error"]["field_violations"][0]["field"]) == (400, "requests")


@pytest.mark.parametrize("language", ["python", "bash"])
async def test_files_environment_and_output_files(fronts: Fronts, language: str) -> None:
    sources = {
        "python": b"import os\nos.mkdir('d')\nopen('d/out', 'wb').write(open('in/x', 'rb').read() * 2)\nprint(os.environ['MINE'])",  # noqa: E501
        "bash": b'mkdir d; cat in/x in/x > d/out; ./run.sh; echo "$MINE"',
    }
    request = pb.ExecuteRequest(
        language=language,
        source=sources[language],
        files=[
            pb.File(path="in/x", content=b"\xff\n"),
            pb.File(path="run.sh", content=b"#!/bin/sh\ntrue\n", executable=True),
        ],
        env={"MINE": "ä b"},
        output_files=["d/out", "d", "absent", "in/x"],
    )
    response = await fronts.grpc.execute(request)
    assert (response.stdout, response.stderr) == ("ä b\n".encode(), b"")
    files = {file.path: file for file in response.files}
    assert list(files) == ["d/out", "d", "absent", "in/x"]
    assert (files["d/out"].content, files["in/x"].content) == (b"\xff\n\xff\n", b"\xff\n")
    assert files["d"].error
    assert files["absent"].error
    body = {"language": language, "source": sources[language].decode(), "env": {"MINE": "x"}, "output_files": ["d/out"]}
    body["files"] = [{"path": "in/x", "content": "y"}, {"path": "run.sh", "content": "#!/bin/sh", "executable": True}]
    reported = (await fronts.http.post("/v1/execute", json=body)).json()
    assert reported["files"] == [{"path": "d/out", "content": "yy", "truncated": False, "error": ""}]


async def test_output_that_is_no_text_is_kept_byte_for_byte(fronts: Fronts) -> None:
    source = "import sys; sys.stdout.buffer.write(bytes(range(256)))"
    response = await fronts.grpc.run(source)
    assert response.stdout == bytes(range(256))
    reported = (await fronts.http.post("/v1/execute", json={"language": "python", "source": source})).json()
    assert base64.b64decode(reported["stdout_base64"]) == bytes(range(256))


async def test_a_key_gives_the_first_response_again(fronts: Fronts) -> None:
    def request(key: str, source: bytes = DRAW) -> pb.ExecuteRequest:
        return pb.ExecuteRequest(language="python", source=source, idempotency_key=key)

    first = await fronts.grpc.execute(request("draw"))
    assert (await fronts.grpc.execute(request("draw"))) == first
    assert (await fronts.grpc.execute(request("another"))).stdout != first.stdout
    together = await asyncio.gather(*(fronts.grpc.execute(request("together")) for _ in range(5)))
    assert len({response.stdout for response in together}) == 1
    with pytest.raises(InvalidArgumentError) as error:
        await fronts.grpc.execute(request("draw", b"print(1)"))
    assert [violation.field for violation in error.value.violations] == ["idempotency_key"]
    body = {"language": "python", "source": DRAW.decode(), "idempotency_key": "draw"}
    assert (await fronts.http.post("/v1/execute", json=body)).json()["stdout"] == first.stdout.decode()
    refused = await fronts.http.post("/v1/execute", json={**body, "source": "print(1)"})
    assert refused.json()["error"]["field_violations"][0]["field"] == "idempotency_key"


async def test_keys_of_submissions_are_their_own(fronts: Fronts) -> None:
    tests = stdio_tests([(b"", b"1")])
    request = pb.JudgeRequest(language="python", source=DRAW, tests=tests, idempotency_key="draw")
    first = await fronts.grpc.judge(request)
    assert first.verdict == pb.TEST_VERDICT_WRONG_ANSWER
    assert (await fronts.grpc.judge(request)).results[0].output == first.results[0].output
    little = pb.Limits(wall_ms=100)
    failing = pb.JudgeRequest(
        language="python",
        source=DRAW,
        tests=tests,
        idempotency_key="failing",
        checker=pb.Checker(program=pb.Program(language="python", source=b"import time; time.sleep(9)", limits=little)),
    )
    outputs = [(await fronts.grpc.judge(failing)).results[0] for _ in range(2)]
    assert {result.verdict for result in outputs} == {pb.TEST_VERDICT_INFRA_ERROR}
    assert outputs[0].output != outputs[1].output
