"""The reward service for other pipelines: items from a ground truth of some form, and a client for code that is not
asynchronous, on an event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import json
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perigee.errors import DeadlineExceededError, InvalidArgumentError, UnavailableError
from perigee.reward.client import RewardClient
from perigee.reward.items import VERIFIERS, read_item
from perigee.reward.scoring import ScoringOptions, score_items
from perigee.reward.v1 import reward_pb2 as pb
from perigee.rpc import ChannelOptions

DEFAULT_ADDRESS = "127.0.0.1:50055"
CLOSE_S = 5.0


@dataclass(frozen=True)
class GroundTruthOptions:
    """Verifier and answer marker of a ground truth that is one value."""

    verifier: str = "math"
    """The verifier that compares with it."""
    answer_marker: str = ""
    """What follows its last occurrence is the answer; empty: the verifier's own extraction."""


def make_item(item_id: str, prompt: str, response: str, ground_truth: Any, options: GroundTruthOptions) -> pb.ScoreItem:
    """Returns the item of a response.

    A ground truth is a value to compare with, a list of values that are as good, or all fields of an item's verifier:
    {"math": {"reference": "4"}} or {"verifier": "code", "language": "python", "tests": [...]}, as a mapping or as its
    JSON text; such fields may also name another `answer_marker`.

    Raises InvalidArgumentError naming the field.
    """
    item = {"answer_marker": options.answer_marker, **read_ground_truth(ground_truth, options.verifier)}
    return read_item(item | {"id": item_id, "prompt": prompt, "response": response}, item_id)


def read_ground_truth(ground_truth: Any, verifier: str) -> dict[str, Any]:
    """Returns the fields of an item's verifier."""
    if hasattr(ground_truth, "tolist"):  # columns of data frames come as arrays
        ground_truth = ground_truth.tolist()
    if (fields := _as_fields(ground_truth)) is not None:
        return fields
    values = list(ground_truth) if isinstance(ground_truth, list | tuple) else [ground_truth]
    if not values or any(value is None or isinstance(value, Mapping | list) for value in values):
        raise InvalidArgumentError.for_field(
            "ground_truth", f"is neither a value nor a verifier's fields: {ground_truth!r}"
        )
    return {"verifier": verifier, **_references([str(value) for value in values], verifier)}


class BlockingScorer:
    """Scores items and waits for all outcomes; any number of threads may share one.

    Nothing is connected before the first call, so it can be pickled and sent to workers, and a process that was forked
    from one that has connected connects anew. Address, token and certificates are those of PERIGEE_REWARD_ADDRESS,
    PERIGEE_TOKEN, PERIGEE_CA_FILE and so on unless they are given.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        token_file: str | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
        server_name: str | None = None,
        options: ScoringOptions = ScoringOptions(),
        deadline_s: float = 600.0,
    ) -> None:
        self.address = address or os.environ.get("PERIGEE_REWARD_ADDRESS", DEFAULT_ADDRESS)
        self._channel = ChannelOptions.from_environment(
            token=token,
            token_file=token_file,
            ca_file=ca_file,
            cert_file=cert_file,
            key_file=key_file,
            server_name=server_name,
        )
        self._options = options
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._connection: _Connection | None = None

    def score(self, items: Sequence[pb.ScoreItem]) -> list[pb.ScoreResponse]:
        """Returns the outcomes in the order of the items; their ids must differ.

        Raises DeadlineExceededError after `deadline_s`, and what `score_items` raises.
        """
        future = self.submit(items)
        try:
            return future.result(self._deadline_s)
        except concurrent.futures.CancelledError as error:
            raise UnavailableError("the scorer was closed") from error
        except TimeoutError as error:
            raise self._late(future, items) from error

    async def score_async(self, items: Sequence[pb.ScoreItem]) -> list[pb.ScoreResponse]:
        """Returns the same for a caller with an event loop of its own, which is not held up."""
        future = self.submit(items)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise self._late(future, items) from error

    def submit(self, items: Sequence[pb.ScoreItem]) -> concurrent.futures.Future[list[pb.ScoreResponse]]:
        """Begins to score; cancelling the future ends the calls."""
        with self._lock:
            if self._connection is None or self._connection.pid != os.getpid():
                self._connection = _Connection(self.address, self._channel)
            connection = self._connection
        return connection.submit(items, self._options)

    def close(self) -> None:
        """Ends calls in flight and the thread; a later call connects anew."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None and connection.pid == os.getpid():
            connection.close()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_lock": None, "_connection": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _late(
        self, future: concurrent.futures.Future[list[pb.ScoreResponse]], items: Sequence[pb.ScoreItem]
    ) -> DeadlineExceededError:
        """Cancels the calls and returns the error of a missed deadline."""
        future.cancel()
        return DeadlineExceededError(f"{len(items)} items were not scored within {self._deadline_s:g} s")


class _Connection:
    """A client and the thread that runs its event loop, in one process."""

    def __init__(self, address: str, channel: ChannelOptions) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="perigee-reward", daemon=True)
        self._thread.start()
        # A channel belongs to the loop that it was made on.
        self._client = self._run(_connect(address, channel)).result(CLOSE_S)
        # Without an end in order, the interpreter's would find calls in flight.
        atexit.register(self.close)

    def submit(
        self, items: Sequence[pb.ScoreItem], options: ScoringOptions
    ) -> concurrent.futures.Future[list[pb.ScoreResponse]]:
        return asyncio.run_coroutine_threadsafe(_score(self._client, items, options), self._loop)

    def close(self) -> None:
        atexit.unregister(self.close)
        if self._loop.is_closed():
            return
        self._run(_end_all(self._client)).result(CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, RewardClient]) -> concurrent.futures.Future[RewardClient]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


async def _connect(address: str, channel: ChannelOptions) -> RewardClient:
    return RewardClient(address, channel)


async def _end_all(client: RewardClient) -> RewardClient:
    """Cancels what is in flight on this loop and closes the client."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.close()
    return client


async def _score(
    client: RewardClient, items: Sequence[pb.ScoreItem], options: ScoringOptions
) -> list[pb.ScoreResponse]:
    outcomes = {response.id: response async for response in score_items(client, items, options)}
    return [outcomes[item.id] for item in items]


def _references(values: list[str], verifier: str) -> dict[str, Any]:
    """Returns values as the references of a verifier, however many it has."""
    if verifier not in VERIFIERS:
        raise InvalidArgumentError.for_field("verifier", f"must be one of {', '.join(VERIFIERS)}, got {verifier!r}")
    message_type = pb.ScoreItem.DESCRIPTOR.fields_by_name[verifier].message_type
    assert message_type is not None
    fields = message_type.fields_by_name
    if "references" in fields:
        return {"references": values}
    if "reference" in fields and len(values) == 1:
        return {"reference": values[0]}
    if "alternatives" in fields:
        return {"reference": values[0], "alternatives": values[1:]}
    known = ", ".join(fields)
    raise InvalidArgumentError.for_field(
        "ground_truth", f"must be an object with the fields of the {verifier} verifier ({known}), got {values!r}"
    )


def _as_fields(ground_truth: Any) -> dict[str, Any] | None:
    """Returns the fields of a verifier that a ground truth holds; None when it is a value."""
    if isinstance(ground_truth, str) and ground_truth.lstrip().startswith("{"):
        try:
            ground_truth = json.loads(ground_truth)
        except ValueError:
            return None
    if not isinstance(ground_truth, Mapping):
        return None
    if "verifier" in ground_truth:
        return dict(ground_truth)
    if len(ground_truth) == 1 and next(iter(ground_truth)) in VERIFIERS:
        return {"verifier": dict(ground_truth)}
    return None
