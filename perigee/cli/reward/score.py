"""`perigee reward score`: a file of responses through the reward service."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from perigee.buffer.v1 import buffer_pb2
from perigee.cli.ending import Interrupt, run_interruptible
from perigee.cli.reward.item_file import read_item_file
from perigee.cli.reward.outcomes import OutcomeBook
from perigee.cli.reward.summary import show_summary, summarize
from perigee.cli.view import ProgressView
from perigee.errors import PerigeeError
from perigee.reward.client import RewardClient
from perigee.reward.scoring import ScoringOptions, score_items

# Some items could not be judged.
FAILED_REMAIN = 3


@dataclass(frozen=True)
class ScoreCommand:
    """What the command line asks for."""

    file: Path
    out: Path | None
    address: str
    token: str | None
    ca_file: Path | None
    resume: bool
    overwrite: bool
    plain: bool

    @property
    def out_path(self) -> Path:
        """Where the outcomes go: FILE.scored.jsonl unless told otherwise."""
        return self.out or self.file.with_name(f"{self.file.name.removesuffix('.jsonl')}.scored.jsonl")

    @property
    def again(self) -> str:
        """The command that goes on."""
        out = [] if self.out is None else ["--out", str(self.out)]
        return shlex.join(["perigee", "reward", "score", str(self.file), *out, "--resume"])


def run_score(command: ScoreCommand, options: ScoringOptions) -> int:
    """Scores the file and returns the exit code: 0, 3 when some items could not be judged, 128 + n on signal n.

    Raises InvalidArgumentError naming every bad line, UnavailableError when the service stays away.
    """
    items = read_item_file(command.file)
    console = Console()
    with OutcomeBook(command.out_path, items, resume=command.resume, overwrite=command.overwrite) as book:

        async def work(interrupt: Interrupt) -> int:
            await _score(command, options, book, console)
            return 0

        try:
            code = run_interruptible(work)
        except PerigeeError as error:
            kept = f"{len(book.outcomes):,} of {len(items):,} outcomes are kept; go on with: {command.again}"
            raise type(error)(f"{error.message}; {kept}") from error
        if code:
            print(f"stopped; go on with: {command.again}", file=sys.stderr)
            return code
        lines = book.finish()
    summary = summarize(lines, [item.label for item in items])
    show_summary(summary, console)
    console.print(f"outcomes: {command.out_path}", highlight=False, soft_wrap=True)
    return FAILED_REMAIN if summary.failed else 0


async def _score(command: ScoreCommand, options: ScoringOptions, book: OutcomeBook, console: Console) -> None:
    missing = book.missing
    ca_file = str(command.ca_file) if command.ca_file is not None else None
    async with RewardClient.connect(command.address, token=command.token, ca_file=ca_file) as client:
        failed = 0
        with ProgressView(console, "scored", len(missing), plain=command.plain) as progress:
            async for response in score_items(client, missing, options):
                book.add(response)
                failed += response.verdict == buffer_pb2.VERDICT_FAILED
                progress.advance(note=f"{failed:,} failed" if failed else "")
