"""What operators see of a run: traces that can be drawn, metrics that promtool passes, dashboards with data."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter

import pytest
import yaml

from perigee.cli.recipe import SERVICES
from tests.fixtures.observed import OBSERVABILITY
from tests.fixtures.training import TrainedRun

pytestmark = pytest.mark.timeout(600)
PHASES = {"preparation", "rollout", "scoring", "training", "checkpoint", "commit", "weights"}


def test_each_iteration_is_a_trace_with_its_phases_linked_with_the_run(trained_run: TrainedRun) -> None:
    resumed = trained_run.watch.resumed
    [run], iterations = resumed.named("run"), resumed.named("iteration")
    numbers = [span.attributes["perigee.iteration"] for span in iterations]
    assert numbers == list(range(numbers[0], 6))
    for root in iterations:
        assert not root.parent_id
        assert run.span_id in root.links
        assert root.span_id in run.links
        spans = resumed.trace(root.trace_id)
        phases = {span.name for span in spans if span.parent_id == root.span_id and not span.name.startswith("/")}
        assert {"preparation", "rollout", "scoring", "commit"} <= phases <= PHASES
        assert all(span.attributes["perigee.run"] == trained_run.path.name for span in spans)
        assert {span.attributes["perigee.iteration"] for span in spans} == {root.attributes["perigee.iteration"]}


def test_no_trace_grows_with_the_run_and_no_span_lacks_its_parent(trained_run: TrainedRun) -> None:
    spans = trained_run.watch.resumed.spans
    ids = {span.span_id for span in spans}
    assert [span.name for span in spans if span.parent_id and span.parent_id not in ids] == []
    sizes = Counter(span.trace_id for span in trained_run.watch.collector.spans)
    print(f"{sizes.total()} spans in {len(sizes)} traces, at most {max(sizes.values())} in one")
    # A call to a worker or to the reward service is bounded by its batch, whatever the iteration.
    assert max(sizes.values()) < 400


def test_segments_judgements_redis_and_transfers_have_spans_of_their_own(trained_run: TrainedRun) -> None:
    resumed = trained_run.watch.resumed
    assert {span.service for span in resumed.spans} == {f"perigee-{name}" for name in SERVICES}
    segment = next(span for span in resumed.named("segment") if "perigee.trajectory" in span.attributes)
    assert {"perigee.worker", "perigee.version", "perigee.tokens", "perigee.end"} <= segment.attributes.keys()
    [dispatch] = [span for span in resumed.named("dispatch") if span.trace_id == segment.trace_id]
    assert not dispatch.parent_id
    assert {span.attributes["perigee.verifier"] for span in resumed.named("judge")} == {"math", "code"}
    for name in ("redis append", "redis commit_iteration", "transfer weights", "load weights", "update"):
        assert resumed.named(name), name
    assert resumed.named("wait for a slot")


def test_probes_heartbeats_and_the_engine_are_left_out(trained_run: TrainedRun) -> None:
    names = {span.name for span in trained_run.watch.collector.spans}
    assert not [name for name in names if name.rpartition("/")[2] in ("Check", "RenewLease", "GetState", "WatchRun")]
    assert not [name for name in names if "load_model" in name.lower() or "vllm" in name.lower()]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: checks the metrics of each service")
def test_promtool_passes_each_services_metrics(trained_run: TrainedRun) -> None:
    assert set(trained_run.watch.texts) == set(SERVICES)
    for name, text in trained_run.watch.texts.items():
        own = "".join(
            line for line in text.splitlines(keepends=True) if " perigee_" in line or line.startswith("perigee_")
        )
        done = subprocess.run(["promtool", "check", "metrics"], input=own, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), f"{name}: {done.stdout}{done.stderr}"
        assert f'perigee_build_info{{service="{name}"' in text


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus: scrapes a run for the dashboards")
def test_every_expression_of_the_dashboards_has_data(trained_run: TrainedRun) -> None:
    empty = []
    for path in sorted((OBSERVABILITY / "grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "30s")
                if not trained_run.watch.query(expression):
                    empty.append(f"{path.stem}: {panel['title']}: {expression}")
    assert empty == []


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus: evaluates the rules over a run")
def test_every_service_gets_ready_and_no_alert_outlasts_a_restart(trained_run: TrainedRun) -> None:
    watch = trained_run.watch
    ready = {series["metric"]["job"] for series in watch.query("perigee_ready == 1")}
    assert ready == {f"perigee-{name}" for name in SERVICES}
    groups = yaml.safe_load((OBSERVABILITY / "rules.yaml").read_text())["groups"]
    # The others fire where a service is away for minutes, which a start takes on a machine with much else to do.
    at_once = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule and "for" not in rule}
    firing = {series["metric"]["alertname"] for series in watch.query('ALERTS{alertstate="firing"}')}
    assert firing & at_once == set()
    alive = f"count(up == 1) == {len(SERVICES)}"
    assert watch.query(f"({alive}) unless on () ALERTS", watch.resumed_at), watch.query("ALERTS", watch.resumed_at)
