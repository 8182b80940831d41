"""From where each worker pulls."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.directory import plan_sources

TRAINER = "host-0:1"
addresses = st.lists(st.tuples(st.integers(0, 4), st.integers(2, 6)), unique=True, max_size=12)


def host(address: str) -> str:
    return address.partition(":")[0]


@given(addresses, st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_hosts_pass_the_weights_on_in_a_chain(nodes: list[tuple[int, int]], held: int) -> None:
    workers = [f"host-{number}:{port}" for number, port in nodes]
    holders, pulling = workers[:held], workers[held:]
    plan = plan_sources(TRAINER, holders, pulling)
    assert list(plan) == pulling
    uplinks: list[str] = []
    seen = list(holders)
    for worker, sources in plan.items():
        if host(worker) == host(TRAINER):
            assert sources[0] == TRAINER
            assert set(sources[1:]) <= set(holders)
            continue
        assert sources[-1] == TRAINER
        # Nobody waits for one that waits for it, and every fall-back is on a host of its own.
        assert set(sources[:-1]) <= set(seen)
        assert len({host(source) for source in sources}) == len(sources)
        seen.append(worker)
        if host(sources[0]) != host(worker):
            assert host(worker) not in {host(other) for other in seen[:-1]}
            uplinks.append(host(sources[0]))
    assert len(uplinks) == len(set(uplinks))


def test_a_worker_that_pulls_again_does_not_pull_from_itself() -> None:
    assert plan_sources(TRAINER, ["host-1:2"], ["host-1:2"]) == {"host-1:2": [TRAINER]}
