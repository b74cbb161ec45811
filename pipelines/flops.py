"""`lazyrec flops`: what a model and its peers cost, by formulas, and the same formulas beside the paper's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from model.flops import FORWARD_AND_BACKWARD, activations, forward_flops, kv_elements, paper_gflops, parameters
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.model_config import ModelConfig
from schemas.model_sizes import CODES, SIZES, peers

BATCH = 512  # samples behind the paper's activations and keys and values
PAPER_CONTEXT, PAPER_TARGETS = 512, 5


@dataclass(frozen=True)
class Cost:
    """Of one model; operations and elements are a target's, with the context shared by the request's targets."""

    name: str
    embeddings: int
    pathways: int  # parameters of pathways and processor or encoder
    blocks: int
    active: int
    heads: int
    context_gflops: float  # forward
    target_gflops: float  # forward
    trained_gflops: float  # forward and backward
    activations: float
    kv_elements: float


@dataclass(frozen=True)
class Printed:
    """A figure of the papers beside ours."""

    table: str
    row: str
    what: str
    printed: float
    ours: float

    @property
    def difference(self) -> float:
        return self.ours / self.printed - 1


def cost_of(name: str, config: ModelConfig, sizes: Sequence[int], context: int, targets: int) -> Cost:
    made, work = parameters(config, sizes), forward_flops(config, sizes, context, targets)
    shared = (work.features + work.context) / targets / 1e9
    target = work.target / targets / 1e9
    return Cost(
        name,
        made.embeddings,
        made.context,
        made.blocks,
        made.active,
        made.heads,
        shared,
        target,
        FORWARD_AND_BACKWARD * (shared + target),
        activations(config, sizes, context, targets) / targets,
        kv_elements(config, context) / targets,
    )


def paper_rows() -> list[Printed]:
    """OneRec-V2's Tables 1 to 4 by its own way of counting, see `model.flops.paper_gflops`."""
    rows = []
    for context, whole, naive in ((512, 346.0, 632.0), (3000, 1988.0, 3618.0)):  # a nominal billion of parameters
        tokens = context / PAPER_TARGETS
        encoder = 6 * (0.5 + 0.05) * tokens + 6 * 0.45 * 3
        rows.append(Printed("1", f"encoder-decoder 0.5B:0.5B, N = {context}", "GFLOPs", whole, encoder))
        rows.append(Printed("1", f"decoder-only 1B, N = {context}", "GFLOPs", naive, 6 * (tokens + 3)))
        rows.append(Printed("1", f"lazy 1B, N = {context}", "GFLOPs", 18.0, 6.0 * 3))
    table_2 = {
        "v2-0.1b": ((25.64, 4.21), (17.72, 2.92), (63.78, 7.52), (1.98, 0.31)),
        "v2-0.5b": ((142.73, 10.79), (104.73, 7.94), (317.68, 19.28), (9.55, 0.77)),
        "v2-1b": ((296.36, 17.63), (204.21, 12.20), (634.83, 31.53), (18.89, 1.24)),
    }
    for size, figures in table_2.items():
        others = peers(SIZES[size])
        shapes = (others["encoder-decoder 1:1"], others["encoder-decoder 1:2"], others["decoder-only"], SIZES[size])
        names = ("encoder-decoder 1:1", "encoder-decoder 1:2", "decoder-only", "lazy")
        for name, shape, (gflops, elements) in zip(names, shapes, figures, strict=True):
            row = f"{name}, {size.removeprefix('v2-')}"
            rows.append(Printed("2", row, "GFLOPs", gflops, paper_gflops(shape, PAPER_CONTEXT, PAPER_TARGETS)))
            left = activations(shape, CODES, PAPER_CONTEXT, PAPER_TARGETS) / PAPER_TARGETS * BATCH
            rows.append(Printed("2", row, "activations, 10^9", elements, left / 1e9))
    base = SIZES["v2-1b"]
    table_3 = [(replace(base, s_kv=2), 19.19)]
    table_3 += [(replace(base, l_kv=l_kv), gflops) for l_kv, gflops in ((1, 18.89), (3, 19.49), (9, 21.27), (18, 23.95))]
    for shape, gflops in table_3:
        ours = paper_gflops(shape, PAPER_CONTEXT, PAPER_TARGETS)
        rows.append(Printed("3", f"L_kv = {shape.l_kv}, S_kv = {shape.s_kv}", "GFLOPs", gflops, ours))
    for g_kv, gflops, elements in ((14, 18.89, 94.0), (7, 18.74, 47.0), (2, 18.64, 13.0), (1, 18.62, 7.0)):
        grouped = replace(base, g_kv=g_kv)
        rows.append(Printed("4", f"G_kv = {g_kv}", "GFLOPs", gflops, paper_gflops(grouped, PAPER_CONTEXT, PAPER_TARGETS)))
        ours = kv_elements(grouped, PAPER_CONTEXT) / PAPER_TARGETS * BATCH / 1e6
        rows.append(Printed("4", f"G_kv = {g_kv}", "keys and values, 10^6", elements, ours))
    return rows


@dataclass(frozen=True)
class Report:
    context: int
    targets: int
    costs: list[Cost]
    printed: list[Printed]


def report(config: Config, size: str | None, context: int | None, targets: int) -> Report:
    """Of the configuration's model, or of one of the papers' sizes; `context` tokens, by default as many as it can read.
    Raises ConfigError for another name or numbers below 1."""
    if size is not None and size not in SIZES:
        raise ConfigError(f"--size {size} is none of the papers' sizes: {', '.join(SIZES)}.")
    model, sizes = (SIZES[size], CODES) if size else (config.model, config.tokenize.sizes)
    tokens = model.context_length if context is None else context
    least = 1 + model.lifelong_queries
    if tokens < least or targets < 1:
        raise ConfigError(f"--context must be at least {least} and --targets at least 1.")
    own = f"{size or config.name} ({model.architecture.replace('_', '-')})"
    shapes = {own: model} | peers(model)
    costs = [cost_of(name, shape, sizes, tokens, targets) for name, shape in shapes.items()]
    return Report(tokens, targets, costs, paper_rows())


def answer(found: Report) -> dict[str, Any]:
    """The JSON line."""
    printed = [asdict(row) | {"difference": row.difference} for row in found.printed]
    about = {"context": found.context, "targets": found.targets}
    return {"stage": "flops", "status": "done"} | about | {"models": [asdict(c) for c in found.costs], "paper": printed}


def print_report(found: Report, console: Console) -> None:
    console.print(f"{found.context} context tokens, {found.targets} targets a request; operations and elements a target\n")
    parameter_names = ("blocks, M", "active, M", "context, M", "heads, M", "embeddings, M")
    work_names = ("context, GFLOP", "target", "with backward", "of the first", "activations, M", "K and V, M")
    grid = _grid(["model"], [*parameter_names, *work_names])
    for cost in found.costs:
        counts = (cost.blocks, cost.active, cost.pathways, cost.heads, cost.embeddings)
        gflops = (cost.context_gflops, cost.target_gflops, cost.trained_gflops)
        share = cost.trained_gflops / found.costs[0].trained_gflops
        elements = (cost.activations, cost.kv_elements)
        cells = [f"{n / 1e6:,.2f}" for n in counts] + [f"{n:.4g}" for n in gflops]
        grid.add_row(cost.name, *cells, f"{share:.2f}", *(f"{n / 1e6:.4g}" for n in elements))
    console.print(grid)
    console.print("\nThe paper's tables, by its way of counting (OneRec-V2, appendix B)\n")
    grid = _grid(["table", "row", "figure"], ["printed", "ours", "difference"])
    for row in found.printed:
        grid.add_row(row.table, row.row, row.what, f"{row.printed:g}", f"{row.ours:.4g}", f"{row.difference:+.1%}")
    console.print(grid)


def _grid(names: Sequence[str], numbers: Sequence[str]) -> Grid:
    grid = Grid(*names)
    for name in numbers:
        grid.add_column(name, justify="right")
    return grid
