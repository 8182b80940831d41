"""Figures that are drawn from a file which another command measures: sandbox start times."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.reproduce.curves import RESULTS
from bench.reproduce.drawing import Finding
from perigee.files import write_atomically
from perigee.report.plots import BLUE, GREY

# Milliseconds from start to result, by the report's figure 4: before its changes and after.
REPORTED_MS = {"report, Docker": 120.0, "report, crun": 40.0}
ARMS = ("zygote python", "crun python", "crun lean")


class SandboxStarts:
    """Start to result of an empty job in the sandbox, beside the report's start of a container."""

    name = "sandbox"

    def measure(self) -> None:
        """Measures with bench/sandbox.py, as root and with crun, and keeps the figures of each arm."""
        with tempfile.TemporaryDirectory(prefix="perigee-reproduce-") as folder:
            command = [sys.executable, "bench/sandbox.py", "start", "--quick", "--lean", "c", "--out", folder]
            subprocess.run(command, check=True)
            measured = json.loads((Path(folder) / "sandbox-start.json").read_text(encoding="utf-8"))
        arms = {name: {key: arm[key] for key in ("median_ms", "p95_ms")} for name, arm in measured["arms"].items()}
        text = json.dumps({"machine": measured["machine"], "lean": measured["lean"], "arms": arms}, indent=1)
        write_atomically(RESULTS / f"{self.name}.json", f"{text}\n".encode())

    def read(self) -> Mapping[str, Any] | None:
        """Returns what was measured; None where nothing was."""
        path = RESULTS / f"{self.name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def draw(self, measured: Mapping[str, Any]) -> Figure:
        """Draws a bar for each way to start."""
        bars = {**REPORTED_MS, **{self._label(measured, arm): measured["arms"][arm]["median_ms"] for arm in ARMS}}
        figure, axes = plt.subplots()
        drawn = axes.barh(list(bars), list(bars.values()), color=[GREY] * len(REPORTED_MS) + [BLUE] * len(ARMS))
        axes.bar_label(drawn, fmt="%.0f", padding=3)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set(xlabel="milliseconds")
        return figure

    def find(self, measured: Mapping[str, Any]) -> Finding:
        """Finds whether a job with its result takes less than the report's start of a container."""
        medians = {arm: measured["arms"][arm]["median_ms"] for arm in ARMS}
        slowest = max(medians.values())
        holds = slowest < REPORTED_MS["report, crun"]
        sentence = (
            f"{'**Holds here**' if holds else '**Does not hold here**'}: the median job takes {slowest:.1f} ms at most."
        )
        rows = [
            ("start to result of an empty job", "median, ms", "95th percentile, ms"),
            *(
                (self._label(measured, arm), f"{medians[arm]:.1f}", f"{measured['arms'][arm]['p95_ms']:.1f}")
                for arm in ARMS
            ),
        ]
        machine = measured["machine"]
        where = f"{machine['cores']} cores of {machine['processor']}, at a load of {machine['load'][0]:.1f}"
        return Finding(f"{sentence} On {where}.", rows)

    @staticmethod
    def _label(measured: Mapping[str, Any], arm: str) -> str:
        names = {
            "zygote python": "Python, zygote",
            "crun python": "Python, crun",
            "crun lean": f"{measured['lean'].title()}, crun",
        }
        return names[arm]
