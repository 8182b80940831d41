"""Folders that a running service has claimed, and those that it left."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

from services.sandbox.runtime.leftovers import claim, held_if_abandoned


def test_a_claim_holds_until_it_is_released(tmp_path: Path) -> None:
    folder = tmp_path / "below" / "1-2"
    descriptor = claim(folder)
    with held_if_abandoned(folder) as abandoned:
        assert not abandoned
    os.close(descriptor)
    with held_if_abandoned(folder) as abandoned:
        assert abandoned
    with held_if_abandoned(tmp_path / "missing") as abandoned:
        assert not abandoned


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "1-2"
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(folder, ready, release))
    process.start()
    try:
        assert ready.wait(60)
        with held_if_abandoned(folder) as abandoned:
            assert not abandoned
    finally:
        process.kill()
        process.join()
    with held_if_abandoned(folder) as abandoned:
        assert abandoned


def _hold(folder: Path, ready: threading.Event, release: threading.Event) -> None:
    claim(folder)
    ready.set()
    release.wait()


def test_a_folder_that_was_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    """Whoever clears leftovers may see a folder before its maker has locked it."""
    folder = tmp_path / "1-2"
    folder.mkdir()
    claims: list[int] = []
    with held_if_abandoned(folder) as abandoned:
        assert abandoned
        claiming = threading.Thread(target=lambda: claims.append(claim(folder)))
        claiming.start()
        folder.rmdir()
    claiming.join(60)
    with held_if_abandoned(folder) as abandoned:
        assert not abandoned
    os.close(claims[0])
