"""Checks requests and turns them into jobs; whatever is wrong with a request is reported at once, field by field."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from pathlib import PurePosixPath
from typing import Any, cast

from perigee.errors import FieldViolation, InvalidArgumentError
from perigee.sandbox.compare import Comparison, Tolerance
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent.json_calls import read_signature
from services.sandbox.agent.protocol import Limits
from services.sandbox.agent.submission import FUNCTION_NAME, split_names
from services.sandbox.config import ExtraTimeConfig, LimitsConfig, SandboxConfig
from services.sandbox.languages.catalog import Catalog, Runtime
from services.sandbox.runtime.jobs import Checker, Comparator, Job, Program, Submission, make_tar

LIMIT_FIELDS = ("wall_ms", "cpu_ms", "memory_bytes", "processes", "file_bytes", "output_bytes", "files")
_MINIMUM = {
    "wall_ms": 1,
    "cpu_ms": 1,
    "memory_bytes": 16 << 20,
    "processes": 1,
    "file_bytes": 65536,
    "output_bytes": 1,
    "files": 16,
}
_PATH_BYTES, _NAME_BYTES = 1024, 255
_MOST_VIOLATIONS = 20
_KEY_CHARACTERS = 128
_STRINGS_BYTES = 32768
_MOST_ARCHIVES = 4
_PAGE_BYTES = 4096
_LONGEST_CONTEXT = 100


class Reader:
    """Reads parts of one request and collects their violations."""

    def __init__(self, config: SandboxConfig, catalog: Catalog) -> None:
        self.config = config
        self.catalog = catalog
        self.violations: list[FieldViolation] = []

    def refuse(self, field: str, description: str) -> None:
        """Records a violation."""
        self.violations.append(FieldViolation(field, description))

    def finish(self) -> None:
        """Raises InvalidArgumentError when there are violations."""
        if self.violations:
            shown = self.violations[:_MOST_VIOLATIONS]
            message = "; ".join(f"{violation.field}: {violation.description}" for violation in shown[:5])
            raise InvalidArgumentError(message, violations=shown)

    def read_runtime(self, field: str, language: str) -> Runtime | None:
        """Finds the runtime of a language."""
        runtime = self.catalog.find(language)
        if runtime is None:
            self.refuse(field, self.catalog.explain(language))
        return runtime

    def check_source(self, field: str, source: bytes) -> None:
        """Checks that a source has a bounded size; how it is encoded is between the program and its interpreter."""
        if len(source) > self.config.max_source_bytes:
            self.refuse(field, f"has {len(source)} bytes, at most {self.config.max_source_bytes} are taken")

    def check_utf8(self, field: str, text: bytes) -> None:
        """Checks that text is UTF-8."""
        try:
            text.decode()
        except UnicodeDecodeError as error:
            self.refuse(field, f"is not UTF-8: byte {error.start} is {text[error.start]:#04x}")

    def check_size(self, field: str, content: bytes) -> None:
        """Checks that an input is no larger than the largest file."""
        if len(content) > self.config.max_file_bytes:
            self.refuse(field, f"has {len(content)} bytes, at most {self.config.max_file_bytes} are taken")

    def check_text(self, field: str, text: str) -> None:
        """Checks that text has no NUL, which would end an argument or a variable in a system call."""
        if "\0" in text:
            self.refuse(field, "must not contain NUL")

    def check_enum(self, field: str, value: int, known: Collection[int]) -> None:
        """Checks that a number is one of the contract's."""
        if value not in known:
            self.refuse(field, f"{value} is unknown")

    def check_there(self, field: str, source: bytes) -> None:
        """Checks that what judges a submission is there at all."""
        if not source:
            self.refuse(field, "must not be empty")

    def check_space(self, prefix: str, source: bytes, files: Sequence[pb.File], limits: Limits) -> None:
        """Checks that source and files fit into the working folder."""
        sizes = [len(source), *(len(file.content) for file in files)]
        needed = sum(-(-size // _PAGE_BYTES) * _PAGE_BYTES for size in sizes)
        field = f"{prefix}files" if files else f"{prefix}source"
        if needed > max(limits.file_bytes, _MINIMUM["file_bytes"]):
            self.refuse(field, f"takes {needed} bytes: raise {prefix}limits.file_bytes, which is {limits.file_bytes}")
        folders = {parent for file in files for parent in PurePosixPath(file.path).parents if parent.parts}
        if 1 + len(files) + len(folders) > max(limits.files, _MINIMUM["files"]):
            counted = f"has {len(files)} files in {len(folders)} folders"
            self.refuse(field, f"{counted}: raise {prefix}limits.files, which is {limits.files}")

    def read_files(self, field: str, files: Iterable[pb.File], taken: str | None) -> list[pb.File]:
        """Reads files of the working folder; `taken` is the name of the source."""
        read = list(files)
        seen = {taken}
        total = 0
        for index, file in enumerate(read):
            problem = find_path_problem(file.path)
            if problem is None and file.path in seen:
                problem = f"{file.path!r} is there twice" if file.path != taken else "is the name of the source"
            if problem is not None:
                self.refuse(f"{field}[{index}].path", problem)
            seen.add(file.path)
            content = file.content  # a copy, each time that it is asked for
            total += len(content)
            self.check_size(f"{field}[{index}].content", content)
        folders = {str(parent) for file in read for parent in PurePosixPath(file.path).parents}
        for index, entry in enumerate(read):
            if entry.path in folders and entry.path != ".":
                self.refuse(f"{field}[{index}].path", f"{entry.path!r} is the folder of another file")
        if taken in folders:
            self.refuse(field, f"{taken!r} is the name of the source, and cannot be a folder")
        if len(read) > self.config.max_files:
            self.refuse(field, f"has {len(read)} files, at most {self.config.max_files} are taken")
        if total > self.config.max_file_bytes:
            self.refuse(field, f"has {total} bytes in all, at most {self.config.max_file_bytes} are taken")
        return read

    def check_archives(self, field: str, archives: Sequence[pb.Archive], in_cell: bool = False) -> None:
        """Checks the folders and sizes of archives; their entries are checked as they are unpacked."""
        if len(archives) > _MOST_ARCHIVES:
            self.refuse(field, f"has {len(archives)} archives, at most {_MOST_ARCHIVES} are taken")
        total = sum(len(archive.content) for archive in archives)
        if total > self.config.max_file_bytes:
            self.refuse(field, f"has {total} bytes in all, at most {self.config.max_file_bytes} are taken")
        for index, archive in enumerate(archives):
            if archive.folder and (problem := find_path_problem(archive.folder)) is not None:
                self.refuse(f"{field}[{index}].folder", problem)
            if archive.file and not in_cell:
                self.refuse(f"{field}[{index}].file", "is for cells of a session; give content")
            elif archive.file and (problem := find_path_problem(archive.file)) is not None:
                self.refuse(f"{field}[{index}].file", problem)
            elif bool(archive.file) == bool(archive.content):
                self.refuse(f"{field}[{index}]", "must have content" + (" or name a file" if in_cell else ""))

    def check_paths(self, field: str, paths: Iterable[str]) -> None:
        """Checks the paths of output files, as those of input files."""
        listed = list(paths)
        for index, path in enumerate(listed):
            if (problem := find_path_problem(path)) is not None:
                self.refuse(f"{field}[{index}]", problem)
        if len(listed) > self.config.max_files:
            self.refuse(field, f"names {len(listed)} files, at most {self.config.max_files} are returned")

    def check_arguments(self, field: str, arguments: Sequence[str]) -> None:
        """Checks that arguments are valid for execve, and together small enough for a request to the agent."""
        for index, argument in enumerate(arguments):
            self.check_text(f"{field}[{index}]", argument)
        total = sum(len(argument.encode()) + 1 for argument in arguments)
        if total > _STRINGS_BYTES:
            self.refuse(field, f"has {total} bytes in all, at most {_STRINGS_BYTES} are taken")

    def check_environment(self, field: str, environment: Mapping[str, str]) -> None:
        """Checks that variables are valid for execve, and together small enough for a request to the agent."""
        total = sum(len(name.encode()) + len(value.encode()) + 2 for name, value in environment.items())
        if total > _STRINGS_BYTES:
            self.refuse(field, f"has {total} bytes in all, at most {_STRINGS_BYTES} are taken")
        for name, value in environment.items():
            if not name or "=" in name or "\0" in name:
                self.refuse(field, f"{name!r} is no name of a variable")
            self.check_text(f"{field}[{name!r}]", value)

    def check_key(self, key: str) -> None:
        """Checks the length of an idempotency key."""
        if len(key) > _KEY_CHARACTERS:
            self.refuse("idempotency_key", f"has {len(key)} characters, at most {_KEY_CHARACTERS} are taken")

    def read_limits(self, field: str, limits: pb.Limits, defaults: LimitsConfig) -> Limits:
        """Reads limits, completed by the defaults and bounded by the service's maximum."""
        values = {}
        for name in LIMIT_FIELDS:
            maximum = getattr(self.config.maximum_limits, name)
            if not limits.HasField(cast(Any, name)):
                values[name] = min(getattr(defaults, name), maximum)
                continue
            value = getattr(limits, name)
            if value > maximum:
                self.refuse(f"{field}.{name}", f"is {value}, at most {maximum} is allowed")
            elif value < _MINIMUM[name]:
                self.refuse(f"{field}.{name}", f"is {value}, at least {_MINIMUM[name]} is needed")
            values[name] = value
        return Limits(**values)

    def read_program(
        self,
        request: pb.ExecuteRequest | pb.JudgeRequest | pb.Program,
        compile_limits: pb.Limits,
        environment: Mapping[str, str],
        prefix: str = "",
    ) -> Program | None:
        """Reads the program of a request, or of a checker in it; None when its language is wrong."""
        runtime = self.read_runtime(f"{prefix}language", request.language)
        if runtime is not None:
            runtime = runtime.for_source(request.source)
        command = list(request.command) if isinstance(request, pb.ExecuteRequest) else []
        if not command:
            self.check_source(f"{prefix}source", request.source)
        elif request.source:
            self.refuse("source", "must be empty where a command is given")
        self.check_arguments("command", command)
        self.check_environment(f"{prefix}env", environment)
        files = self.read_files(f"{prefix}files", request.files, runtime.config.source if runtime else None)
        defaults = runtime.limits if runtime else self.config.default_limits
        limits = self.read_limits(f"{prefix}limits", request.limits, defaults)
        self.check_space(prefix, request.source, files, limits)
        compiler = runtime.compile_limits if runtime else self.config.compile_limits
        own_compile_limits = self.read_limits(f"{prefix}compile_limits", compile_limits, compiler)
        self.check_arguments(f"{prefix}compile_args", request.compile_args)
        if request.compile_args and runtime is not None and not runtime.config.compile:
            self.refuse(f"{prefix}compile_args", f"must be empty: {runtime.name} is not compiled")
        if runtime is None:
            return None
        arguments = tuple(request.compile_args)
        program = Program(
            runtime, request.source, limits, own_compile_limits, files, dict(environment), compile_arguments=arguments
        )
        if isinstance(request, pb.Program):
            return program
        self.check_archives("archives", request.archives)
        program = dataclasses.replace(
            program, archives=list(request.archives), loopback=request.loopback or runtime.config.loopback
        )
        if not command and runtime.python is not None and runtime.config.run:
            command = runtime.command(runtime.config.run, limits.memory_bytes)
            files.append(pb.File(path=runtime.config.source, content=request.source))
        if not command:
            return program
        placed = [pb.Archive(content=make_tar(files))] if files else []
        return dataclasses.replace(program, command=tuple(command), files=(), archives=[*program.archives, *placed])


def find_path_problem(path: str) -> str | None:
    """Returns why a path is not one below the working folder; None when it is."""
    if not path:
        return "must not be empty"
    if "\0" in path:
        return "must not contain NUL"
    pure = PurePosixPath(path)
    if pure.is_absolute():
        return f"{path[:80]!r} is absolute; name it relative to the working folder"
    if ".." in pure.parts:
        return f"{path[:80]!r} leaves the working folder"
    if not pure.parts:
        return "is the working folder itself"
    if str(pure) != path:
        return f"{path[:80]!r} is not in its shortest form, {str(pure)[:80]!r}"
    if len(path.encode(errors="surrogateescape")) > _PATH_BYTES:
        return f"has more than {_PATH_BYTES} bytes"
    if any(len(part.encode(errors="surrogateescape")) > _NAME_BYTES for part in pure.parts):
        return f"has a name of more than {_NAME_BYTES} bytes"
    return None


def read_job(request: pb.ExecuteRequest, config: SandboxConfig, catalog: Catalog) -> Job:
    """Reads an Execute request; raises InvalidArgumentError."""
    reader = Reader(config, catalog)
    program = reader.read_program(request, request.compile_limits, request.env)
    reader.check_arguments("args", request.args)
    reader.check_size("stdin", request.stdin)
    reader.check_paths("output_files", request.output_files)
    reader.check_paths("output_folders", [path for path in request.output_folders if path != "."])
    reader.check_key(request.idempotency_key)
    reader.finish()
    assert program is not None
    return Job(program, request)


def read_json(reader: Reader, text: str, field: str) -> object:
    """Reads a JSON value; returns an empty list for anything else, so that the field is reported once."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reader.refuse(field, f"is not JSON: {error}")
        return []


_PATIENCE_MS = 5000
"""Time that an interactor has beyond that of the submission."""
_MOST_PASSES = 100
_COMPARISONS = {
    pb.COMPARISON_UNSPECIFIED: Comparison.TOKENS,
    pb.COMPARISON_EXACT: Comparison.EXACT,
    pb.COMPARISON_TOKENS: Comparison.TOKENS,
    pb.COMPARISON_LINES: Comparison.LINES,
    pb.COMPARISON_UNORDERED_LINES: Comparison.UNORDERED_LINES,
    pb.COMPARISON_UNORDERED_TOKENS: Comparison.UNORDERED_TOKENS,
}


def read_submission(request: pb.JudgeRequest, config: SandboxConfig, catalog: Catalog) -> Submission:
    """Reads a Judge request; raises InvalidArgumentError."""
    reader = Reader(config, catalog)
    program = reader.read_program(request, request.compile_limits, request.env)
    expected = read_tests(reader, request)
    for index, test in enumerate(request.tests):
        if not 0 <= test.points < math.inf:
            reader.refuse(f"tests[{index}].points", f"must be a number of at least 0, got {test.points}")
    comparator, checker = read_checker(reader, request.checker)
    check_groups(reader, request)
    if request.HasField("passes") and not 1 <= request.passes <= _MOST_PASSES:
        reader.refuse("passes", f"is {request.passes}, must be from 1 to {_MOST_PASSES}")
    if program is not None:
        program = dataclasses.replace(program, limits=read_extra_time(reader, request, program))
    interactor = None
    if request.HasField("interactor"):
        interactor = read_judging_program(reader, request.interactor, "interactor.")
    kind = find_kind(reader, request)
    if kind == "interactive" and not request.HasField("interactor"):
        reader.refuse("interactor", "is required by interactive tests")
    if kind != "interactive" and request.HasField("interactor"):
        reader.refuse("interactor", "must be empty where no test is interactive")
    if program is not None and kind in ("function", "code") and program.runtime.python is None:
        reader.refuse("language", f"{program.runtime.name} has no {kind} tests; give stdio tests")
    reader.check_key(request.idempotency_key)
    reader.finish()
    assert program is not None
    return Submission(
        program=program,
        request=request,
        comparator=comparator,
        expected=expected,
        checker=None if checker is None else extend_space(checker, request, program.limits.output_bytes),
        interactor=None if interactor is None else extend_interactor(interactor, request, program.limits),
    )


def find_kind(reader: Reader, request: pb.JudgeRequest) -> str | None:
    """Returns the kind of all tests; None when they differ, which `read_tests` reports."""
    kinds = {test.WhichOneof("kind") for test in request.tests}
    return next(iter(kinds)) if len(kinds) == 1 else None


def read_tests(reader: Reader, request: pb.JudgeRequest) -> list[object]:
    """Checks the tests, all of one kind; returns the values that function tests expect."""
    kinds = {test.WhichOneof("kind") for test in request.tests}
    if not request.tests:
        reader.refuse("tests", "must not be empty")
    elif len(request.tests) > reader.config.max_tests:
        most = reader.config.max_tests
        reader.refuse("tests", f"has {len(request.tests)} tests, at most {most} are judged at once")
    elif None in kinds:
        reader.refuse("tests", "each must have stdio, function, code or interactive set")
    elif len(kinds) > 1:
        reader.refuse("tests", f"must all be of one kind, got {' and '.join(sorted(map(str, kinds)))} tests")
    elif kinds & {"function", "code"} and not all(map(FUNCTION_NAME.fullmatch, split_names(request.function_name))):
        reader.refuse("function_name", f"must be the name of a function, got {request.function_name!r}")
    elif not kinds & {"function", "code"} and request.function_name:
        reader.refuse("function_name", f"must be empty for {next(iter(kinds))} tests")
    elif kinds == {"function"} and "," in request.function_name:
        reader.refuse("function_name", "must be one name for function tests")
    if request.function_signature:
        check_signature(reader, request, kinds)
    if len(kinds) != 1:
        return []
    return [check_test(reader, f"tests[{index}]", test) for index, test in enumerate(request.tests)]


def check_signature(reader: Reader, request: pb.JudgeRequest, kinds: Collection[str | None]) -> None:
    """Checks the signature of the function of function tests."""
    if kinds != {"function"}:
        reader.refuse("function_signature", "must be empty where no test is a function test")
    try:
        read_signature(request.function_signature)
    except ValueError as error:
        reader.refuse("function_signature", str(error))


def check_test(reader: Reader, field: str, test: pb.TestCase) -> object:
    """Checks one test; returns the value that a function test expects, None for other kinds."""
    match test.WhichOneof("kind"):
        case "function":
            arguments = read_json(reader, test.function.arguments_json, f"{field}.function.arguments_json")
            if not isinstance(arguments, list):
                reader.refuse(f"{field}.function.arguments_json", "must be a JSON array of arguments")
            return read_json(reader, test.function.expected_json, f"{field}.function.expected_json")
        case "code":
            reader.check_source(f"{field}.code.code", test.code.code.encode())
            reader.check_there(f"{field}.code.code", test.code.code.encode())
        case "interactive":
            reader.check_size(f"{field}.interactive.input", test.interactive.input)
            reader.check_size(f"{field}.interactive.answer", test.interactive.answer)
        case "stdio":
            reader.check_size(f"{field}.stdio.stdin", test.stdio.stdin)
            reader.check_size(f"{field}.stdio.expected_stdout", test.stdio.expected_stdout)
            reader.check_arguments(f"{field}.stdio.args", test.stdio.args)
    return None


def read_judging_program(reader: Reader, program: pb.Program, prefix: str) -> Checker | None:
    """Reads a checker or an interactor; None when its language is wrong."""
    read = reader.read_program(program, program.compile_limits, {}, prefix)
    reader.check_there(f"{prefix}source", program.source)
    reader.check_arguments(f"{prefix}args", program.args)
    reader.check_enum(f"{prefix}protocol", program.protocol, pb.CheckerProtocol.values())
    reader.check_enum(f"{prefix}points_scale", program.points_scale, pb.PointsScale.values())
    if read is None:
        return None
    return Checker(read, program.protocol, program.points_scale, tuple(program.args), program.replace_args)


def check_groups(reader: Reader, request: pb.JudgeRequest) -> None:
    """Checks the groups: their names, that tests name them, and that what they need comes before them."""
    seen: set[str] = set()
    named = {test.group for test in request.tests}
    for index, group in enumerate(request.groups):
        if not group.name or group.name in seen:
            reader.refuse(f"groups[{index}].name", "is there twice" if group.name else "must not be empty")
        for needed in set(group.needs) - seen:
            reader.refuse(f"groups[{index}].needs", f"{needed!r} is no group before this one")
        reader.check_enum(f"groups[{index}].policy", group.policy, pb.GroupPolicy.values())
        if group.name not in named:
            reader.refuse(f"groups[{index}]", f"no test names the group {group.name!r}")
        if not 0 <= group.points < math.inf:
            reader.refuse(f"groups[{index}].points", f"must be a number of at least 0, got {group.points}")
        seen.add(group.name)
    needs = {group.name: set(group.needs) for group in request.groups}
    blocked: set[str] = set()
    for index, test in enumerate(request.tests):
        if test.group and test.group not in seen:
            reader.refuse(f"tests[{index}].group", f"{test.group!r} is none of the groups")
        elif test.group in blocked:
            reader.refuse(f"tests[{index}].group", f"must come before the tests of a group that needs {test.group!r}")
        reader.check_arguments(f"tests[{index}].checker_args", test.checker_args)
        blocked |= needs.get(test.group, set())


def read_checker(reader: Reader, checker: pb.Checker) -> tuple[Comparator, Checker | None]:
    """Reads the comparator of outputs, and the caller's own checker."""
    match checker.WhichOneof("kind"):
        case "comparison":
            if checker.comparison not in _COMPARISONS:
                reader.refuse("checker.comparison", f"{checker.comparison} is unknown")
            return _COMPARISONS.get(checker.comparison, Comparison.TOKENS), None
        case "floats":
            values = {name: getattr(checker.floats, name) for name in ("absolute", "relative")}
            wrong = {name: value for name, value in values.items() if not 0 <= value < math.inf}
            for name, value in wrong.items():
                reader.refuse(f"checker.floats.{name}", f"must be a number of at least 0, got {value}")
            return Tolerance() if wrong else Tolerance(**values), None
        case "program":
            return Comparison.TOKENS, read_judging_program(reader, checker.program, "checker.program.")
    return Comparison.TOKENS, None


def read_extra_time(reader: Reader, request: pb.JudgeRequest, program: Program) -> Limits:
    """Returns the limits of a submission with the extra time of its language, the request's or else the service's."""
    found: ExtraTimeConfig | None = None
    for name, extra in request.extra_time.items():
        factor = extra.factor if extra.HasField("factor") else 1.0
        runtime = reader.catalog.find(name)
        if runtime is None:
            reader.refuse(f"extra_time[{name!r}]", reader.catalog.explain(name))
        elif not 1 <= factor < math.inf:
            reader.refuse(f"extra_time[{name!r}].factor", f"must be a number of at least 1, got {factor}")
        elif runtime.name == program.runtime.name:
            found = ExtraTimeConfig(factor=factor, added_ms=extra.added_ms)
    for name, own in reader.config.extra_time.items():
        runtime = reader.catalog.find(name)
        if found is None and runtime is not None and runtime.name == program.runtime.name:
            found = own
    if found is None:
        return program.limits
    times = {}
    for name in ("wall_ms", "cpu_ms"):
        extended = getattr(program.limits, name) * found.factor + found.added_ms
        maximum = getattr(reader.config.maximum_limits, name)
        if extended > maximum:
            reader.refuse(f"limits.{name}", f"is {extended:.0f} with extra time, at most {maximum} is allowed")
        times[name] = math.ceil(min(extended, maximum))
    return dataclasses.replace(program.limits, **times)


def extend_space(judging: Checker, request: pb.JudgeRequest, output_bytes: int) -> Checker:
    """Gives a checker or an interactor space for the files of the largest test, and for what a submission may print."""
    program = judging.program
    own_bytes = sum(len(file.content) + _PAGE_BYTES for file in program.files) + len(program.source)
    most = own_bytes + output_bytes + max(test.ByteSize() for test in request.tests) + 8 * _PAGE_BYTES
    limits = dataclasses.replace(program.limits, file_bytes=max(program.limits.file_bytes, most))
    return dataclasses.replace(judging, program=dataclasses.replace(program, limits=limits))


def extend_interactor(interactor: Checker, request: pb.JudgeRequest, limits: Limits) -> Checker:
    """Raises the wall-clock limit of an interactor, which waits for its submission, and its space."""
    program = extend_space(interactor, request, limits.output_bytes).program
    longest = max(program.limits.wall_ms, limits.wall_ms + _PATIENCE_MS)
    program = dataclasses.replace(program, limits=dataclasses.replace(program.limits, wall_ms=longest))
    return dataclasses.replace(interactor, program=program)


def check_batch(requests: Sized, config: SandboxConfig) -> None:
    """Raises InvalidArgumentError for an empty or too large batch."""
    if not len(requests):
        raise InvalidArgumentError.for_field("requests", "must not be empty")
    if len(requests) > config.max_batch:
        raise InvalidArgumentError.for_field(
            "requests", f"has {len(requests)} items, at most {config.max_batch} are taken"
        )


def check_test_run(reader: Reader, field: str, tests: pb.TestRun) -> None:
    """Checks a run of a repository's tests."""
    if tests.framework not in pb.TestFramework.values()[1:]:
        reader.refuse(f"{field}.framework", "is required")
    if tests.framework == pb.TEST_FRAMEWORK_JUNIT and not tests.command:
        reader.refuse(f"{field}.command", "is required, since JUnit has no command of its own")
    if tests.report and not tests.command:
        reader.refuse(f"{field}.report", "is for a command of the request's own")
    if tests.report and (problem := find_path_problem(tests.report)) is not None:
        reader.refuse(f"{field}.report", problem)
    reader.check_arguments(f"{field}.command", [*tests.command, *tests.targets])
    for index, target in enumerate(tests.targets):
        if not tests.command and target.startswith("-"):
            reader.refuse(f"{field}.targets[{index}]", "is an option; give a command of your own for these")


def read_session(request: pb.CreateSessionRequest, config: SandboxConfig, catalog: Catalog) -> tuple[Program, int]:
    """Reads the interpreter of a session and its idle time; raises InvalidArgumentError."""
    reader = Reader(config, catalog)
    runtime = reader.read_runtime("language", request.language)
    if runtime is not None and runtime.python is None:
        reader.refuse("language", f"{runtime.name} has no sessions")
    files = reader.read_files("files", request.files, None)
    reader.check_archives("archives", request.archives)
    reader.check_environment("env", request.env)
    limits = reader.read_limits("limits", request.limits, runtime.limits if runtime else config.default_limits)
    reader.check_space("", b"", files, limits)
    idle_s = request.idle_seconds if request.HasField("idle_seconds") else config.session_idle_seconds
    if not 1 <= idle_s <= config.session_maximum_idle_seconds:
        reader.refuse("idle_seconds", f"is {idle_s}, must be from 1 to {config.session_maximum_idle_seconds}")
    reader.finish()
    assert runtime is not None
    loopback = request.loopback or runtime.config.loopback
    archives = list(request.archives)
    return Program(runtime, b"", limits, limits, files, dict(request.env), archives, loopback), idle_s


def check_cell(request: pb.RunCellRequest, config: SandboxConfig, catalog: Catalog) -> None:
    """Checks a cell; raises InvalidArgumentError."""
    reader = Reader(config, catalog)
    if not request.session_id:
        reader.refuse("session_id", "is required")
    if request.HasField("tests"):
        check_test_run(reader, "tests", request.tests)
        if request.code:
            reader.refuse("code", "must be empty in a cell with tests")
    elif request.code or not (request.files or request.archives):
        reader.check_source("code", request.code)
        reader.check_utf8("code", request.code)
    reader.read_files("files", request.files, None)
    reader.check_archives("archives", request.archives, in_cell=True)
    reader.check_paths("output_files", request.output_files)
    reader.check_paths("output_folders", [path for path in request.output_folders if path != "."])
    reader.check_environment("env", request.env)
    if len(request.context) > _LONGEST_CONTEXT:
        reader.refuse("context", f"may have {_LONGEST_CONTEXT} characters")
    if request.HasField("wall_ms") and not 1 <= request.wall_ms <= config.maximum_limits.wall_ms:
        reader.refuse("wall_ms", f"is {request.wall_ms}, must be from 1 to {config.maximum_limits.wall_ms}")
    reader.finish()
