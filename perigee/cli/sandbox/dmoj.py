"""DMOJ problem packages (https://docs.dmoj.ca/#/judge/problem_format): `init.yml` with cases, batches and their
dependencies, an archive, checkers, interactors, generators, validators and signature graders.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from perigee.cli.sandbox.connection import MIB, language_of, read_bytes
from perigee.cli.sandbox.problem import (
    CheckerSection,
    Generation,
    GraderSection,
    GroupSection,
    LimitsSection,
    Problem,
    ProblemSection,
    ProgramSection,
    make_test,
    text_checker,
)
from perigee.config import read_yaml
from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb

INIT_FILE = "init.yml"
_PROTOCOLS = {"default": "exit_code", "testlib": "testlib", "coci": "coci", "peg": "peg"}
_LANGUAGES = {"C": "c", "CPP": "cpp", "PY": "python", "JAVA": "java", "GO": "go", "RUST": "rust", "PYPY": "python"}
_KIB = 1024
# Output of a solution, the most that a sandbox takes unless configured otherwise.
_OUTPUT_BYTES = 16 * MIB
_HELPER_WALL_MS = 20_000
_COMPILE = LimitsSection(wall_ms=60_000, cpu_ms=60_000)
# Names of cases in an archive, where test_cases does not list them.
_INPUT = r"^(?=.*?\.in|in).*?(?:(?:^|\W)(?P<batch>\d+)[^\d\s]+)?(?P<case>\d+)[^\d\s]*$"
_OUTPUT = r"^(?=.*?\.out|out).*?(?:(?:^|\W)(?P<batch>\d+)[^\d\s]+)?(?P<case>\d+)[^\d\s]*$"
_SHIM = Path(__file__).with_name("dmoj_graders.py")
Values = dict[str, Any]


def is_dmoj(folder: Path) -> bool:
    """Returns whether a folder is a package."""
    return (folder / INIT_FILE).is_file()


def load_dmoj(folder: Path) -> Problem:
    """Loads a package; raises InvalidArgumentError naming the file and what is wrong."""
    return _Package(folder).load()


class _Package:
    """Package while it is read: its values, and the archive that its files are in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._values = read_yaml(folder / INIT_FILE)
        self._archive = b""
        if name := self._values.get("archive"):
            self._archive = read_bytes(folder / name)
        self._problem = Problem(folder, ProblemSection(), INIT_FILE, self._archive)
        self._groups: list[GroupSection] = []
        self._generated: dict[str, Generation] = {}
        self._is_interactive = bool(self._values.get("custom_judge") or self._values.get("interactive"))

    def load(self) -> Problem:
        """Returns the problem."""
        values = self._values
        fields: Values = {}
        if custom := values.get("custom_judge"):
            fields["interactor"] = self._python_grader(str(custom), "grader")
        elif interactive := values.get("interactive"):
            fields["interactor"] = self._helper("interactive", interactive, str(interactive.get("type", "default")))
        else:
            fields["checker"] = self._checker(values.get("checker") or "standard")
        if grader := values.get("signature_grader"):
            fields["grader"] = GraderSection(
                entry=grader["entry"], header=grader["header"], allow_main=bool(grader.get("allow_main"))
            )
        validators = [self._helper("validator", each, "exit_code") for each in _list(values.get("validator"))]
        tests = list(self._tests())
        fields["unbuffered"] = bool(values.get("unbuffered"))
        output = int(values.get("output_limit_length", _OUTPUT_BYTES))
        fields["limits"] = LimitsSection(output_mb=max(1, min(output, _OUTPUT_BYTES) // MIB))
        section = ProblemSection(validators=validators, groups=self._groups, **fields)
        return Problem(
            self._folder, section, INIT_FILE, self._archive, tests=tests, generated=self._generated, solutions={}
        )

    def _refuse(self, key: str, description: str) -> InvalidArgumentError:
        return InvalidArgumentError.for_field(f"{self._folder / INIT_FILE}: {key}", description)

    def _helper(self, key: str, values: Any, kind: str = "default") -> ProgramSection:
        """Returns a program that is given by its files and options."""
        options: Values = values if isinstance(values, dict) else {"files": values}
        files = _list(options.get("files") or options.get("source"))
        if not files:
            raise self._refuse(key, "names no files")
        if kind not in _PROTOCOLS and kind != "exit_code":
            raise self._refuse(f"{key}.type", f"{kind} is not known; known are {', '.join(_PROTOCOLS)}")
        main = next((name for name in files if not name.endswith((".h", ".hpp"))), files[0])
        template = options.get("args_format_string")
        return ProgramSection(
            path=main,
            language=self._language(main, str(options.get("lang") or options.get("language") or "")),
            files=[name for name in files if name != main],
            compile_args=[str(flag) for flag in options.get("flags") or []],
            protocol=_PROTOCOLS.get(kind, "exit_code"),
            points_scale="points" if kind == "testlib" else "unspecified",
            compile_limits=_COMPILE,
            limits=_limits(options),
            args=shlex.split(re.sub(r"{(input|output|answer)_file}", r"{\1}", template)) if template else [],
            replace_args=template is not None,
            unbuffered=key == "interactive",
        )

    def _language(self, path: str, name: str) -> str:
        """Returns the runtime of a language's name there, such as CPP17; by the suffix without one."""
        kind = name.rstrip("0123456789").upper()
        if kind in _LANGUAGES:
            return _LANGUAGES[kind]
        return language_of(PurePath(path.rstrip("23")))

    def _python_grader(self, path: str, what: str, options: Mapping[str, Any] | None = None) -> ProgramSection:
        """Returns the program that runs a grader or a checker written for DMOJ's own judge."""
        return ProgramSection(
            path=str(_SHIM),
            language="python",
            files=[path],
            args=[what, Path(path).name, json.dumps(dict(options or {}))],
            points_scale="fraction",
        )

    def _checker(self, checker: Any) -> CheckerSection:
        name, options = (checker, {}) if isinstance(checker, str) else (checker["name"], checker.get("args") or {})
        if name == "bridged":
            kind = str(options.get("type", "default"))
            return CheckerSection(program=self._helper("checker.args", options, kind))
        if "." in name:
            return CheckerSection(program=self._python_grader(name, "checker", options))
        found = _built_in(name, options)
        if found is None:
            raise self._refuse("checker", f"{name} is not known")
        return found

    def _tests(self) -> Iterator[pb.TestCase]:
        """Yields the cases; each batch is a group, and each case where a group or a stop is needed."""
        pretests, cases = self._values.get("pretest_test_cases") or [], self._cases()
        batch, before = 0, list[str]()
        for index, case in enumerate([*pretests, *cases], start=1):
            is_pretest = index <= len(pretests)
            points = 0.0 if is_pretest else float(case.get("points", self._values.get("points", 1)))
            batched = case.get("batched")
            needs = list(before)
            if batched is not None:
                batch += 1
                needs += [f"batch {number}" for number in case.get("dependencies") or []]
            name = f"batch {batch}" if batched is not None else f"case {index}"
            self._groups.append(
                GroupSection(name=name, needs=needs, policy="minimum", points=points, stop_at_first_failure=True)
            )
            if not points:  # a failure here skips all that follows
                before.append(name)
            for number, each in enumerate(batched if batched is not None else [case], start=1):
                merged = {**self._values, **{k: v for k, v in case.items() if k != "batched"}, **each}
                test_name = f"{name}, case {number}" if batched is not None else name
                yield self._test(test_name, merged, points, name)

    def _test(self, name: str, values: Values, points: float, group: str) -> pb.TestCase:
        if values.get("generator") and not values.get("in"):
            self._generate(name, values)
        elif values.get("in") and (values.get("generator_args") or values.get("generator_in")):
            raise self._refuse(name, "has both an input and arguments of a generator")
        binary = bool(values.get("binary_data"))
        contents = [self._read(str(values[key]), key, binary) if values.get(key) else b"" for key in ("in", "out")]
        return make_test(self._is_interactive, name, *contents, points=points, group=group)

    def _generate(self, name: str, values: Values) -> None:
        generator = values["generator"]
        arguments = values.get("generator_args")
        if not arguments and isinstance(generator, dict):
            arguments = generator.get("args")
        stdin = self._read(str(values["generator_in"]), "generator_in", True) if values.get("generator_in") else b""
        self._generated[name] = Generation(
            self._helper("generator", generator),
            tuple(str(each) for each in arguments or ()),
            stdin,
            gives_answer=not values.get("out"),
        )

    def _read(self, name: str, key: str, binary: bool) -> bytes:
        """Reads a file of the package; text ends its lines with a newline alone."""
        content = self._problem.read_file(name, key)
        if binary or not content:
            return content
        text = content.replace(b"\r\n", b"\r").replace(b"\r", b"\n")
        return text if text.endswith(b"\n") else text + b"\n"

    def _cases(self) -> list[Values]:
        cases = self._values.get("test_cases")
        if isinstance(cases, list):
            return cases
        if not self._archive:
            raise self._refuse("test_cases", "must list the cases where there is no archive")
        with zipfile.ZipFile(io.BytesIO(self._archive)) as archive:
            return list(self._match(archive.namelist(), cases or {}))

    def _match(self, names: list[str], formats: Values) -> Iterator[Values]:
        """Yields cases for the files whose names fit."""
        found: dict[Any, dict[Any, Values]] = {}
        batches = set()
        for key, pattern in (
            ("in", formats.get("input_format", _INPUT)),
            ("out", formats.get("output_format", _OUTPUT)),
        ):
            for name in names:
                match = re.match(pattern, name, re.IGNORECASE)
                if match is None:
                    continue
                parts = {part: _integer(text) for part, text in match.groupdict().items() if text is not None}
                if "batch" in parts:
                    batches.add(parts["batch"])
                batch = parts.get("batch", parts.get("case"))
                found.setdefault(batch, {}).setdefault(parts["case"], {})[key] = name
        points = iter(formats.get("case_points") or [])
        for batch in sorted(found, key=lambda each: (isinstance(each, int), each)):
            earned = next(points, self._values.get("points", 1))
            cases = [found[batch][case] for case in sorted(found[batch])]
            if batch in batches:
                yield {"batched": cases, "points": earned}
            else:
                yield {**cases[0], "points": earned}


def _built_in(name: str, options: Values) -> CheckerSection | None:
    """Returns one of the checkers that are part of DMOJ's judge; None for an unknown name."""
    match name:
        case "identical":
            return CheckerSection(comparison="exact")
        case "sorted" if options.get("split_on", "lines") == "whitespace":
            return CheckerSection(comparison="unordered_tokens")
        case "unordered":
            return CheckerSection(comparison="unordered_tokens")
        case "floats" | "floatsabs" | "floatsrel":
            mode = {"floatsabs": "absolute", "floatsrel": "relative"}.get(name, options.get("error_mode", "default"))
            return CheckerSection(
                program=text_checker("floats", str(10 ** -int(options.get("precision", 6))), str(mode))
            )
        case "linematches":
            points = [str(each) for each in options.get("point_distribution", [1])]
            short = [] if options.get("filler_lines_required", True) else ["short"]
            return CheckerSection(program=text_checker("linematches", *points, *short))
        case "rstripped":
            return CheckerSection(program=text_checker(name, *(["filter"] if options.get("filter_new_line") else [])))
        case "standard" | "easy" | "linecount" | "sorted":
            return CheckerSection(program=text_checker(name))
    return None


def _limits(options: Values) -> LimitsSection:
    seconds, kib = options.get("time_limit"), options.get("memory_limit")
    return LimitsSection(
        wall_ms=_HELPER_WALL_MS if seconds is None else round(float(seconds) * 1000),
        cpu_ms=None if seconds is None else round(float(seconds) * 1000),
        memory_mb=None if kib is None else max(16, int(kib) // _KIB),
    )


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _integer(text: str) -> int | str:
    return int(text) if text.isdigit() else text
