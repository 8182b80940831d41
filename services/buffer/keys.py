"""Names of the keys. All keys of a run share the hash tag `{run}`, so one change of many keys is one slot of a cluster.

    perigee:{R}:run             hash: configuration digest, iteration, policy version, coordinator state
    perigee:{R}:groups          sorted set: ids of the groups not consumed, by the order of their making
    perigee:{R}:group:G         hash: prompt id, iteration, packed prompt tokens, trajectory ids as JSON
    perigee:{R}:trajectory:T    hash: group, epoch, worker, token count, end reason, versions, verdict, reward
    perigee:{R}:tokens:T        string: response tokens, 32-bit integers
    perigee:{R}:logprobs:T      string: behaviour logprobs, 32-bit floats
    perigee:{R}:consumed        sorted set: ids of the groups that the last iterations consumed, by iteration
    perigee:{R}:prompts         sorted set: ids of the prompts that have statistics, in lexical order
    perigee:{R}:statistics      hash: prompt id -> `trajectories correct`

The scripts derive every key from the first one, which is the only one passed to them.
"""

from __future__ import annotations

MAX_ID_BYTES = 256


def run_key(run_id: str) -> str:
    """The key of the run's state."""
    return f"perigee:{{{run_id}}}:run"


def describe_bad_id(identifier: str) -> str | None:
    """What is wrong with an id of a run, group, trajectory, prompt or worker; None when it may be used."""
    if not identifier:
        return "must not be empty"
    if len(identifier.encode()) > MAX_ID_BYTES:
        return f"must not be longer than {MAX_ID_BYTES} bytes"
    if not identifier.isprintable():
        return "must hold printable characters only"
    return None


def describe_bad_run_id(run_id: str) -> str | None:
    """What is wrong with the id of a run, whose braces would break the hash tag; None when it may be used."""
    if "{" in run_id or "}" in run_id:
        return "must not hold braces"
    return describe_bad_id(run_id)
