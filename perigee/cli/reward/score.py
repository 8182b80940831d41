"""`perigee reward score`: a file of responses through the reward service.

Items are JSON Lines, and every bad line is reported at once. Outcomes are kept in a journal until all are known, then
in a file in the order of the items.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from perigee.buffer.v1 import buffer_pb2
from perigee.cli.ending import Interrupt, run_interruptible
from perigee.cli.view import ProgressView
from perigee.errors import FieldViolation, InvalidArgumentError, PerigeeError
from perigee.files import Journal, write_lines
from perigee.image_sources import ImageReader
from perigee.json_codec import write_message
from perigee.reward.client import RewardClient
from perigee.reward.items import read_item, read_lines, read_object, read_rows
from perigee.reward.scoring import ScoringOptions, score_items
from perigee.reward.v1 import reward_pb2 as pb
from perigee.rpc import ChannelOptions

# Keys beside the item's own: the expected verdict, what a recipe's prompt line holds besides, and whatever `meta` is.
OWN_KEYS = ("label", "domain", "difficulty", "tags", "meta")
LABELS = ("correct", "wrong", "ungradable")


@dataclass(frozen=True)
class FileItem:
    """Item of a line; by `digest` an earlier outcome is known to be of the same item."""

    item: pb.ScoreItem
    label: str | None
    digest: str

    @property
    def id(self) -> str:
        """The item's id."""
        return self.item.id


def read_item_file(path: Path) -> list[FileItem]:
    """Returns the items of a file, empty lines skipped; an item without an id is named after its line.

    Raises InvalidArgumentError with a violation per wrong field of any line.
    """

    def read(line: str, place: str) -> FileItem:
        return _read_line(read_object(line, place), place, path.parent)

    return read_rows(read_lines(path, "FILE"), read, "FILE", "items")


def _read_line(values: dict[str, Any], place: str, folder: Path) -> FileItem:
    """Reads one item; raises InvalidArgumentError with a violation per wrong field."""
    violations: list[FieldViolation] = []
    label = values.get("label")
    if isinstance(label, bool):
        label = "correct" if label else "wrong"
    elif label is not None and label not in LABELS:
        violations.append(FieldViolation("label", f"must be true, false or one of {', '.join(LABELS)}, got {label!r}"))
    images, unreadable = _read_image_files(values.get("images"), folder)
    violations += unreadable
    item = pb.ScoreItem()
    try:
        default_id = f"line-{place.rpartition(':')[2]}"
        item = read_item(values | {"images": images}, default_id, OWN_KEYS, ImageReader(str(folder)))
    except InvalidArgumentError as error:
        violations += error.violations
    if violations:
        raise InvalidArgumentError.for_fields(
            [FieldViolation(f"{place}: {v.field}", v.description) for v in violations]
        )
    digest = hashlib.blake2b(item.SerializeToString(deterministic=True), digest_size=8).hexdigest()
    return FileItem(item, label, digest)


def _read_image_files(images: object, folder: Path) -> tuple[object, list[FieldViolation]]:
    """Returns the images with the files among them read; what is neither URL nor name is left for the item's reader."""
    if not isinstance(images, list):
        return images, []
    read: list[object] = []
    violations = []
    for index, image in enumerate(images):
        if not isinstance(image, str) or image.startswith(("http://", "https://", "data:")):
            read.append(image)
            continue
        try:
            read.append({"data_base64": base64.b64encode((folder / image).read_bytes()).decode()})
        except OSError as error:
            violations.append(FieldViolation(f"images[{index}]", f"{image} cannot be read: {error.strerror}"))
    return read, violations


FLUSH_OUTCOMES = 64
FLUSH_S = 1.0
FAILED = "failed"


class OutcomeStore:
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
                raise InvalidArgumentError.for_field(
                    str(path), f"holds {what}; --resume keeps them and scores the rest, --overwrite forgets them"
                )
            elif path == out:
                with Journal(path) as held:
                    earlier += held.lines
        self._journal = Journal(self._journal_path)
        earlier += self._journal.lines
        digests = {item.id: item.digest for item in items}
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
        """Items without a judgement, those that FAILED earlier among them, unless their own tests are at fault."""
        unknown = {"verdict": FAILED}
        known = [(item.item, self.outcomes.get(item.id, unknown)) for item in self._items]
        return [item for item, found in known if found["verdict"] == FAILED and not found.get("unjudgeable")]

    def add(self, response: pb.ScoreResponse) -> None:
        """Keeps a final outcome; it is on disk a second later."""
        line = read_outcome(response) | {"item_digest": self._digests[response.id]}
        self.outcomes[response.id] = line
        self._unwritten.append(line)
        if len(self._unwritten) >= FLUSH_OUTCOMES or time.monotonic() - self._flushed_at > FLUSH_S:
            self._flush()

    def finish(self) -> list[Mapping[str, Any]]:
        """Writes the file and returns its lines, in the order of the items."""
        lines = [self.outcomes[item.id] for item in self._items]
        write_lines(self._out, lines)
        self._journal_path.unlink()
        self._unwritten = []
        return list(lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._journal.close()
        if not self.outcomes:  # nothing to resume with
            self._journal_path.unlink(missing_ok=True)

    def _flush(self) -> None:
        """Writes what is new to the journal."""
        if self._unwritten:
            self._journal.append(self._unwritten)
        self._unwritten = []
        self._flushed_at = time.monotonic()


def read_outcome(response: pb.ScoreResponse) -> dict[str, Any]:
    """Returns the outcome as a JSON object; `reward` is null exactly when the verdict is failed."""
    values = write_message(response)
    for part in (values, *values["parts"]):
        part.setdefault("reward", None)
    if not values["parts"]:
        del values["parts"]
    return values


VERDICTS = ("correct", "wrong", "ungradable", "failed")
REASONS_SHOWN = 10


@dataclass
class Summary:
    """Verdicts and rewards by verifier, reasons of failures, and agreement with labels."""

    verdicts: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    rewards: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Rewards of what was judged."""
    reasons: Counter[str] = field(default_factory=Counter)
    labelled: Counter[str] = field(default_factory=Counter)
    """Judged items with a label: `agreed`, called `correct` or `not correct` against it, or neither."""

    @property
    def failed(self) -> int:
        """Items that could not be judged."""
        return self.reasons.total()


def summarize(outcomes: Sequence[Mapping[str, Any]], labels: Sequence[str | None]) -> Summary:
    """Returns the summary of outcomes and their items' labels, in the same order."""
    summary = Summary()
    for outcome, label in zip(outcomes, labels, strict=True):
        verifier, verdict = outcome["verifier"], outcome["verdict"]
        summary.verdicts[verifier][verdict] += 1
        if verdict == "failed":
            summary.reasons[outcome["reason"]] += 1
            continue
        summary.rewards[verifier].append(outcome["reward"])
        if label is not None:
            summary.labelled[_compare(verdict, label)] += 1
    return summary


def show_summary(summary: Summary, console: Console) -> None:
    """Prints the tables."""
    table = Table("verifier", *VERDICTS, "mean reward", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, verdicts in sorted(summary.verdicts.items()):
        mean = f"{fmean(rewards):.4f}" if (rewards := summary.rewards[name]) else ""
        table.add_row(name, *(f"{verdicts[verdict]:,}" for verdict in VERDICTS), mean)
    console.print(table, highlight=False)
    if summary.reasons:
        console.print(f"{summary.failed:,} could not be judged and have no reward:", highlight=False)
    for reason, count in summary.reasons.most_common(REASONS_SHOWN):
        console.print(f"  {count:,}  {reason}", highlight=False, markup=False, soft_wrap=True)
    if len(summary.reasons) > REASONS_SHOWN:
        console.print(f"  and {len(summary.reasons) - REASONS_SHOWN:,} more reasons", highlight=False)
    if total := summary.labelled.total():
        found = summary.labelled
        console.print(
            f"agreement with labels: {found['agreed']:,} of {total:,} ({found['agreed'] / total:.1%}); "
            f"{found['correct']:,} called correct against the label, {found['not correct']:,} not correct",
            highlight=False,
            soft_wrap=True,
        )


def _compare(verdict: str, label: str) -> str:
    """Returns how a verdict stands to its label, as `Summary.labelled` counts it."""
    # A label says right or not right; which of the two ways of being not right matters only where it says so.
    if verdict == label or (label == "wrong" and verdict == "ungradable"):
        return "agreed"
    if verdict == "correct":
        return "correct"
    return "not correct" if label == "correct" else "neither"


# Some items could not be judged.
FAILED_REMAIN = 3


@dataclass(frozen=True)
class ScoreCommand:
    """Options of the command line."""

    file: Path
    out: Path | None
    address: str
    channel: ChannelOptions
    resume: bool
    overwrite: bool
    plain: bool

    @property
    def out_path(self) -> Path:
        """File of the outcomes: FILE.scored.jsonl unless it is set."""
        return self.out or self.file.with_name(f"{self.file.name.removesuffix('.jsonl')}.scored.jsonl")

    @property
    def again(self) -> str:
        """Command line that resumes."""
        out = [] if self.out is None else ["--out", str(self.out)]
        return shlex.join(["perigee", "reward", "score", str(self.file), *out, "--resume"])


def run_score(command: ScoreCommand, options: ScoringOptions) -> int:
    """Scores the file and returns the exit code: 0, 3 when some items could not be judged, 128 + n on signal n.

    Raises InvalidArgumentError naming every bad line, UnavailableError when the service stays away.
    """
    items = read_item_file(command.file)
    console = Console()
    with OutcomeStore(command.out_path, items, resume=command.resume, overwrite=command.overwrite) as store:

        async def work(interrupt: Interrupt) -> int:
            await _score(command, options, store, console)
            return 0

        try:
            code = run_interruptible(work)
        except PerigeeError as error:
            kept = f"{len(store.outcomes):,} of {len(items):,} outcomes are kept; resume with: {command.again}"
            raise type(error)(f"{error.message}; {kept}") from error
        if code:
            print(f"stopped; resume with: {command.again}", file=sys.stderr)
            return code
        lines = store.finish()
    summary = summarize(lines, [item.label for item in items])
    show_summary(summary, console)
    console.print(f"outcomes: {command.out_path}", highlight=False, soft_wrap=True)
    return FAILED_REMAIN if summary.failed else 0


async def _score(command: ScoreCommand, options: ScoringOptions, store: OutcomeStore, console: Console) -> None:
    """Scores the items without a judgement, with a progress line."""
    missing = store.missing
    async with RewardClient(command.address, command.channel) as client:
        failed = 0
        with ProgressView(console, "scored", len(missing), plain=command.plain) as progress:
            async for response in score_items(client, missing, options):
                store.add(response)
                failed += response.verdict == buffer_pb2.VERDICT_FAILED
                progress.advance(note=f"{failed:,} failed" if failed else "")
