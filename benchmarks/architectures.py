"""The lazy decoder beside its peers at equal parameters: operations, time and memory of a training step.

A sample is one target; `k` targets share a context of N tokens (1 static, 19 short-term ones or fewer, the rest positive
ones). A step is forward, backward and AdamW over made-up requests that fill the context. All architectures share pathways,
code embeddings, heads and PyTorch's fused attention; `parameters` are the rest: blocks and what makes the keys and values.
`T5` is Hugging Face's, trained as re-implementations of TIGER do: the codes of the N - 1 newest items as one sequence of
three tokens an item, one sample a target, each with a context of its own.

GFLOPs  forward and backward of a sample, by model/flops.py; PyTorch's counter confirms it on one step (`counted`)
ms      wall time of a sample, the median of the steps after the first ones
peak    MiB: of the GPU, or of the whole process beside what imports take
share   the rate of those operations to that of the device's own product of matrices of the same type, measured at the start

    python -m benchmarks.architectures [--grid] [--only SYSTEM] [--fresh]

On a CPU a cell is a process with one thread, in float32; on a GPU cells follow each other, in bfloat16, and the paper's
sizes come first. A cell that is in benchmarks/out is not measured again; a plot lies there. FULL=1: 20 steps on a CPU and
30M parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if "--cell" in sys.argv:
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # before the libraries look
        os.environ[variable] = "1"

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_requests import full_requests, random_items
from model.architectures import build_decoder
from model.device_rate import peak_rate
from model.flops import FORWARD_AND_BACKWARD, forward_flops, parameters
from pipelines.report_plots import canvas, save_svg
from schemas.model_config import ModelConfig, MoeConfig
from schemas.model_sizes import CODES, SIZES, peers

OUT = Path(__file__).resolve().parent / "out" / "architectures.jsonl"
FULL = os.environ.get("FULL") == "1"
GPU = torch.cuda.is_available()
ITEMS, K = 20_000, 5
HEAD, SHORT = 16, 19
SMALL_CODES = (256, 256, 256)
DEPTHS = {"3M": 6, "10M": 6, "30M": 12}
SYSTEMS = ("lazy", "encoder-decoder 1:1", "encoder-decoder 1:2", "decoder-only")
GRID: dict[str, dict[str, Any]] = {
    "lazy": {},
    "lazy, S_kv 2": {"s_kv": 2},
    "lazy, L_kv 3": {"l_kv": 3},
    "lazy, L_kv 6": {"l_kv": 6},
    "lazy, G_kv half": {"g_kv": 0.5},
    "lazy, G_kv 1": {"g_kv": 0},
    "lazy, 16 experts of which 3": {"moe": True},
}
PAPER = ("v2-0.1b", "v2-0.5b", "v2-1b")
T5 = "T5, as TIGER"


@dataclass(frozen=True)
class Cell:
    system: str
    size: str  # of DEPTHS, or a name of the paper
    context: int
    requests: int  # a step
    steps: int


def config_of(cell: Cell) -> ModelConfig:
    """Of the configured depth, at the width whose parameters are nearest to the size's."""
    if cell.size in SIZES:
        return system_of(SIZES[cell.size], cell.system)
    wanted = float(cell.size.removesuffix("M")) * 1e6
    system = cell.system if cell.system in SYSTEMS else "lazy"
    widths = (system_of(_of_width(heads, cell), system) for heads in range(1, 60))
    config = min(widths, key=lambda c: abs(core(c) - wanted))
    changes = dict(GRID.get(cell.system, {}))
    if "g_kv" in changes:
        halves = [g for g in range(1, config.heads + 1) if config.heads % g == 0]
        changes["g_kv"] = halves[0] if changes["g_kv"] == 0 else halves[-2]
    if "moe" in changes:  # as many parameters awake as dense ones
        changes["moe"] = MoeConfig(experts=16, active=3, shared=1, width=config.d_model, first_dense=2)
    return replace(config, **changes)


def system_of(lazy: ModelConfig, system: str) -> ModelConfig:
    return lazy if system == "lazy" else peers(lazy)[system]


def _of_width(heads: int, cell: Cell) -> ModelConfig:
    short = min(SHORT, cell.context // 2)
    return ModelConfig(
        d_model=HEAD * heads,
        heads=heads,
        g_kv=heads,
        embed_dim=32,
        short_length=short,
        positive_length=cell.context - 1 - short,
        hash_buckets=2000,
        dropout=0.0,
        layers=DEPTHS[cell.size],
    )


def core(config: ModelConfig) -> int:
    """Parameters of blocks and processor or encoder, as model/flops.py would count them, for a search over widths."""
    d, groups = config.d_model, config.d_model // config.heads * config.g_kv
    if config.architecture == "lazy":
        return config.layers * 18 * d * d + config.s_kv * config.l_kv * groups * d
    if config.architecture == "decoder_only":
        return config.layers * 16 * d * d
    return config.encoder_layers * 16 * d * d + config.layers * 20 * d * d


def measure(cell: Cell, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated() if GPU else _resident()
    config = config_of(cell)
    step, figures = _t5_step(cell, config, device) if cell.system == T5 else _step(cell, config, device)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(cell.steps + 3):
        started = time.perf_counter()
        step()
        if GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = (torch.cuda.max_memory_allocated() if GPU else _resident()) - before
    samples = cell.requests * K
    figures |= {"ms": 1000 * statistics.median(seconds[3:]) / samples, "peak": peak / 2**20}
    return figures


def training_step(model: nn.Module, loss_of: Callable[[], Tensor], device: str) -> Callable[[], None]:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=GPU):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _step(cell: Cell, config: ModelConfig, device: str) -> tuple[Callable[[], None], dict[str, Any]]:
    sizes = CODES if cell.size in SIZES else SMALL_CODES
    with torch.device(device):
        decoder = build_decoder(config, sizes, engaged_mask=1)
    events = max(config.short_length, config.positive_length)
    requests = full_requests(cell.requests, events, K, ITEMS).to(device)
    items = random_items(ITEMS, sizes, config.hash_buckets).to(device)
    step = training_step(decoder, lambda: decoder.loss(requests, items).total, device)
    flops = FORWARD_AND_BACKWARD * forward_flops(config, sizes, cell.context, K, cell.requests).total
    with FlopCounterMode(display=False) as counter:
        step()
    made = parameters(config, sizes)
    return step, {
        "parameters": made.blocks + made.context,
        "gflops": flops / (cell.requests * K) / 1e9,
        "counted": counter.get_total_flops() / flops,
        "width": config.d_model,
    }


def _t5_step(cell: Cell, config: ModelConfig, device: str) -> tuple[Callable[[], None], dict[str, Any]]:
    from transformers import T5Config, T5ForConditionalGeneration

    half = DEPTHS[cell.size] // 2
    wanted = float(cell.size.removesuffix("M")) * 1e6
    width = min(range(HEAD, 2000, HEAD), key=lambda d: abs(half * (16 + 20) * d * d - wanted))  # gated, d_ff = 4 d
    model: nn.Module = T5ForConditionalGeneration(
        T5Config(
            vocab_size=2 + sum(SMALL_CODES),
            d_model=width,
            d_kv=HEAD,
            num_heads=width // HEAD,
            d_ff=4 * width,
            num_layers=half,
            num_decoder_layers=half,
            feed_forward_proj="gated-silu",
            dropout_rate=0.0,
            decoder_start_token_id=0,  # type: ignore[call-arg]  # kept by the base class
        )
    )
    model.to(device)
    samples = cell.requests * K
    tokens = torch.randint(2, 2 + sum(SMALL_CODES), (samples, 3 * (cell.context - 1)), device=device)
    labels = torch.randint(2, 2 + sum(SMALL_CODES), (samples, 3), device=device)
    step = training_step(model, lambda: model(input_ids=tokens, labels=labels).loss, device)
    with FlopCounterMode(display=False) as counter:
        step()
    count = sum(p.numel() for p in model.parameters()) - sum(
        m.weight.numel() for m in {id(m.weight): m for m in model.modules() if isinstance(m, nn.Embedding)}.values()
    )
    return step, {
        "parameters": count,
        "gflops": counter.get_total_flops() / samples / 1e9,
        "counted": 1.0,
        "width": width,
    }


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cells(grid: bool) -> list[Cell]:
    found = []
    if GPU and not grid:
        for size in PAPER:
            found += [Cell("lazy", size, 512, 256, 10), Cell("lazy", size, 512, 32, 10)]
            found += [Cell("encoder-decoder 1:1", size, 512, 32, 10)]
        found += [Cell("decoder-only", PAPER[0], 512, 32, 10)]
    systems = list(GRID) if grid else [*SYSTEMS, T5]
    sizes = ["10M"] if grid else [size for size in DEPTHS if FULL or GPU or size != "30M"]
    for size in sizes:
        for context in (512,) if grid else (64, 256, 512):
            requests = 128 if GPU else {64: 16, 256: 8, 512: 4}[context]
            for system in systems:
                alone = system == T5 and not GPU  # it takes as long for a request as others for many
                steps = 4 if alone else 20 if GPU or FULL else 8
                found.append(Cell(system, size, context, 1 if alone else requests, steps))
    return found


def row_of(cell: Cell, kept: dict[str, dict[str, Any]], peak: float) -> dict[str, Any]:
    key = json.dumps([*vars(cell).values(), "gpu" if GPU else "cpu"])
    if key not in kept:
        if GPU:
            figures = measure(cell, "cuda")
            torch.cuda.empty_cache()
        else:
            command = [sys.executable, "-m", "benchmarks.architectures", "--cell", json.dumps(vars(cell))]
            answer = subprocess.run(command, capture_output=True, text=True)
            if answer.returncode:
                raise RuntimeError(f"{cell}: {answer.stderr[-2000:]}")
            figures = json.loads(answer.stdout.splitlines()[-1])
        kept[key] = figures | {"share": figures["gflops"] * 1e12 / figures["ms"] / peak}
        with OUT.open("a") as file:
            file.write(json.dumps({"key": key, **kept[key]}) + "\n")
    return kept[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", action="store_true", help="L_kv, S_kv, G_kv and experts instead of the peers")
    parser.add_argument("--only", action="append", default=[], help="these systems alone, beside lazy")
    parser.add_argument("--fresh", action="store_true", help="measure every cell again")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if GPU else "cpu"
    if options.cell:
        print(json.dumps(measure(Cell(**json.loads(options.cell)), device)))
        return
    OUT.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    peak = peak_rate(torch.device(device), torch.bfloat16 if GPU else torch.float32)
    print(f"{torch.cuda.get_device_name() if GPU else 'CPU, one thread'}: {peak / 1e9:,.0f} GFLOP/s of matrix products\n")
    lines = OUT.read_text().splitlines() if OUT.is_file() and not options.fresh else []
    kept = {row.pop("key"): row for row in map(json.loads, lines)}
    head = "size | context | requests | system | width | parameters, M | GFLOPs | of lazy | counted | ms | of lazy | peak"
    print(f"| {head} | share |\n|{'---|' * (head.count('|') + 2)}")
    lazy: dict[str, Any] = {}
    drawn: dict[Cell, dict[str, Any]] = {}
    for cell in cells(options.grid):
        if options.only and cell.system not in ("lazy", *options.only):
            continue
        try:
            row = row_of(cell, kept, peak)
        except torch.cuda.OutOfMemoryError:
            print(f"| {cell.size} | {cell.context} | {cell.requests} | {cell.system} | out of memory |", flush=True)
            torch.cuda.empty_cache()
            continue
        lazy = row if cell.system == "lazy" else lazy
        drawn[cell] = row
        gflops, ms = (f"{row[name] / lazy[name]:.2f}" for name in ("gflops", "ms"))
        figures = f"{row['width']} | {row['parameters'] / 1e6:,.1f} | {row['gflops']:.4g} | {gflops} | {row['counted']:.3f}"
        speed = f"{row['ms']:.4g} | {ms} | {row['peak']:,.0f} | {row['share']:.2f}"
        print(f"| {cell.size} | {cell.context} | {cell.requests} | {cell.system} | {figures} | {speed} |", flush=True)
    if not options.grid:
        print(f"\nplot: {plot(drawn)}")


def plot(rows: dict[Cell, dict[str, Any]]) -> Path:
    """Operations and time of a sample by the length of the context, at the last size; an SVG file."""
    size = next(reversed(rows)).size
    figure, axes = canvas(width=8.0, height=3.2, columns=2)
    for axis, figures, label in zip(axes, ("gflops", "ms"), ("GFLOPs a target", "ms a target"), strict=True):
        for system in dict.fromkeys(cell.system for cell in rows):
            points = [
                (cell.context, row[figures]) for cell, row in rows.items() if (cell.system, cell.size) == (system, size)
            ]
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=system)
        axis.set(xscale="log", yscale="log")
        axis.minorticks_off()
        contexts = sorted({cell.context for cell in rows if cell.size == size})
        axis.set_xticks(contexts, [str(context) for context in contexts])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel(f"context tokens, {size} parameters", fontsize=8)
        axis.set_ylabel(label, fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    file = OUT.with_suffix(".svg")
    save_svg(figure, file)
    return file


if __name__ == "__main__":
    main()
