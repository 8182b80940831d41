"""Messages as JSON and back, and everything that can be wrong with a body."""

import json
import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from google.rpc import code_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.json_codec import (
    MAX_VIOLATIONS,
    dump_json,
    enum_names,
    fill_message,
    parse_json,
    read_message,
    write_message,
)
from perigee.reward.v1 import reward_pb2
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.messages import messages_of

MESSAGES = [
    pb.ExecuteRequest,
    pb.ExecuteResponse,
    pb.ExecuteStreamResponse,
    pb.JudgeRequest,
    pb.JudgeResponse,
    pb.ExecuteBatchResponse,
    pb.RunCellResponse,
    pb.ListRuntimesResponse,
    reward_pb2.ScoreRequest,
    reward_pb2.ScoreResponse,
]


def make_odd_message() -> type[Message]:
    """A message with the kinds of fields that no service has yet."""
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="odd.proto", package="odd", syntax="proto3")
    odd = file.message_type.add(name="Odd")

    def add(name: str, kind: int, repeated: bool = False, type_name: str | None = None) -> None:
        odd.field.add(
            name=name,
            number=len(odd.field) + 1,
            type=kind,  # type: ignore[arg-type]
            label=types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL,
            type_name=type_name,
        )

    def add_map(name: str, key: int, value: int) -> None:
        entry = odd.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, type=key, label=types.LABEL_OPTIONAL)  # type: ignore[arg-type]
        entry.field.add(name="value", number=2, type=value, label=types.LABEL_OPTIONAL)  # type: ignore[arg-type]
        add(name, types.TYPE_MESSAGE, repeated=True, type_name=f".odd.Odd.{entry.name}")

    add("single", types.TYPE_FLOAT)
    add("signed", types.TYPE_SINT64)
    add("fixed", types.TYPE_FIXED64)
    add("small", types.TYPE_SFIXED32)
    add("chunks", types.TYPE_BYTES, repeated=True)
    add("flags", types.TYPE_BOOL, repeated=True)
    add("child", types.TYPE_MESSAGE, type_name=".odd.Odd")
    add_map("blobs", types.TYPE_STRING, types.TYPE_BYTES)
    add_map("counts", types.TYPE_SINT32, types.TYPE_DOUBLE)
    add_map("switches", types.TYPE_BOOL, types.TYPE_STRING)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)  # type: ignore[no-untyped-call]
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("odd.Odd"))


Odd = make_odd_message()


@pytest.mark.parametrize("message_class", [*MESSAGES, Odd])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_message_comes_back_as_it_was(data: st.DataObject, message_class: type[Message]) -> None:
    message = data.draw(messages_of(message_class.DESCRIPTOR))
    assert read_message(message_class, parse_json(dump_json(write_message(message)))) == message


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["tests", "stdio", "source", "x"]), inner),
    )
)
def test_any_value_is_read_or_refused(value: Any) -> None:
    violations: Sequence[FieldViolation] = ()
    message = None
    try:
        message = read_message(pb.JudgeRequest, value)
    except InvalidArgumentError as error:
        violations = error.violations
    assert (message is None) == bool(violations)
    assert all(violation.field.isascii() and violation.description for violation in violations)
    assert message is None or read_message(pb.JudgeRequest, write_message(message)) == message


def test_scalars_are_written_and_unset_parts_are_not() -> None:
    written = write_message(
        pb.TestResult(verdict="TEST_VERDICT_WRONG_ANSWER", output=b"\xff\x00", peak_memory_bytes=2**63)
    )
    assert written == {
        "verdict": "wrong_answer",
        "wall_ms": 0,
        "output_base64": "/wA=",
        "reason": "",
        "name": "",
        "points": 0.0,
        "cpu_ms": 0,
        "peak_memory_bytes": 2**63,
        "exit_code": 0,
        "signal": 0,
        "stderr": "",
        "output_truncated": False,
        "wall_limited": False,
    }
    unset = {"name": "", "group": "", "checker_args": []}
    assert write_message(pb.TestCase()) == unset
    assert write_message(pb.TestCase(points=0.0, code=pb.CodeTest())) == unset | {"points": 0.0, "code": {"code": ""}}
    assert write_message(pb.RunCellRequest())["output_files"] == []


def test_numbers_that_json_lacks_are_named() -> None:
    message = pb.FloatTolerance(absolute=math.inf, relative=math.nan)
    body = dump_json(write_message(message))
    assert json.loads(body) == {"absolute": "Infinity", "relative": "NaN"}
    assert math.isnan(read_message(pb.FloatTolerance, parse_json(body)).relative)


def test_an_enum_is_written_short_and_read_in_any_spelling() -> None:
    assert write_message(pb.ExecuteResponse(status=pb.STATUS_COMPILE_ERROR))["status"] == "compile_error"
    assert write_message(pb.ExecuteResponse(status=99))["status"] == 99  # type: ignore[arg-type]
    for name in ("ok", "OK", "STATUS_OK", "status_ok", 1):
        assert read_message(pb.ExecuteResponse, {"status": name}).status == pb.STATUS_OK
    # Its values do not begin with its name.
    assert enum_names(code_pb2.Code.DESCRIPTOR)[code_pb2.NOT_FOUND] == "not_found"


def test_null_is_a_field_that_is_not_there() -> None:
    request = {"language": "python", "stdin": None, "stdin_base64": "AA==", "limits": None, "args": None}
    assert read_message(pb.ExecuteRequest, request) == pb.ExecuteRequest(language="python", stdin=b"\0")


def test_an_empty_object_is_a_field_that_is_there() -> None:
    assert read_message(pb.TestCase, {"stdio": {}}).WhichOneof("kind") == "stdio"
    assert read_message(pb.ExecuteRequest, {"limits": {"wall_ms": 0}}).limits.HasField("wall_ms")


def test_all_violations_are_listed_with_their_places() -> None:
    body = {
        "langage": "python",
        "source": 5,
        "tests": [{}, {"stdio": {"stdin": "\ud800"}, "function": {"argumentsJson": "[]"}}, 7],
        "limits": {"wall_ms": -1, "cpu_ms": 1.5, "memory_bytes": 2**64, "processes": True, "output_bytes": "1"},
        "files": [{"content": "a", "content_base64": "YQ=="}, {"content_base64": "a b"}],
        "env": {"A": None, "a b": "\udfff", "\ud800": "c"},
        "checker": {"comparison": "exct", "floats": {"absolute": 10**400}},
        "stop_at_first_failure": 1,
        "setup_code": ["x"],
    }
    with pytest.raises(InvalidArgumentError) as caught:
        read_message(pb.JudgeRequest, body)
    assert {violation.field: violation.description for violation in caught.value.violations} == {
        "langage": "unknown key; did you mean language?",
        "source": "must be a string, got a number",
        "tests[1].stdio.stdin": "has a lone surrogate, which no UTF-8 text can hold",
        "tests[1].function": "must not be given beside stdio: only one of them may be set",
        "tests[1].function.argumentsJson": "unknown key; did you mean arguments_json?",
        "tests[2]": "must be an object, got a number",
        "limits.wall_ms": "must be from 0 to 4294967295",
        "limits.cpu_ms": "must be an integer, got a number",
        "limits.memory_bytes": "must be from 0 to 18446744073709551615",
        "limits.processes": "must be an integer, got a boolean",
        "limits.output_bytes": "must be an integer, got a string",
        "files[0].content_base64": "must not be given beside content",
        "files[1].content_base64": "is not base64 (of the standard alphabet, padded)",
        "env.A": "must be a string, got null",
        "env['a b']": "has a lone surrogate, which no UTF-8 text can hold",
        "env['\\ud800']": "has a lone surrogate, which no UTF-8 text can hold",
        "checker.comparison": (
            "'exct' is unknown; known: unspecified, exact, tokens, lines, unordered_lines, unordered_tokens"
        ),
        "checker.floats": "must not be given beside comparison: only one of them may be set",
        "checker.floats.absolute": "is out of a double's range",
        "stop_at_first_failure": "must be true or false, got a number",
        "setup_code": "must be a string, got an array",
    }


def test_keys_of_maps_have_one_spelling() -> None:
    body = {"counts": {"1": 1, "01": 2, "x": 3, "2147483648": 4}, "switches": {"True": "x"}, "single": 1e39}
    with pytest.raises(InvalidArgumentError) as caught:
        read_message(Odd, body)
    assert [violation.field for violation in caught.value.violations] == [
        "counts['01']",
        "counts.x",
        "counts['2147483648']",
        "switches.True",
        "single",
    ]


@pytest.mark.parametrize(
    ("body", "description"),
    [
        (b"\xff", "is not UTF-8: byte 0"),
        (b"", "is not JSON"),
        (b'{"a":1', "is not JSON"),
        (b'{"a":NaN}', "is not JSON: NaN is no JSON number"),
        (b"1" * 5000, "is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        ('{"a":1}'.encode("utf-16"), "is not UTF-8"),
    ],
)
def test_a_body_that_is_no_json_is_named(body: bytes, description: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_json(body)
    [violation] = caught.value.violations
    assert violation.field == "body"
    assert violation.description.startswith(description)


def test_a_body_that_is_no_object_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="body: must be an object, got an array"):
        read_message(pb.ExecuteRequest, [])


def test_a_message_is_filled_at_a_place_and_keeps_what_is_not_said() -> None:
    request = pb.JudgeRequest(language="python", setup_code="import math")
    assert fill_message(request, {"setup_code": "", "limits": {"wall_ms": 5}}, "a.b") == []
    assert request == pb.JudgeRequest(language="python", limits=pb.Limits(wall_ms=5))
    violations = fill_message(request, {"limits": {"wal_ms": 5}, "tests": [1]}, "a.b")
    assert [violation.field for violation in violations] == ["a.b.limits.wal_ms", "a.b.tests[0]"]
    assert fill_message(request, 7, "a.b") == [FieldViolation("a.b", "must be an object, got a number")]


def test_values_that_are_not_from_json_are_read_as_what_they_are() -> None:
    limits = MappingProxyType({"wall_ms": np.float64(5.0)})
    request = MappingProxyType({"language": np.str_("python"), "limits": limits})
    assert read_message(pb.JudgeRequest, request) == pb.JudgeRequest(language="python", limits=pb.Limits(wall_ms=5))
    with pytest.raises(InvalidArgumentError, match=r"limits.wall_ms: must be an integer, got Python's int64"):
        read_message(pb.JudgeRequest, {"limits": {"wall_ms": np.int64(5)}})
    with pytest.raises(InvalidArgumentError, match=r"\['7'\]: unknown key"):
        read_message(pb.JudgeRequest, {7: "x"})


def test_deep_nesting_and_many_violations_end_early() -> None:
    nested: dict[str, Any] = {}
    for _ in range(5000):
        nested = {"child": nested}
    with pytest.raises(InvalidArgumentError, match="nested too deeply"):
        read_message(Odd, nested)
    with pytest.raises(InvalidArgumentError) as caught:
        read_message(Odd, {"flags": ["x"] * 100_000})
    assert len(caught.value.violations) == MAX_VIOLATIONS
