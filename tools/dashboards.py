"""Writes the Grafana dashboards in deploy/observability/grafana/dashboards: `python tools/dashboards.py`.

Panels are three to a row. `RATE` is Grafana's interval that spans enough scrapes for a rate.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "deploy/observability/grafana/dashboards"
RATE = "$__rate_interval"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, WIDTH, HEIGHT, STAT_HEIGHT = 3, 8, 8, 4


@dataclass(frozen=True)
class Panel:
    """Curves, or as a `stat` the latest values; `queries` are pairs of legend and PromQL expression."""

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    help: str = ""
    kind: str = "timeseries"
    stack: bool = False


def rate(metric: str, by: str) -> str:
    """Returns the rate of a counter, summed by labels."""
    return f"sum by ({by}) (rate({metric}[{RATE}]))"


def quantile(q: float, histogram: str, by: str = "") -> str:
    """Returns a quantile of a histogram, by labels."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({histogram}_bucket[{RATE}])))"


def trainer(name: str) -> str:
    """Returns a metric of the trainer's last iteration, as metrics.jsonl names it."""
    return f'perigee_trainer_iteration_metric{{name="{name}"}}'


def stat(title: str, legend: str, expression: str, unit: str = "short", text: str = "") -> Panel:
    """Returns a panel with the latest value."""
    return Panel(title, [(legend, expression)], unit, text, kind="stat")


RUN = [
    stat("Run", "{{run}}", "perigee_coordinator_run_info"),
    stat("Phase", "{{phase}}", "perigee_coordinator_run_phase == 1"),
    stat("Iteration", "iteration", "perigee_coordinator_iteration"),
    stat("Policy version", "version", "perigee_coordinator_policy_version_number"),
    stat("Mean reward", "reward", "perigee_coordinator_reward_mean"),
    stat("Rollout workers", "workers", "perigee_coordinator_workers"),
    Panel("Reward", [("mean of the iteration", "perigee_coordinator_reward_mean")]),
    Panel(
        "Time by phase",
        [("{{phase}}", rate("perigee_coordinator_phase_seconds_sum", "phase"))],
        "percentunit",
        "Share of the time that each phase takes; phases that overlap add up to more than one.",
        stack=True,
    ),
    Panel(
        "Failures", [("{{kind}}", rate("perigee_coordinator_failures_total", "kind"))], "ops", "By kind, per second."
    ),
    Panel(
        "Sequences",
        [
            ("waiting", "sum(perigee_coordinator_waiting_sequences)"),
            ("running", "sum(perigee_coordinator_running_sequences)"),
            ("capacity", "sum(perigee_coordinator_sequence_capacity)"),
        ],
        help="Waiting above zero with all capacity running: more rollout workers would help.",
    ),
    Panel("Loss and gradient norm", [("loss", trainer("train/loss")), ("norm", trainer("train/grad_norm"))]),
    Panel("Entropy", [("nats", trainer("train/entropy"))], help="Of the policy that opens the iteration."),
    Panel("KL", [("k1", trainer("train/kl_k1")), ("k3", trainer("train/kl_k3"))]),
    Panel(
        "Rollout against trainer",
        [
            ("KL", trainer("train/train_infer_kl")),
            ("mean difference of logprobs", trainer("train/train_infer_logprob_diff_mean")),
            ("largest", trainer("train/train_infer_logprob_diff_max")),
        ],
        help="Grows when engine and trainer compute different policies.",
    ),
    Panel(
        "Tokens left out of the loss",
        [("stale", trainer("train/mask_share")), ("clipped weight", trainer("train/clip_share"))],
        "percentunit",
    ),
]
ROLLOUT = [
    Panel("Generated tokens", [("{{instance}}", rate("perigee_rollout_generated_tokens_total", "instance"))], "ops"),
    Panel(
        "Sequences of each worker",
        [("{{instance}}", "perigee_rollout_running_sequences")],
        help="Accepted and not ended, those that wait in the engine included.",
    ),
    Panel("Use of the workers", [("running of capacity", "perigee:rollout_use:ratio")], "percentunit"),
    Panel("Segments by end", [("{{end_reason}}", rate("perigee_rollout_segments_total", "end_reason"))], "ops"),
    Panel(
        "Prompt and earlier tokens",
        [
            ("from the prefix cache", "sum(rate(perigee_rollout_cached_tokens_total[" + RATE + "]))"),
            ("prefilled", "sum(rate(perigee_rollout_prefilled_tokens_total[" + RATE + "]))"),
        ],
        "ops",
    ),
    Panel(
        "Append to the buffer",
        [
            ("p50", quantile(0.5, "perigee_rollout_append_seconds")),
            ("p95", quantile(0.95, "perigee_rollout_append_seconds")),
        ],
        "s",
    ),
    Panel("Policy version of each worker", [("{{instance}}", "perigee_rollout_policy_version")]),
    Panel(
        "Weight pushes",
        [("{{result}}", "sum by (result) (increase(perigee_weights_pushes_total[" + RATE + "]))")],
    ),
    Panel(
        "Weights on their way",
        [
            ("transfer p95", quantile(0.95, "perigee_weights_transfer_seconds")),
            ("checksums p95", quantile(0.95, "perigee_weights_verify_seconds")),
            ("load p95", quantile(0.95, "perigee_rollout_commit_seconds")),
        ],
        "s",
        "Generation stands still while weights are loaded, not while they are transferred.",
    ),
    Panel("Engine restarts", [("{{instance}}", "perigee_rollout_engine_restarts_total")]),
    Panel("Trained tokens", [("per second of the job", trainer("train/tokens_per_second"))], "ops"),
    Panel(
        "Time of a training job",
        [(name, trainer(f"time/{name}_seconds")) for name in ("read", "reference", "update")],
        "s",
        stack=True,
    ),
    Panel("Trainer memory", [("peak", trainer("train/peak_memory_bytes"))], "bytes"),
]
JUDGING = [
    Panel("Verdicts", [("{{verdict}}", rate("perigee_reward_outcomes_total", "verdict"))], "ops"),
    Panel("Items without a verdict", [("{{verifier}}", "perigee:reward_failed:ratio5m")], "percentunit"),
    Panel("Items under way", [("{{verifier}}", "sum by (verifier) (perigee_reward_queued_items)")]),
    Panel(
        "Time of a judgement, p95",
        [("{{verifier}}", quantile(0.95, "perigee_reward_judgement_seconds", "verifier"))],
        "s",
        "From an item's arrival to its outcome.",
    ),
    Panel(
        "Served by another's judgement", [("{{verifier}}", rate("perigee_reward_cache_hits_total", "verifier"))], "ops"
    ),
    Panel("Judge calls", [("{{judge}} {{end}}", rate("perigee_reward_judge_calls_total", "judge, end"))], "ops"),
    Panel("Judge tokens", [("{{judge}} {{kind}}", rate("perigee_reward_judge_tokens_total", "judge, kind"))], "ops"),
    Panel("Sandbox jobs", [("{{status}}", rate("perigee_sandbox_jobs_total", "status"))], "ops"),
    Panel(
        "Jobs that failed through no fault of theirs",
        [("share", "perigee:sandbox_infra_errors:ratio5m")],
        "percentunit",
    ),
    Panel(
        "Sandbox queue",
        [("waiting", "sum(perigee_sandbox_waiting_jobs)"), ("running", "sum(perigee_sandbox_busy_slots)")],
        help="Waiting above zero for long: more sandbox replicas would help.",
    ),
    Panel("Refused jobs", [("per second", "sum(rate(perigee_sandbox_refused_jobs_total[" + RATE + "]))")], "ops"),
    Panel(
        "Wait for a slot, and time in it",
        [
            ("wait p95", quantile(0.95, "perigee_sandbox_wait_seconds")),
            ("job p50", quantile(0.5, "perigee_sandbox_job_seconds")),
            ("job p95", quantile(0.95, "perigee_sandbox_job_seconds")),
        ],
        "s",
    ),
    Panel(
        "Slots cleared, sessions open",
        [
            ("cleared per second", rate("perigee_sandbox_cleared_slots_total", "job")),
            ("sessions", "sum(perigee_sandbox_sessions)"),
        ],
    ),
]
SERVICES = [
    Panel("Up and ready", [("{{job}} {{instance}}", "perigee_ready")], help="1 while /readyz is 200."),
    Panel("Versions", [("{{service}} {{version}}", "count by (service, version) (perigee_build_info)")]),
    Panel("Calls", [("{{job}}", "perigee:requests:rate5m")], "ops"),
    Panel(
        "Calls that fail",
        [("{{job}}", "perigee:request_errors:ratio5m")],
        "percentunit",
        "With a code that is the service's fault: INTERNAL, UNKNOWN, DATA_LOSS, UNAVAILABLE, DEADLINE_EXCEEDED.",
    ),
    Panel(
        "Time of a call, p95",
        [("{{job}}", "perigee:request_seconds:p95_5m")],
        "s",
        "Streams last as long as their work.",
    ),
    Panel("Memory", [("{{job}} {{instance}}", "process_resident_memory_bytes")], "bytes"),
    Panel("CPU", [("{{job}} {{instance}}", f"rate(process_cpu_seconds_total[{RATE}])")], help="Cores."),
    Panel("Open files", [("{{job}} {{instance}}", "process_open_fds")]),
    Panel(
        "Tokens through the buffer",
        [
            ("received", f"sum(rate(perigee_buffer_received_tokens_total[{RATE}]))"),
            ("read", f"sum(rate(perigee_buffer_read_tokens_total[{RATE}]))"),
        ],
        "ops",
    ),
    Panel(
        "Chunks by outcome",
        [("{{outcome}}", rate("perigee_buffer_chunks_total", "outcome"))],
        "ops",
        "`fenced` chunks come from workers that lost their lease.",
    ),
    Panel("Sync of a change to disk", [("p95", "perigee:buffer_durability_seconds:p95_5m")], "s"),
    Panel(
        "Leases, verdicts",
        [
            ("leases", "sum(rate(perigee_buffer_leases_total[" + RATE + "]))"),
            ("verdicts", "sum(rate(perigee_buffer_verdicts_total[" + RATE + "]))"),
        ],
        "ops",
    ),
]
DASHBOARDS = {
    "perigee-run": ("Perigee: run", RUN),
    "perigee-rollout": ("Perigee: rollout and trainer", ROLLOUT),
    "perigee-judging": ("Perigee: reward and sandbox", JUDGING),
    "perigee-services": ("Perigee: services", SERVICES),
}


def render_dashboard(uid: str, title: str, panels: Sequence[Panel]) -> dict[str, Any]:
    """Returns a dashboard as Grafana imports it: stats in their own rows, then the curves."""
    placed, x, y, height = [], 0, 0, STAT_HEIGHT
    for number, panel in enumerate(panels, start=1):
        own = STAT_HEIGHT if panel.kind == "stat" else HEIGHT
        if x == COLUMNS or (x and own != height):
            x, y = 0, y + height
        height = own
        placed.append(_render_panel(number, panel) | {"gridPos": {"x": x * WIDTH, "y": y, "w": WIDTH, "h": own}})
        x += 1
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return {
        "uid": uid,
        "title": title,
        "tags": ["perigee"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [source]},
        "links": [{"type": "dashboards", "tags": ["perigee"], "title": "Perigee", "asDropdown": True}],
        "panels": placed,
    }


def _render_panel(number: int, panel: Panel) -> dict[str, Any]:
    field: dict[str, Any] = {"unit": panel.unit, "custom": {}}
    options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    if panel.kind == "stat":
        # What a label says is shown as text, else the value.
        named = panel.queries[0][0].startswith("{{")
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "name" if named else "value"}
    elif panel.stack:
        field["custom"] = {"stacking": {"mode": "normal"}, "fillOpacity": 30}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": field, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + index), "legendFormat": legend, "expr": expression, "datasource": SOURCE}
            for index, (legend, expression) in enumerate(panel.queries)
        ],
    }


def render_all() -> dict[Path, str]:
    """Returns the text of each file."""
    return {
        FOLDER / f"{uid}.json": json.dumps(render_dashboard(uid, title, panels), indent=1) + "\n"
        for uid, (title, panels) in DASHBOARDS.items()
    }


if __name__ == "__main__":
    for path, text in render_all().items():
        path.write_text(text)
