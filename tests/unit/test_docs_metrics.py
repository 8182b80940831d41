"""Every metric that a page names is one that a service has."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVICES = "coordinator|rollout|trainer|reward|sandbox|buffer|weights"
METRIC = re.compile(rf"perigee_(?:{SERVICES})_[a-z_]+")


def defined_metrics() -> set[str]:
    """Names of metrics in the services' source, without the endings that Prometheus' format adds."""
    source = "".join(file.read_text() for file in sorted((ROOT / "services").rglob("*.py")))
    requests = {f"perigee_{each}_{kind}" for each in SERVICES.split("|") for kind in REQUESTS}
    return {base_name(name) for name in re.findall(rf'"({METRIC.pattern})"', source)} | requests


REQUESTS = ("request_seconds", "http_request_seconds")


def base_name(name: str) -> str:
    """Returns a metric's name without the ending of a sample."""
    return re.sub(r"_(total|bucket|sum|count|info)$", "", name)


def test_the_pages_name_metrics_that_exist() -> None:
    named = {
        name
        for page in sorted((ROOT / "docs").glob("*.md"))
        for name in METRIC.findall(page.read_text())
        if page.name != "configuration.md"
    }
    assert "perigee_rollout_ready" in named
    assert {name for name in named if base_name(name) not in defined_metrics()} == set()
