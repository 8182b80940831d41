"""Groups: their creation, their listing, and the verdicts of their trajectories."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from perigee.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError
from services.buffer.packing import unpack_spans
from services.buffer.scripts import ScriptRunner, Stake, load_script
from services.buffer.types import EndReason, Group, NewGroup, Trajectory, TrajectoryVerdict, Verdict

CREATE_GROUPS = load_script("create_groups")
LIST_GROUPS = load_script("list_groups")
RECORD_VERDICTS = load_script("record_verdicts")

# Groups that one script call lists: bounds the time that it holds the server.
GROUPS_PER_CALL = 64


async def create_groups(scripts: ScriptRunner, run_id: str, groups: Sequence[NewGroup]) -> int:
    """How many of the groups did not exist.

    Raises AlreadyExistsError when a new group names a trajectory of another one; then no group is created.
    """
    arguments: list[str | bytes | int] = []
    for group in groups:
        arguments += (group.group_id, group.prompt_id, group.iteration, group.prompt, len(group.trajectory_ids))
        arguments += group.trajectory_ids
    word, value = await scripts.run(CREATE_GROUPS, run_id, *arguments, stake=Stake.SEGMENT)
    if word == b"TRAJECTORY_TAKEN":
        raise AlreadyExistsError(f"trajectory {value.decode()!r} belongs to another group: take a new id")
    return int(value)


async def list_groups(
    scripts: ScriptRunner, run_id: str, page_trajectories: int
) -> AsyncGenerator[Sequence[Group], None]:
    """Pages of the groups not consumed, oldest first; each page of at most `page_trajectories` or of one group."""
    page: list[Group] = []
    held = 0
    position = "0"
    while True:
        _, rows_json = await scripts.run(LIST_GROUPS, run_id, position, GROUPS_PER_CALL)
        rows = json.loads(rows_json)
        for row in rows:
            group = _read_group(row)
            if page and held + len(group.trajectories) > page_trajectories:
                yield page
                page, held = [], 0
            page.append(group)
            held += len(group.trajectories)
        if len(rows) < GROUPS_PER_CALL:
            break
        position = rows[-1][0]
    if page:
        yield page


async def record_verdicts(scripts: ScriptRunner, run_id: str, verdicts: Sequence[TrajectoryVerdict]) -> int:
    """How many of the verdicts were not there before; the first one recorded of a trajectory stands.

    Raises NotFoundError for an unknown trajectory, FailedPreconditionError for one that is not finished; then none is
    recorded.
    """
    arguments: list[str | bytes | int] = []
    for item in verdicts:
        arguments += (item.trajectory_id, int(item.verdict), "" if item.reward is None else repr(item.reward))
    word, value = await scripts.run(RECORD_VERDICTS, run_id, *arguments, stake=Stake.COMMIT)
    if word == b"UNKNOWN":
        raise NotFoundError(f"trajectory {value.decode()!r} does not exist in run {run_id!r}")
    if word == b"UNFINISHED":
        raise FailedPreconditionError(f"trajectory {value.decode()!r} is not finished: it cannot have a verdict")
    return int(value)


def _read_group(row: Sequence[Any]) -> Group:
    _, group_id, prompt_id, iteration, trajectories = row
    return Group(group_id, prompt_id, int(iteration), [_read_trajectory(fields) for fields in trajectories])


def _read_trajectory(fields: Sequence[str]) -> Trajectory:
    trajectory_id, tokens, epoch, ending, verdict, reward, versions = fields
    return Trajectory(
        trajectory_id=trajectory_id,
        tokens=int(tokens),
        epoch=int(epoch),
        ending=EndReason(int(ending)),
        verdict=Verdict(int(verdict or 0)),
        reward=float(reward) if reward else None,
        spans=unpack_spans(versions, 0, int(tokens)),
    )
