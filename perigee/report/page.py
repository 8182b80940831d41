"""Report page of a run: headline, plots with a sentence each, tables; it opens without a network."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from perigee.errors import InvalidArgumentError
from perigee.files import write_atomically
from perigee.image_sources import IMAGES_FOLDER, ImageStore
from perigee.images import ImageLimits, decode_image, read_image
from perigee.report import plots
from perigee.report.records import OVERALL, Change, RunRecords, changes, flatten, headline_lines, read_records
from perigee.report.samples import Sample, pick_each_kind, read_samples

TEMPLATE = Path(__file__).with_name("page.html")
REPORT_FILE = "report.html"
# Longest side of an image in the page.
THUMBNAIL_PIXELS = 224
SECRET_KEYS = ("token", "password", "secret")


@dataclass(frozen=True)
class Section:
    """Plot with its title and caption; `draw` returns None when the records lack what it shows."""

    id: str
    title: str
    caption: str
    draw: Callable[[RunRecords], go.Figure | None]


def lines(unit: str, *metrics: tuple[str, str], **axis: str) -> Callable[[RunRecords], go.Figure | None]:
    """Returns what draws metrics, each with its label, as lines over the iterations."""
    return lambda records: plots.plot_lines(records, unit, *metrics, **axis)


SECTIONS = (
    Section(
        "accuracy",
        "Held-out accuracy",
        "Problems kept out of all training data. Bands and bars are 95% intervals; sampled answers at temperature 1.",
        plots.plot_accuracy,
    ),
    Section(
        "reward",
        "Reward",
        "Mean reward of the responses of the groups that an iteration completed, before shaping.",
        plots.plot_reward,
    ),
    Section(
        "length",
        "Response length",
        "Tokens of the responses of completed groups.",
        lines("tokens", ("rollout/response_tokens/mean", "mean"), ("rollout/response_tokens/p95", "p95")),
    ),
    Section(
        "rates",
        "Partial and repeated trajectories",
        "Partial: stopped by the token budget and resumed later. Several versions: trained with tokens of more than "
        "one policy version. Repeated: cut for repeating themselves.",
        plots.plot_rates,
    ),
    Section(
        "staleness",
        "Tokens per policy version",
        "Tokens of the trained trajectories by how many policy versions old they were when they were trained on.",
        plots.plot_staleness,
    ),
    Section(
        "loss",
        "Loss",
        "Mean over the optimizer steps of an iteration.",
        lines("loss", ("train/loss", "loss"), rangemode="normal"),
    ),
    Section(
        "gradient",
        "Gradient norm",
        "Mean over the optimizer steps, before clipping.",
        lines("norm", ("train/grad_norm", "norm")),
    ),
    Section(
        "kl",
        "Policy KL",
        "KL per token between the policy that opens the iteration and the one that it trains, by two estimators.",
        lines("nats per token", ("train/kl_k3", "k3"), ("train/kl_k1", "k1"), rangemode="normal"),
    ),
    Section(
        "entropy",
        "Entropy",
        "Nats per token of the policy that opens the iteration.",
        lines("nats per token", ("train/entropy", "entropy")),
    ),
    Section(
        "rate",
        "Learning rate",
        "That of the iteration.",
        lines("learning rate", ("train/learning_rate", "rate"), tickformat=".1e"),
    ),
    Section(
        "uniform",
        "Groups without a signal",
        "Complete groups whose rewards agree: too easy or too hard for the model, they train nothing.",
        lines("fraction of groups", ("train/uniform_rate", "equal rewards"), tickformat=".0%"),
    ),
    Section(
        "speed",
        "Speed",
        "Tokens per second: generated in the rollout, and passed by the trainer.",
        lines("tokens per second", ("rollout/tokens_per_second", "rollout"), ("train/tokens_per_second", "trainer")),
    ),
    Section(
        "prefill",
        "Prefill",
        "Prompt and earlier tokens that workers computed, of these and the generated ones: what continuing costs.",
        lines("fraction of tokens", ("rollout/prefill_share", "prefilled"), tickformat=".0%"),
    ),
    Section(
        "memory",
        "Memory of the trainer",
        "Largest of its processes.",
        lines("bytes", ("train/peak_memory_bytes", "peak"), tickformat=".3s"),
    ),
    Section(
        "timeline",
        "Phases of the iterations",
        "Responses are scored as they finish, while others are still being generated. On shared devices workers leave "
        "and the trainer onloads before training; it converts and offloads before weights bring the workers back.",
        plots.plot_timeline,
    ),
    Section(
        "logprobs",
        "Engine against trainer",
        "Largest difference of the two engines' log-probabilities of the same token; the dashed line is 0.001.",
        plots.plot_logprob_diff,
    ),
)


@dataclass(frozen=True)
class Report:
    """Written report: its path, and its headline for a terminal."""

    path: Path
    headline: Sequence[str]


def write_report(run_path: Path) -> Report:
    """Writes the report of the records in `run_path` there.

    Raises DataLossError or InvalidArgumentError when the records cannot be read.
    """
    records = read_records(run_path)
    path = run_path / REPORT_FILE
    write_atomically(path, render_page(records).encode())
    return Report(path, headline_lines(records))


def render_page(records: RunRecords) -> str:
    """Returns the whole page as HTML."""
    figures: dict[str, Any] = {}
    parts = [_header(records), _cards(records), _accuracy_table(changes(records))]
    parts += [_warnings(records), _events(records)]
    parts.append(_samples(read_samples(records.path), ImageStore(records.path / IMAGES_FOLDER)))
    for section in SECTIONS:
        figure = section.draw(records)
        parts.append(f"<h2>{section.title}</h2><p class='quiet'>{section.caption}</p>")
        if figure is None:
            parts.append("<p class='missing'>The records of this run have no such metrics.</p>")
        else:
            figures[section.id] = json.loads(figure.to_json())
            parts.append(f"<figure id='{section.id}'></figure>")
    parts += [_totals(records), _configuration(records.recipe)]
    return fill_page(records.run_id, parts, figures)


def fill_page(title: str, parts: Sequence[str], figures: Mapping[str, Any]) -> str:
    """Returns a page as HTML; `parts` hold an empty element for each figure, whose id is its key."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{title} · Perigee"),
        body="\n".join(parts),
        plotly=get_plotlyjs(),
        # A closing tag inside a string would end the script.
        plots=json.dumps(figures).replace("</", "<\\/"),
    )


def _header(records: RunRecords) -> str:
    description = html.escape(str(records.recipe.get("description", "")))
    count = len(records.iterations)
    facts = [f"{count} iteration{'' if count == 1 else 's'}"]
    if tokens := records.summary.get("tokens_generated"):
        facts.append(f"{tokens:,} tokens generated")
    if trained := records.summary.get("trajectories_trained"):
        facts.append(f"{trained:,} trajectories trained")
    if not records.summary:
        facts.append("not finished: figures so far")
    lines = [f"<h1>{html.escape(records.run_id)}</h1>"]
    lines += [f"<p>{description}</p>"] if description else []
    return "\n".join([*lines, f"<p class='quiet'>{' · '.join(facts)}</p>"])


def _cards(records: RunRecords) -> str:
    cards = []
    for change in changes(records):
        if change.domain != OVERALL:
            continue
        cards.append(
            f"<div class='card'><div class='name'>Accuracy, {change.kind}</div>"
            f"<div class='value'>{change.before.mean:.1%}<span class='arrow'>→</span>{change.after.mean:.1%}</div>"
            f"<div class='{'gain' if change.gain >= 0 else 'loss'}'>{change.gain * 100:+.1f} points"
            f"{', intervals apart' if change.is_apart else ''}</div></div>"
        )
    for key, name, form in (
        ("train_infer_logprob_diff_max", "Largest logprob difference", "{:.1e}"),
        ("seconds/total", "Time in all", "{:,.0f} s"),
    ):
        value = flatten(records.summary).get(key)
        if isinstance(value, int | float):
            cards.append(
                f"<div class='card'><div class='name'>{name}</div><div class='value'>{form.format(value)}</div></div>"
            )
    return f"<div class='cards'>{''.join(cards)}</div>" if cards else ""


def _accuracy_table(found: list[Change]) -> str:
    if not found:
        return "<p class='missing'>Fewer than two evaluations: there is no accuracy to compare.</p>"
    rows = []
    for change in found:
        cells = [change.domain, change.kind]
        cells += [
            f"{estimate.mean:.1%} <span class='quiet'>{estimate.low:.1%} to {estimate.high:.1%}</span>"
            for estimate in (change.before, change.after)
        ]
        cells.append(f"{change.gain * 100:+.1f}")
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    head = "".join(f"<th>{name}</th>" for name in ("Domain", "Answers", "Before", "After", "Points"))
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _warnings(records: RunRecords) -> str:
    """The last warning of each metric, with the number of iterations that had one."""
    found: dict[str, list[str]] = {}
    for row in records.iterations:
        for key, text in (row.values.get("warnings") or {}).items():
            found.setdefault(key, []).append(f"iteration {row.number}: {text}")
    if not found:
        return ""
    lines = [
        f"<p class='warning'>{html.escape(texts[-1])} <span class='quiet'>{len(texts)} of "
        f"{len(records.iterations)} iterations</span></p>"
        for texts in found.values()
    ]
    return "<h2>Warnings</h2>" + "".join(lines)


def _events(records: RunRecords) -> str:
    """Workers that joined and left, engines and servers that started again, each with the iteration."""
    rows = [
        f"<tr><td>{row.number}</td><td class='number'>{event['seconds']:,.0f} s</td>"
        f"<td>{html.escape(event['event'])}</td></tr>"
        for row in records.iterations
        for event in row.values.get("events") or []
    ]
    if not rows:
        return ""
    head = "<tr><th>Iteration</th><th>Age of the run</th><th>Event</th></tr>"
    return f"<h2>Events</h2><table>{head}{''.join(rows)}</table>"


def _samples(samples: list[Sample], images: ImageStore) -> str:
    """The newest sample of each kind, whole."""
    parts = [
        "<h2>Samples</h2><p class='quiet'>The newest kept response of each kind; <code>perigee samples</code> shows "
        "the others.</p>"
    ]
    for sample in pick_each_kind(samples):
        reward = "no reward" if sample.reward is None else f"reward {sample.reward:g}"
        where = f"{sample.evaluation} evaluation, " if sample.evaluation else ""
        facts = (
            f"{where}iteration {sample.iteration} · {sample.domain} · {sample.verdict}, {reward} · "
            f"{sample.tokens:,} tokens, {sample.finish_reason} · answer {sample.extracted_answer or 'none'}"
        )
        parts.append(
            f"<details open><summary><b>{sample.kind}</b> <span class='quiet'>{html.escape(facts)}</span></summary>"
            f"{''.join(_picture(images.path(digest)) for digest in sample.images)}"
            f"<pre>{html.escape(sample.prompt)}</pre><pre>{html.escape(sample.response)}</pre>"
            f"<p class='quiet'>{html.escape(sample.reason)}</p></details>"
        )
    missing = "<p class='missing'>This run kept no samples: run.samples.count was 0, or it is older.</p>"
    return "\n".join(parts if samples else [parts[0], missing])


def _picture(path: Path) -> str:
    """A small copy of an image in the page itself; its name where the run's folder or this machine cannot show it."""
    if not path.is_file():
        return f"<p class='quiet'>Image {html.escape(path.name)} is not in this folder.</p>"
    try:
        picture = decode_image(read_image(path.read_bytes(), ImageLimits(path.stat().st_size), path.name))
    except InvalidArgumentError as error:
        return f"<p class='quiet'>{html.escape(error.message)}</p>"
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img class='picture' alt='{html.escape(path.name)}' src='data:image/png;base64,{data}'>"


def _totals(records: RunRecords) -> str:
    shown = {key: value for key, value in flatten(records.summary).items() if not key.startswith("accuracy_")}
    if not shown:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(key.replace('/', ' / '))}</td><td class='number'>{_format(value)}</td></tr>"
        for key, value in shown.items()
        if not isinstance(value, list)
    )
    return f"<h2>Totals</h2><table>{rows}</table>"


def _configuration(recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return ""
    parts = ["<h2>Configuration</h2><p class='quiet'>The recipe as it ran; fields not named keep their defaults.</p>"]
    top = {key: value for key, value in recipe.items() if not isinstance(value, Mapping)}
    for name, values in [("recipe", top), *((k, v) for k, v in recipe.items() if isinstance(v, Mapping))]:
        cells = [
            f"<td>{html.escape(key.replace('/', '.'))}</td><td><code>{html.escape(_show(key, value))}</code></td>"
            for key, value in flatten(values).items()
        ]
        rows = "".join(f"<tr>{cell}</tr>" for cell in cells)
        parts.append(
            f"<details{' open' if name == 'run' else ''}><summary>{html.escape(name)}</summary>"
            f"<table>{rows}</table></details>"
        )
    return "\n".join(parts)


def _show(key: str, value: Any) -> str:
    if any(secret in key.rpartition("/")[2] for secret in SECRET_KEYS) and isinstance(value, str | list):
        return "(not shown)"
    return json.dumps(value) if isinstance(value, list | bool) or value is None else str(value)


def _format(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return html.escape(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.4g}"
