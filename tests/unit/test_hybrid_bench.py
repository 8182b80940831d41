"""What the benches of shared devices derive from what they measured."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench import pair_memory
from bench.hybrid import compare_memory
from bench.hybrid_run import goes_through
from bench.pair_memory import PairPeaks, TreeMemory, list_tree, read_trees

MIB = 1 << 20
# A process that has as many MiB as it is told, and waits.
HOLDER = f"import sys; data = b'1' * (int(sys.argv[1]) * {MIB}); print(flush=True); input()"


def test_memory_of_a_tree_has_its_processes_and_their_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_memory, "SHARED_MEMORY", tmp_path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, "24"], **pipes) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        (tmp_path / f"perigee-weights-{holder.pid}-image").write_bytes(bytes(MIB))
        (tmp_path / f"perigee-weights-{holder.pid}0-image").write_bytes(bytes(MIB))
        memory, none = read_trees([holder.pid, 1 << 30])
        holder.communicate(b"\n")
    assert 24 * MIB < memory.own < 48 * MIB
    assert (memory.shared, none) == (MIB, TreeMemory())


def test_a_tree_has_all_below_its_root() -> None:
    assert list_tree(2, {1: [2, 5], 2: [3], 3: [4], 4: [], 5: []}) == [2, 3, 4]


def test_peaks_are_those_of_one_time() -> None:
    peaks = PairPeaks()
    for trainer, worker in ((5, 1), (2, 6), (4, 5)):
        peaks.add(TreeMemory(trainer, 1), TreeMemory(worker, 0))
    assert (peaks.trainer, peaks.worker, peaks.pair, peaks.samples) == (6, 6, 10, 3)
    assert peaks.at_peak == (TreeMemory(4, 1), TreeMemory(5, 0))


def test_the_bound_has_the_floor_of_the_smaller_one() -> None:
    keep = {"trainer_peak_mib": 2000, "worker_peak_mib": 1000, "peak_mib": 2900}
    found = compare_memory(keep, {"peak_mib": 2500, "away_mib": {"trainer": 400, "worker": 300}})
    assert (found["larger_mib"], found["floor_mib"], found["bound_mib"]) == (2000, 300, 2600)
    assert found["of_bound"] == pytest.approx(2500 / 2600)
    assert found["over_larger"] == pytest.approx(1.1)


def test_an_iteration_goes_through_all_stages_in_their_order() -> None:
    line = {"time/leave/start": 1.0, "time/onload/start": 2.0}
    assert goes_through(line, ("leave", "onload"))
    assert not goes_through(line, ("onload", "leave"))
    assert not goes_through(line, ("leave", "training"))
