"""Loads the fixtures of every part, spreads tests over worker processes, and lists the tools that were not there.

Under `pytest -n 4` a worker takes a group of tests at a time: those of one file, or of the files that share a service
which is slow to start. No test measures time or has the machine to itself.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import structlog

pytest_plugins = [
    f"tests.fixtures.{path.stem}"
    for path in sorted((Path(__file__).parent / "fixtures").glob("*.py"))
    if path.stem != "__init__"
]

# Threads of PyTorch wait for one another by computing, and the models of tests give them nothing to share. What a test
# starts has one thread, too, unless its configuration says otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Collections would walk the libraries that the tests import, again and again.
gc.disable()
WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    # Of all tests some need Megatron, which each process then loads as the trainer does.
    importlib.import_module("services.trainer.preload")
# Services that live in the tests' process log past what a test captures of `sys.stdout` and `sys.stderr`, and
# tracebacks without a picture of each variable, which would take most of a test's time.
structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        structlog.processors.KeyValueRenderer(key_order=["level", "event"]),
    ],
    logger_factory=structlog.PrintLoggerFactory(sys.__stderr__),
)
# Files that share a slow service, by the group that they make. The groups start in this order, those that take longest
# first, so that the last ones to start are short, and between those that compute one that waits; then come the other
# files.
GROUPS = {
    "training": ("test_training", "test_observability"),
    "attacks": ("test_sandbox_attacks",),
    "network": ("test_namespaces",),
    "rollout": (
        "test_rollout_service",
        "test_rollout_prefixes",
        "test_rollout_openai",
        "test_rollout_experts",
        "test_rollout_vision",
        "test_prompts_curate_images",
        "test_prompts_curate",
        "test_sample",
    ),
    "attacks on judging": ("test_sandbox_attacks_answers",),
    "trainer": (
        "test_trainer_equation",
        "test_trainer_experts",
        "test_trainer_weights",
        "test_trainer_memory",
        "test_trainer_vision",
        "test_trainer_service",
        "test_trainer_push",
    ),
    "value head": ("test_reward_value_head_faults", "test_reward_value_head", "test_reward_models_served"),
    "trainer faults": ("test_trainer_faults",),
    "rollout faults": ("test_rollout_faults",),
    "value head of labelled items": ("test_reward_value_head_labelled",),
    "examples": ("test_examples_sandbox",),
    "clients": ("test_packaging", "test_examples_clients"),
}
GROUP_OF = {stem: group for group, stems in GROUPS.items() for stem in stems}

# `make test` takes the profile ci: fewer examples, and the same ones each time; a person's pytest looks further.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Names bytes by their place: an archive holds the time at which a worker made it, and all have to agree on ids."""
    return argname if isinstance(val, bytes) and len(val) > 32 else None


def group_of(nodeid: str) -> str:
    """The group of a test by its id: a name of GROUPS or the test's file."""
    file = nodeid.partition("::")[0]
    return GROUP_OF.get(Path(file).stem, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Hands whole groups to the worker processes."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False  # the order of GROUPS counts, not the number of tests
    return GroupScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the groups of slow services first."""
    if WORKER:
        order = {group: place for place, group in enumerate(GROUPS)}
        items.sort(key=lambda item: order.setdefault(group_of(item.nodeid), len(order)))


def pytest_collection_finish() -> None:
    """Collects garbage from here on, but for what has been imported."""
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names each missing tool or data set once, after the results."""
    missing = sorted({str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])})
    if missing:
        terminalreporter.section("not shown here")
        for reason in missing:
            terminalreporter.write_line(reason.removeprefix("Skipped: "))
