"""Outcomes in files: what is known from earlier runs, what this one adds, and the result in the order of the items."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from perigee.cli.reward.item_file import FileItem
from perigee.errors import InvalidArgumentError
from perigee.files import Journal, write_lines
from perigee.json_codec import write_message
from perigee.reward.v1 import reward_pb2 as pb

FLUSH_OUTCOMES = 64
FLUSH_S = 1.0
FAILED = "failed"


class OutcomeBook:
    """The outcomes of a file's items; a context manager that keeps what is known also when the command ends early.

    They are kept in a journal beside `out` until `finish` writes `out`.
    """

    def __init__(self, out: Path, items: Sequence[FileItem], *, resume: bool, overwrite: bool) -> None:
        self._out = out
        self._items = items
        self._journal_path = out.with_name(f".{out.name}.partial")
        earlier: list[dict[str, Any]] = []
        for path, what in ((out, "outcomes of an earlier run"), (self._journal_path, "outcomes of a run cut short")):
            if not path.exists():
                continue
            if overwrite:
                path.unlink()
            elif not resume:
                raise InvalidArgumentError.of(
                    str(path), f"holds {what}; --resume keeps them and scores the rest, --overwrite forgets them"
                )
            elif path == out:
                with Journal(path) as held:
                    earlier += held.lines
        self._journal = Journal(self._journal_path)
        earlier += self._journal.lines
        digests = {item.item.id: item.digest for item in items}
        # An item that has changed since is another item.
        self.outcomes: dict[str, dict[str, Any]] = {}
        for line in earlier:
            item_id = line.get("id")
            if item_id in digests and line.get("item_digest") == digests[item_id]:
                self.outcomes[item_id] = line
        self._digests = digests
        self._unwritten: list[dict[str, Any]] = []
        self._flushed_at = time.monotonic()

    @property
    def missing(self) -> list[pb.ScoreItem]:
        """Items without a judgement, those that FAILED earlier among them."""
        return [item.item for item in self._items if self._verdict(item.item.id) in (None, FAILED)]

    def add(self, response: pb.ScoreResponse) -> None:
        """Takes a final outcome; it is on disk a second later."""
        line = read_outcome(response) | {"item_digest": self._digests[response.id]}
        self.outcomes[response.id] = line
        self._unwritten.append(line)
        if len(self._unwritten) >= FLUSH_OUTCOMES or time.monotonic() - self._flushed_at > FLUSH_S:
            self._flush()

    def finish(self) -> list[Mapping[str, Any]]:
        """Writes the file and returns its lines, in the order of the items."""
        lines = [self.outcomes[item.item.id] for item in self._items]
        write_lines(self._out, lines)
        self._journal_path.unlink()
        self._unwritten = []
        return list(lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        self._journal.__exit__(kind, error, trace)
        if not self.outcomes:  # nothing to go on with
            self._journal_path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._unwritten:
            self._journal.append(self._unwritten)
        self._unwritten = []
        self._flushed_at = time.monotonic()

    def _verdict(self, item_id: str) -> str | None:
        outcome = self.outcomes.get(item_id)
        return None if outcome is None else str(outcome["verdict"])


def read_outcome(response: pb.ScoreResponse) -> dict[str, Any]:
    """The outcome as a JSON object; `reward` is null exactly when the verdict is failed."""
    values = write_message(response)
    for part in (values, *values["parts"]):
        part.setdefault("reward", None)
    if not values["parts"]:
        del values["parts"]
    return values
