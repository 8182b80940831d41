"""Rules on the code as a whole: who imports whom, how deep and how long, and which words are used."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import GROUPS
from tools.measure_code import Module, find_circles, import_graph, longest_chain, read_modules

ROOT = Path(__file__).parents[2]
SERVICES = sorted(path.parent.name for path in (ROOT / "services").glob("*/__init__.py"))
LONGEST_FILE = 700
DEEPEST_IMPORT = 9


@cache
def modules_of(folder: str) -> dict[str, Module]:
    """The hand-written modules below a folder, by name."""
    top, _, rest = folder.partition("/")
    if not rest:
        return read_modules(ROOT, top)
    return {name: module for name, module in modules_of(top).items() if f"{name}.".startswith(f"{top}.{rest}.")}


def describe_imports(modules: Iterable[Module], forbidden: str) -> list[str]:
    """The imports whose names match a pattern."""
    return [
        f"{module.path.relative_to(ROOT)} imports {name}"
        for module in modules
        for name in module.imports
        if re.match(forbidden, name)
    ]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_no_other_service(service: str) -> None:
    allowed = {service, "kit"} | ({"weights"} if service in {"trainer", "rollout"} else set())
    others = rf"services\.(?!({'|'.join(allowed)})\b)"
    assert describe_imports(modules_of(f"services/{service}").values(), others) == []


def test_clients_need_no_service() -> None:
    clients = [module for name, module in modules_of("perigee").items() if not name.startswith("perigee.cli.")]
    assert describe_imports(clients, r"services\b") == []


@pytest.mark.parametrize("service", [name for name in SERVICES if name != "kit"])
def test_domain_modules_know_no_grpc(service: str) -> None:
    """Only what starts a service and what translates its messages may; `perigee.rpc` is for the others."""
    domain = [m for m in modules_of(f"services/{service}").values() if m.path.name not in ("__main__.py", "service.py")]
    assert describe_imports(domain, r"grpc(\.|$)") == []


@pytest.mark.parametrize("folder", ["services", "perigee"])
def test_no_modules_import_one_another(folder: str) -> None:
    assert find_circles(import_graph(modules_of(folder))) == []


@pytest.mark.parametrize("service", SERVICES)
def test_imports_of_a_service_are_shallow(service: str) -> None:
    chain = longest_chain(import_graph(modules_of(f"services/{service}")))
    assert len(chain) <= DEEPEST_IMPORT, " -> ".join(chain)


def test_files_stay_below_the_length_at_which_they_tell_two_stories() -> None:
    long = {}
    for folder in ("perigee", "services", "tests", "bench", "examples", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            if lines > LONGEST_FILE and not path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
                long[str(path.relative_to(ROOT))] = lines
    assert long == {}


class Retired(NamedTuple):
    """Words that have a successor; `^` stands for the beginning of a name, `$` for its end."""

    words: str
    successor: str
    where: str = ""
    """Pattern of the paths where the words are retired; everywhere if empty."""


SANDBOX = r"services/sandbox|perigee/(cli/)?sandbox|protos/perigee/sandbox|tests/.*sandbox|bench/sandbox"
REWARD = r"services/reward|perigee/reward|protos/perigee/reward|tests/.*reward"
COORDINATOR = r"services/coordinator|perigee/coordinator|protos/perigee/coordinator|tests/.*coordinator"
TRAINER = r"services/trainer|perigee/trainer|protos/perigee/trainer|tests/.*trainer"
RETIRED = [
    Retired("attendant", "HelperProcess"),
    Retired("attendants", "HelperProcess"),
    Retired("keeper", "JobSupervisor, or WeightSync"),
    Retired("opener", "SandboxFactory", r"services/sandbox"),
    Retired("place", "WorkerSlot", SANDBOX),
    Retired("places", "WorkerSlot", SANDBOX),
    Retired("order", "RunRequest", r"services/sandbox"),
    Retired("orders", "RunRequest", r"services/sandbox"),
    Retired("parcel", "Archive"),
    Retired("lay down", "unpack"),
    Retired("tidy", "cleanup"),
    Retired("waiting line", "job queue"),
    Retired("turn", "lease", r"services/sandbox"),
    Retired("overtaking", "priority window"),
    Retired("chassis", "service framework"),
    Retired("walls", "isolation"),
    Retired("house rules", "architecture"),
    Retired("^once$", "IdempotencyCache", r"services"),
    Retired("^gate$", "middleware", r"services/(kit|sandbox)"),
    Retired("foreign api", "CompatRouter"),
    Retired("worth", "TestWeight", r"services|perigee"),
    Retired("^how$", "Comparator", r"services/sandbox"),
    Retired("^share$", "fraction", SANDBOX),
    Retired("stake", "Durability"),
    Retired("told(?! apart)", "Cursor, report or receive"),
    Retired("watching", "event stream"),
    Retired("fan out", "Dispatcher"),
    Retired("trajectory dispatch", "RolloutPhase"),
    Retired("hold version", "ensure_version"),
    Retired("^held$", "LoadedPolicy", r"services/(rollout|coordinator)"),
    Retired("distrust", "invalidate"),
    Retired("status board", "RunStatus"),
    Retired("iteration facts", "rollout_metrics"),
    Retired("^settle", "finish"),
    Retired("^tell", "report"),
    Retired("^hear", "receive"),
    Retired("let go", "release"),
    Retired("panel", "registry", REWARD),
    Retired("lane", "WorkerSlot", REWARD),
    Retired("aside", "slow, or staging"),
    Retired("rubbish", "malformed response"),
    Retired("outcome book", "OutcomeStore"),
    Retired("inquiry", "SampleRequest"),
    Retired("workshop", "GenerationContext"),
    Retired("lay out", "pack_layout, or ParallelDims"),
    Retired("^layout$", "ParallelDims", TRAINER),
    Retired("^control$", "ObjectChannel", TRAINER),
    Retired("^moment$", "baseline, periodic or final", COORDINATOR),
    Retired("^answers?$", "generate", r"services/rollout"),
    Retired("final share", "min_lr_ratio"),
    Retired("clip grad", "max_grad_norm"),
    Retired("^response cap$", "max_response_tokens", r"services/coordinator/\w*config"),
    Retired("importance cap", "tis_cap"),
    Retired("policy shift", "policy_kl"),
    Retired("max logprob difference", "train_infer_logprob_diff"),
    Retired("share repeated", "repetition_rate"),
]


def words_of(name: str) -> str:
    """`aNameLike_this` as `a name like this`."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return " ".join(word for word in apart.lower().split("_") if word)


def names_in_python(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of what a module defines: classes, functions, parameters, variables and attributes.

    Tests are left out: their names are sentences.
    """
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                if not name.startswith("test_"):
                    yield node.lineno, name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name


def names_in_proto(text: str) -> Iterator[tuple[int, str]]:
    """Line and name of messages, enums, calls, fields and enum values."""
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*(?:message|enum|service|rpc|oneof)\s+(\w+)|\s*[\w.<>, ]*?(\w+) = \d+[;\s]", line):
            yield number, match[1] or match[2]


def names_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of what a file defines, its own name first."""
    yield 0, path.stem
    if path.suffix == ".py":
        yield from names_in_python(ast.parse(path.read_text()))
    elif path.suffix == ".proto":
        yield from names_in_proto(path.read_text())


def find_retired(path: Path) -> Iterator[str]:
    """A line for each name in the file that holds retired words."""
    shown = str(path.relative_to(ROOT))
    rules = [
        (re.compile(re.sub(r"^(?!\^)|(?<!\$)$", r"\\b", rule.words)), rule)
        for rule in RETIRED
        if re.match(rule.where, shown)
    ]
    for line, name in names_of(path):
        words = words_of(name)
        yield from (f"{shown}:{line}: {name}: say {rule.successor}" for pattern, rule in rules if pattern.search(words))


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository that git knows; all of a copy without git."""
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    found = [ROOT / line for line in listed] or [path for pattern in patterns for path in ROOT.rglob(pattern)]
    return [path for path in found if path.is_file() and "_pb2" not in path.name and ".venv" not in path.parts]


AREAS = ["services/" + name for name in SERVICES] + ["perigee", "protos", "tests", "bench", "examples", "tools"]


@pytest.mark.parametrize("area", AREAS)
def test_retired_words_are_not_used(area: str) -> None:
    files = [path for path in tracked("*.py", "*.proto", "*.lua") if path.is_relative_to(ROOT / area)]
    assert [finding for path in files for finding in find_retired(path)] == []


def test_retired_words_are_found_in_names_only() -> None:
    assert words_of("HTTPServer_laidOut2") == "http server laid out2"
    assert list(names_in_proto("message Parcel {\n  repeated string fan_out = 1;\n  // told = 2;\n}")) == [
        (1, "Parcel"),
        (2, "fan_out"),
    ]
    tree = ast.parse("def tell(a): self.b = told(c)")
    assert [name for _, name in names_in_python(tree)] == ["tell", "a", "b"]


def test_groups_of_tests_name_files_that_exist() -> None:
    stems = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert {stem for stems_of_group in GROUPS.values() for stem in stems_of_group} <= stems


def test_no_file_names_a_path_of_one_machine() -> None:
    homes = re.compile(
        r"(?<![\w.])/(?:work|home(?!/user\b)|Users|mnt|data)/\w+"
    )  # E2B means /home/user by it everywhere
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in tracked("*.py", "*.md", "*.sh", "*.yaml", "*.toml", "*.proto", "*.lua", "Makefile")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := homes.search(line))
    ]
    assert found == []
