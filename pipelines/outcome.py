"""What a run ends with: a summary that a person reads, and the JSON object that a scheduler reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table as Grid

from pipelines.backfill import Backfilled
from pipelines.progress import answer_console
from pipelines.runner import Outcome
from pipelines.summary import Summary

WIDTH = 160  # of what goes into a file or a pipe
SYSTEMS = ("model", "popularity", "itemknn", "sasrec", "sasrec_itemknn")  # the order in which they are shown, others last


def stage_answer(outcome: Outcome) -> dict[str, Any]:
    """The last line of a single stage."""
    return {
        "stage": outcome.name,
        "status": outcome.status,
        "seconds": {outcome.name: round(outcome.seconds, 2)},
        "rows": outcome.result.rows,
        "tables": outcome.result.tables,
    } | ({"reason": outcome.result.skipped} if outcome.result.skipped else {})


def backfill_answer(found: Backfilled) -> dict[str, Any]:
    """The last line of a backfill; `rows` are those of the partitions that it wrote."""
    return {
        "stage": "backfill",
        "status": found.status,
        "seconds": {o.name: round(o.seconds, 2) for o in found.outcomes} | {"total": round(found.seconds, 2)},
        "rows": {table: part.rows for table, part in found.written.items()},
        "tables": {table: part.version for table, part in found.written.items()},
        "days": {table: [str(day) for day in part.days] for table, part in found.written.items()},
        "left": {o.name: o.result.skipped for o in found.outcomes if o.result.skipped},
        "would_run": found.would_run,
    }


def summary_answer(summary: Summary) -> dict[str, Any]:
    """The last line of a whole run."""
    tables = summary.tables()
    return {
        "stage": "run",
        "status": summary.status,
        "seconds": {o.name: round(o.seconds, 2) for o in summary.outcomes} | {"total": round(summary.seconds, 2)},
        "rows": {name: rows for name, (_, rows) in tables.items()},
        "tables": {name: version for name, (version, _) in tables.items()},
        "metrics": summary.manifests["evaluate"].get("metrics", {}),
        "model": summary.manifests["register"].get("model"),
        "peak_memory_bytes": summary.peak_memory_bytes,
        "report": str(summary.report) if summary.report else None,
    }


def print_summary(summary: Summary) -> None:
    """Tables, metrics, the model, ten recommendations and the report's path, on standard output."""
    console = answer_console(WIDTH)
    console.print()
    console.print(tables_grid(summary))
    evaluated = summary.manifests["evaluate"]
    console.print(metrics_grid(evaluated))
    for line in sample_lines(summary.samples):
        console.print(line, markup=False, soft_wrap=True)
    model = summary.manifests["register"].get("model") or {}
    alias = (
        f" (alias {model['alias']})" if model.get("alias") else f" (not promoted: {model.get('reason', 'gates failed')})"
    )
    console.print(f"\nModel    models:/{model.get('name')}/{model.get('version')}{alias}")
    console.print(f"Report   {summary.report}", soft_wrap=True)
    console.print(f"Took     {summary.seconds:.1f} s, at most {summary.peak_memory_bytes / 2**30:.1f} GiB of memory\n")


def tables_grid(summary: Summary) -> Grid:
    grid = Grid(title="Tables", title_justify="left")
    grid.add_column("table")
    grid.add_column("version", justify="right")
    grid.add_column("rows", justify="right")
    for name, (version, rows) in summary.tables().items():
        grid.add_row(name, str(version), f"{rows:,}")
    return grid


def metrics_grid(evaluated: dict[str, Any]) -> Grid:
    """Systems by metrics, each with its interval."""
    metrics = evaluated.get("metrics", {})
    names = [name for name in metrics.get("model", {}) if name.startswith(("recall", "ndcg"))]
    queries, targets = evaluated.get("queries", 0), evaluated.get("targets", 0)
    grid = Grid(title=f"Test: {queries:,} requests, {targets:,} positives, whole catalogue", title_justify="left")
    grid.add_column("system")
    for name in names:
        grid.add_column(name, justify="right")
    for system in in_order(metrics):
        cells = [metrics[system].get(name) for name in names]
        grid.add_row(system, *(interval_text(cell).replace(" [", "\n[") for cell in cells))
    return grid


def interval_text(cell: dict[str, float] | None) -> str:
    if cell is None:
        return "-"
    text = f"{cell['value']:.4f}"
    if cell.get("low") is not None:
        text += f" [{cell['low']:.4f}, {cell['high']:.4f}]"
    return text


def sample_lines(samples: list[dict[str, Any]]) -> list[str]:
    """One user a block: what they liked last, what the model recommends, and what they then did like (*)."""
    lines = ["", "Ten recommendations (* is what the user then liked in that request)"]
    for sample in samples[:10]:
        lines.append(f"  user {sample['user_id']}, who last saw: {'; '.join(sample['history']) or 'nothing yet'}")
        marks = ("*" if hit else " " for hit in sample["hits"])
        lines.extend(
            f"    {mark} {place}. {text}" for place, (mark, text) in enumerate(zip(marks, sample["items"], strict=True), 1)
        )
    return lines


def in_order(systems: Iterable[str]) -> list[str]:
    return sorted(systems, key=lambda system: SYSTEMS.index(system) if system in SYSTEMS else len(SYSTEMS))
