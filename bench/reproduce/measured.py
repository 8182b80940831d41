"""Figures that are drawn from a file which another command measures: sandbox start times, noise of gradients."""

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

from bench.reproduce.arms import ARMS, SEEDS
from bench.reproduce.curves import RESULTS, geometric_interval
from bench.reproduce.drawing import Finding, add_legend, show
from bench.reproduce.runs import Run, metered_train
from perigee.files import write_atomically
from perigee.report.plots import BLUE, GREY, ORANGE

# Milliseconds from start to result, by the report's figure 4: before its changes and after.
REPORTED_MS = {"report, Docker": 120.0, "report, crun": 40.0}
STARTS = ("zygote python", "crun python", "crun lean")


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
        bars = {**REPORTED_MS, **{self._label(measured, arm): measured["arms"][arm]["median_ms"] for arm in STARTS}}
        figure, axes = plt.subplots()
        drawn = axes.barh(list(bars), list(bars.values()), color=[GREY] * len(REPORTED_MS) + [BLUE] * len(STARTS))
        axes.bar_label(drawn, fmt="%.0f", padding=3)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set(xlabel="milliseconds")
        return figure

    def find(self, measured: Mapping[str, Any]) -> Finding:
        """Finds whether a job with its result takes less than the report's start of a container."""
        medians = {arm: measured["arms"][arm]["median_ms"] for arm in STARTS}
        slowest = max(medians.values())
        holds = slowest < REPORTED_MS["report, crun"]
        sentence = (
            f"{'**Holds here**' if holds else '**Does not hold here**'}: the median job takes {slowest:.1f} ms at most."
        )
        rows = [
            ("start to result of an empty job", "median, ms", "95th percentile, ms"),
            *(
                (self._label(measured, arm), f"{medians[arm]:.1f}", f"{measured['arms'][arm]['p95_ms']:.1f}")
                for arm in STARTS
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


class GradientNoise:
    """How sure the direction of an update is with and without negative gradients, on the supervised models."""

    name = "gradients"

    def measure(self) -> None:
        """Measures with bench/reproduce/gradients.py on the supervised model of each seed."""
        measured = {}
        for seed in SEEDS:
            warmup = metered_train(Run(ARMS["warmup"], seed))
            command = [sys.executable, "-m", "bench.reproduce.gradients"]
            found = subprocess.run(
                [*command, str(warmup / "model"), str(warmup / "data/prompts.jsonl")],
                check=True,
                stdout=subprocess.PIPE,
            )
            measured[seed] = json.loads(found.stdout)
        write_atomically(RESULTS / f"{self.name}.json", f"{json.dumps(measured, indent=1)}\n".encode())

    def read(self) -> Mapping[str, Any] | None:
        """Returns what was measured, by seed; None where nothing was."""
        path = RESULTS / f"{self.name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def draw(self, measured: Mapping[str, Any]) -> Figure:
        """Draws noise by signal of both estimates, a pair of points for each seed."""
        figure, axes = plt.subplots(figsize=(4.6, 2.9))
        for estimate, label, color, style in (
            ("rest", "ReST", ORANGE, "s"),
            ("mirror_descent", "mirror descent", BLUE, "o"),
        ):
            axes.plot(
                list(measured), [noise_by_signal(each[estimate]) for each in measured.values()], style, color=color,
                label=label,
            )  # fmt: skip
        axes.set(xlabel="seed", ylabel="noise / signal of one group", ylim=(0, None))
        add_legend(figure, axes)
        return figure

    def find(self, measured: Mapping[str, Any]) -> Finding:
        """Finds by how much negative gradients change the noise."""
        ratio = geometric_interval(
            [noise_by_signal(each["mirror_descent"]) / noise_by_signal(each["rest"]) for each in measured.values()]
        )
        norms = geometric_interval([each["wrong"] / each["right"] for each in measured.values()])
        sentence = (
            f"The gradient of a wrong response has {show(norms, 1)} times the squared norm of a right one's, and "
            f"mirror descent's estimate {show(ratio, 2)} times the noise by signal of ReST's. Seeds: {len(measured)}."
        )
        rows = [
            (
                "seed",
                "accuracy",
                "squared norm, right",
                "squared norm, wrong",
                "noise / signal, ReST",
                "mirror descent",
            ),
            *(
                (
                    seed,
                    f"{each['accuracy']:.3f}",
                    f"{each['right']:.0f}",
                    f"{each['wrong']:.0f}",
                    f"{noise_by_signal(each['rest']):.1f}",
                    f"{noise_by_signal(each['mirror_descent']):.1f}",
                )
                for seed, each in measured.items()
            ),
        ]
        return Finding(sentence, rows)


def noise_by_signal(estimate: Mapping[str, float]) -> float:
    """Returns the noise of one group's estimate by its signal."""
    return estimate["noise"] / estimate["signal"]
