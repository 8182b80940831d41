"""Tokens, audiences, quotas and the log of calls, without a server."""

import asyncio
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from perigee.errors import InvalidArgumentError, PermissionDeniedError, ResourceExhaustedError, UnauthenticatedError
from services.buffer.config import BufferConfig
from services.coordinator.config import CoordinatorConfig
from services.kit.access import Access, Caller, Receptions, Usage
from services.kit.config import Audience, QuotaConfig, ServerConfig, ServiceConfig
from services.reward.config import RewardConfig
from services.rollout.config import RolloutConfig
from services.sandbox.config import SandboxConfig
from services.trainer.config import TrainerConfig

TEAM = {"tokens": ["old", "new"], "audiences": ["reward"]}


class ProbeConfig(ServiceConfig):
    section: ClassVar[str] = "probe"
    audience: ClassVar[Audience] = "reward"


def make_access(**server: Any) -> Access:
    return Access(ProbeConfig(server=ServerConfig(**server)))


def call(access: Access, token: str | None, *, code: str = "OK") -> str:
    """Makes a call that ends at once, and returns its caller's name."""
    record = access.begin("/probe/Call", "ipv4:10.0.0.1:1", "id-1")
    with access.admit(record, None if token is None else f"Bearer {token}"):
        pass
    access.record(record, code)
    return record.caller


def test_callers_are_known_by_any_of_their_tokens() -> None:
    access = make_access(token="own", callers={"team": TEAM})
    assert [call(access, token) for token in ("own", "old", "new")] == ["stack", "team", "team"]
    for token in (None, "", "other", "own "):
        with pytest.raises(UnauthenticatedError, match="no valid bearer token"):
            call(access, token)


def test_without_tokens_anyone_may_call() -> None:
    assert call(make_access(), None) == "anyone"


def test_each_service_asks_for_its_audience() -> None:
    configs = (CoordinatorConfig, BufferConfig, TrainerConfig, RolloutConfig, RewardConfig, SandboxConfig)
    audiences = {config.section: config.audience for config in configs}
    control = dict.fromkeys(("coordinator", "buffer", "trainer", "rollout"), "control")
    assert audiences == {**control, "reward": "reward", "sandbox": "sandbox"}


def test_a_token_for_another_audience_is_refused_in_one_sentence() -> None:
    access = make_access(callers={"team": {"tokens": ["t"], "audiences": ["sandbox"]}})
    with pytest.raises(PermissionDeniedError) as refused:
        call(access, "t")
    assert refused.value.message == "The token of team is for sandbox; probe asks for one for reward."


def test_files_of_tokens_and_callers_are_read_anew(tmp_path: Path) -> None:
    token_file, callers_file = tmp_path / "token", tmp_path / "callers.yaml"
    token_file.write_text("first\n")
    callers_file.write_text("team: {tokens: [old], audiences: [reward]}")
    access = make_access(token_file=str(token_file), callers_file=str(callers_file))
    assert [call(access, token) for token in ("first", "old")] == ["stack", "team"]
    token_file.write_text("second\nfirst\n")
    callers_file.write_text("team: {tokens: [new, old], audiences: [reward]}")
    assert [call(access, token) for token in ("first", "second", "new")] == ["stack", "stack", "team"]
    callers_file.write_text("team: {tokens: [new], audience: [reward]}")  # misspelt: what was read before is kept
    assert call(access, "new") == "team"
    callers_file.write_text("{}")
    with pytest.raises(UnauthenticatedError):
        call(access, "new")


def test_what_is_wrong_with_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "callers.yaml"
    file.write_text("team: {tokens: [t], audiences: [coordinator]}")
    with pytest.raises(InvalidArgumentError, match=r"callers\.yaml: callers\.team\.audiences\.0: .*'control'"):
        make_access(callers_file=str(file))
    with pytest.raises(InvalidArgumentError, match=r"nowhere: cannot be read"):
        make_access(token_file="nowhere")
    with pytest.raises(InvalidArgumentError, match="two and one have the same token"):
        make_access(callers={name: {"tokens": ["t"], "audiences": ["reward"]} for name in ("one", "two")})


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        ({"token": "a", "token_file": "b"}, "leave out one of them"),
        ({"tls_cert_file": "a"}, "together or not at all"),
        ({"tls_ca_file": "a"}, "tls_ca_file needs tls_cert_file"),
        ({"tls_server_name": "a"}, "tls_server_name needs tls_ca_file"),
        ({"callers": {"team": {"tokens": [""], "audiences": ["reward"]}}}, "a token is empty"),
    ],
)
def test_credentials_that_would_not_protect_are_refused(server: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ServerConfig(**server)


def test_calls_in_flight_are_bounded_for_each_caller() -> None:
    callers = {name: {"tokens": [name], "audiences": ["reward"]} for name in ("one", "two")}
    access = make_access(token="own", callers=callers, quota={"max_in_flight": 1})
    with access.admit(access.begin("m", "p", None), "Bearer one"):
        with pytest.raises(ResourceExhaustedError, match="one has 1 calls in flight, its quota") as refused:
            call(access, "one")
        assert refused.value.retry_after_s == 1.0
        assert [call(access, token) for token in ("two", "own")] == ["two", "stack"]
    assert call(access, "one") == "one"


def test_the_rate_of_a_caller_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("services.kit.access.time.monotonic", lambda: now)
    usage, caller = Usage(), Caller("team", frozenset(), QuotaConfig(per_second=4))

    def call_until_refused() -> int:
        for count in range(100):
            try:
                with usage.enter(caller):
                    pass
            except ResourceExhaustedError as error:
                hints.append(error.retry_after_s)
                return count
        raise AssertionError("no call was refused")

    hints: list[float | None] = []
    assert call_until_refused() == 4
    now += 0.5
    assert call_until_refused() == 2
    now += 60
    assert call_until_refused() == 4
    assert hints == [pytest.approx(0.25)] * 3


def test_the_log_has_a_line_for_each_call_of_another_team() -> None:
    callers = {"team": TEAM}
    with capture_logs() as lines:
        access = make_access(token="own", callers=callers)
        call(access, "own")
        call(access, "old", code="NOT_FOUND")
        call(make_access(token="own", callers=callers, audit="none"), "old")
        call(make_access(audit="all"), None)
    shown = [{key: line[key] for key in ("event", "caller", "method", "code", "request_id", "peer")} for line in lines]
    team = {"event": "call", "method": "/probe/Call", "request_id": "id-1", "peer": "ipv4:10.0.0.1:1"}
    assert shown == [team | {"caller": "team", "code": "NOT_FOUND"}, team | {"caller": "anyone", "code": "OK"}]


async def test_a_request_that_does_not_arrive_gives_way_to_one_that_waits() -> None:
    receptions, never = Receptions(gives_way_s=0), asyncio.Event()

    async def receive(arrived: asyncio.Event) -> str:
        try:
            async with receptions.enter():
                await arrived.wait()
        except ResourceExhaustedError as error:
            return error.message
        return "received"

    stalled = [asyncio.create_task(receive(never)) for _ in range(8)]
    await asyncio.sleep(0)
    here = asyncio.Event()
    here.set()
    async with asyncio.timeout(30):
        assert [await receive(here) for _ in range(2)] == ["received"] * 2
    gone = [task for task in stalled if task.done()]
    assert [await task for task in gone] == ["The request did not arrive within 0 s, and others of its caller waited."]
    never.set()
    assert (await asyncio.gather(*stalled)).count("received") == 7
