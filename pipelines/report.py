"""The HTML report of a run: one self-contained file that a person opens, no server and no network needed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from pipelines import report_plots as plots
from pipelines.codebook_report import quality
from pipelines.outcome import in_order, interval_text
from pipelines.summary import Summary
from schemas.lake import Lake
from schemas.loader import to_mapping

TEMPLATE = "report_template.html"
SAMPLED_FILES = 32  # of training_examples, for the histogram of context lengths: enough to see its shape


def write_report(summary: Summary) -> Path:
    """Writes `reports/NAME.html` beside the artifacts and returns its path."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template(TEMPLATE).render(**content(summary))
    path = summary.lake.home / "reports" / f"{summary.config.name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    return path.resolve()


def content(summary: Summary) -> dict[str, Any]:
    """Everything the template shows."""
    evaluated = summary.manifests["evaluate"]
    return {
        "name": summary.config.name,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "days": summary.calendar,
        "tables": summary.tables(),
        "ingested": summary.ingested,
        "outcomes": summary.outcomes,
        "seconds": summary.seconds,
        "peak_gib": summary.peak_memory_bytes / 2**30,
        "metrics": metric_rows(evaluated),
        "metric_names": metric_names(evaluated),
        "differences": difference_rows(evaluated),
        "evaluated": evaluated,
        "systems": in_order(evaluated.get("metrics", {})),
        "breakdowns": breakdown_rows(evaluated),
        "samples": summary.samples,
        "model": summary.manifests["register"].get("model") or {},
        "gates": summary.manifests["register"].get("gates") or [],
        "train": summary.manifests["train"],
        "notes": [note for m in summary.manifests.values() for note in m.get("notes", [])],
        "snapshot": summary.config.source.items_dated_by == "snapshot",
        "config": to_mapping(summary.config),
        **pictures(summary),
    }


def metric_names(evaluated: dict[str, Any]) -> list[str]:
    return [name for name in evaluated.get("metrics", {}).get("model", {}) if name.startswith(("recall", "ndcg"))]


def metric_rows(evaluated: dict[str, Any]) -> list[tuple[str, list[str]]]:
    metrics = evaluated.get("metrics", {})
    return [(s, [interval_text(metrics[s].get(n)) for n in metric_names(evaluated)]) for s in in_order(metrics)]


def difference_rows(evaluated: dict[str, Any]) -> list[tuple[str, list[str]]]:
    differences = evaluated.get("differences", {})
    names = metric_names(evaluated)
    return [(baseline, [interval_text(cells.get(n)) for n in names]) for baseline, cells in differences.items()]


def breakdown_rows(evaluated: dict[str, Any]) -> list[tuple[str, str, int, list[str]]]:
    """(kind, group, targets, recall@10 of each system in order)."""
    rows, systems = [], in_order(evaluated.get("metrics", {}))
    for kind, groups in evaluated.get("breakdowns", {}).items():
        for group, cell in groups.items():
            values = [cell["recall@10"].get(system) for system in systems]
            rows.append((kind, group, cell["targets"], ["-" if v is None else f"{v:.4f}" for v in values]))
    return rows


def pictures(summary: Summary) -> dict[str, Any]:
    """`codebook`, what it is worth, and `images`, plots by name; one whose data is not there yet is left out."""
    found, drawn = quality(summary.lake) or (None, {})
    makers: dict[str, Callable[[], Figure | None]] = {
        "funnel": lambda: funnel_figure(summary),
        "lengths": lambda: lengths_figure(summary.lake),
        "loss": lambda: loss_figure(summary.manifests["train"]),
        "alignment": lambda: loss_figure(summary.manifests["align"]),
        "recall": lambda: metrics_figure(summary.manifests["evaluate"], "recall"),
        "ndcg": lambda: metrics_figure(summary.manifests["evaluate"], "ndcg"),
    }
    figures = {name: make() for name, make in makers.items()}
    shown = {name: figure for name, figure in (figures | drawn).items() if figure is not None}
    return {"codebook": found, "images": {name: plots.as_image(figure) for name, figure in shown.items()}}


def funnel_figure(summary: Summary) -> Figure | None:
    rows = summary.ingested.get("rows")
    if not rows:
        return None
    train, evaluated = summary.manifests["train"], summary.manifests["evaluate"]
    steps = [("rows read", rows["read"]), ("impressions kept", rows["kept"])]
    steps += [(f"{kind} rows", rows[kind]) for kind in ("duplicates", "rejected") if rows.get(kind)]
    steps += (
        [("training targets, all epochs", int(train["metrics"]["targets"]))]
        if "targets" in train.get("metrics", {})
        else []
    )
    steps += [("test positives", evaluated["targets"])] if "targets" in evaluated else []
    return plots.funnel(steps)


def lengths_figure(lake: Lake) -> Figure | None:
    if not lake.exists("training_examples"):
        return None
    dataset = lake.open("training_examples").to_pyarrow_dataset()
    fragments = list(dataset.get_fragments())[:SAMPLED_FILES]
    tables = [fragment.to_table(columns=["history_end", "target_start"]) for fragment in fragments]
    context = [table.column("history_end").combine_chunks().flatten().to_numpy() for table in tables]
    targets = [np.diff(table.column("target_start").combine_chunks().flatten().to_numpy()) for table in tables]
    if not context:
        return None
    shown = np.concatenate(targets)
    return plots.histogram(
        {"events in a request's context": np.concatenate(context), "impressions a request": shown[shown > 0]}
    )


def loss_figure(trained: dict[str, Any]) -> Figure | None:
    series = {name: points for name, points in trained.get("series", {}).items() if points and "loss" in name}
    return plots.curves(series) if series else None


def metrics_figure(evaluated: dict[str, Any], kind: str) -> Figure | None:
    metrics = evaluated.get("metrics")
    return plots.metric_bars(metrics, kind) if metrics else None
