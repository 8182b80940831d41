"""Alerts have tests and entries in the manual, dashboards are current, and promtool passes the rules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.test_docs_metrics import METRIC, ROOT, base_name, defined_metrics
from tools.dashboards import render_all

FOLDER = ROOT / "deploy/observability"


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


RULES = [rule for group in read("rules.yaml")["groups"] for rule in group["rules"]]
ALERTS = [rule["alert"] for rule in RULES if "alert" in rule]


def test_the_chart_has_the_same_rules() -> None:
    assert (ROOT / "deploy/helm/perigee/rules.yaml").read_text() == (FOLDER / "rules.yaml").read_text()


def test_the_dashboards_are_current() -> None:
    written = {path: path.read_text() for path in (FOLDER / "grafana/dashboards").glob("*.json")}
    assert written == render_all(), "run python tools/dashboards.py"


@pytest.mark.parametrize("path", render_all(), ids=lambda path: path.stem)
def test_a_dashboard_is_one_that_people_can_read(path: Path) -> None:
    panels = json.loads(path.read_text())["panels"]
    places = {(x, y) for p in panels for x, y in [(p["gridPos"]["x"], p["gridPos"]["y"])]}
    assert len(places) == len(panels) <= 16
    assert all(len(panel["targets"]) <= 3 for panel in panels)


def test_rules_and_dashboards_use_metrics_and_records_that_exist() -> None:
    texts = [rule["expr"] for rule in RULES]
    texts += [
        target["expr"] for text in render_all().values() for p in json.loads(text)["panels"] for target in p["targets"]
    ]
    metrics = {base_name(name) for text in texts for name in METRIC.findall(text) if not name.endswith("_")}
    assert metrics - defined_metrics() == set()
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    assert {name for text in texts for name in re.findall(r"perigee:[a-z0-9_:]+", text)} <= recorded


def test_every_alert_is_in_the_manual_and_tested_both_ways() -> None:
    manual = dict(re.findall(r"^### (\w+)\n(.*?)(?=^#|\Z)", (ROOT / "docs/alerts.md").read_text(), re.M | re.S))
    assert list(manual) == [*dict.fromkeys(manual)]
    assert set(manual) == set(ALERTS)
    assert all("**Means** " in text and "**Do** " in text for text in manual.values())
    firing, healthy = read("rules_test.yaml")["tests"]
    assert [test["alertname"] for test in firing["alert_rule_test"] if test["exp_alerts"]] == ALERTS
    assert [test["alertname"] for test in healthy["alert_rule_test"] if "exp_alerts" not in test] == ALERTS


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: checks rules and Prometheus' configuration"
)
@pytest.mark.parametrize("command", ["test rules rules_test.yaml", "check config prometheus.yaml"])
def test_promtool_passes(command: str) -> None:
    done = subprocess.run(["promtool", *command.split()], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
