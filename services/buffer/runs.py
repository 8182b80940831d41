"""Runs: their creation, their state, the statistics of their prompts, and the commit that closes an iteration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from perigee.errors import AbortedError, AlreadyExistsError, FailedPreconditionError
from services.buffer.scripts import ScriptRunner, Stake, load_script
from services.buffer.types import Commit, PromptStatistics, RunState

CREATE_RUN = load_script("create_run")
READ_RUN = load_script("read_run")
COMMIT_ITERATION = load_script("commit_iteration")
LIST_STATISTICS = load_script("list_statistics")


async def create_run(
    scripts: ScriptRunner, run_id: str, config_digest: str, policy_version: int, coordinator_state: bytes
) -> tuple[RunState, bool]:
    """The run, and whether this call created it.

    Raises AlreadyExistsError when it exists with another configuration.
    """
    reply = await scripts.run(CREATE_RUN, run_id, config_digest, policy_version, coordinator_state, stake=Stake.COMMIT)
    state = _read_state(run_id, reply[1:])
    if state.config_digest != config_digest:
        raise AlreadyExistsError(
            f"run {run_id!r} exists with another configuration ({state.config_digest}, not {config_digest}): "
            "take another run id or the configuration it began with"
        )
    return state, bool(reply[0])


async def get_run(scripts: ScriptRunner, run_id: str) -> RunState:
    """The state of the run; raises NotFoundError."""
    _, *fields = await scripts.run(READ_RUN, run_id)
    return _read_state(run_id, fields)


async def commit_iteration(scripts: ScriptRunner, run_id: str, commit: Commit) -> tuple[RunState, bool]:
    """The state after the commit, and whether this very commit was there before.

    Raises FailedPreconditionError when the iteration is not the next one or a group cannot be consumed, AbortedError
    when the iteration was committed with other contents. A refusal changes nothing.
    """
    arguments: list[str | bytes | int] = [
        commit.iteration,
        commit.policy_version,
        commit.digest,
        commit.coordinator_state,
        len(commit.consumed_group_ids),
        *commit.consumed_group_ids,
    ]
    for increment in commit.increments:
        arguments += (increment.prompt_id, increment.trajectories, increment.correct)
    word, *fields = await scripts.run(COMMIT_ITERATION, run_id, *arguments, stake=Stake.COMMIT)
    match word:
        case b"OK" | b"DUPLICATE":
            return _read_state(run_id, fields), word == b"DUPLICATE"
        case b"NOT_NEXT":
            committed = int(fields[0])
            raise FailedPreconditionError(
                f"iteration {commit.iteration} cannot be committed: run {run_id!r} has {committed} committed "
                f"iterations, so the next is {committed + 1}"
            )
        case b"OTHER_CONTENTS":
            raise AbortedError(
                f"iteration {commit.iteration} of run {run_id!r} was committed with other contents: "
                "another coordinator drives this run"
            )
        case b"CONSUMED_BEFORE":
            raise FailedPreconditionError(f"group {fields[0].decode()!r} was consumed by an earlier iteration")
        case _:
            raise FailedPreconditionError(f"group {fields[0].decode()!r} does not exist and cannot be consumed")


async def list_statistics(
    scripts: ScriptRunner, run_id: str, after: str, limit: int
) -> tuple[Sequence[PromptStatistics], str]:
    """One page of statistics in the order of prompt ids, and the id to go on after ("" on the last page)."""
    _, page_json = await scripts.run(LIST_STATISTICS, run_id, after, limit + 1)
    rows = json.loads(page_json)
    page = [PromptStatistics(prompt_id, *map(int, counts.split())) for prompt_id, counts in rows[:limit]]
    return page, page[-1].prompt_id if len(rows) > limit else ""


def _read_state(run_id: str, fields: Sequence[Any]) -> RunState:
    digest, iteration, policy_version, coordinator_state = fields
    return RunState(run_id, digest.decode(), int(iteration), int(policy_version), bytes(coordinator_state))
