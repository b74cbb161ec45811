"""Loss against parameters and operations, and the law that fits it: the form of OneRec-V2's scaling law.

Models of one depth and several widths pass once over the train days of a log that is large enough not to be repeated. The
loss is the mean over codes and positive targets of the test days; an item head is left out. The learning rate falls as
1 / sqrt(parameters), as the report's does, from that of the configuration at its own width. Parameters are those of blocks,
heads and what makes keys and values; tables of embeddings hardly grow with the width and are left out.

    L(x) = E + A / x^alpha      x the parameters, or the operations of the whole training

is fitted by least squares: alpha on a grid, E >= 0 and A in closed form. Intervals of 95 % resample users, all sizes
alike, and fit again; they know nothing of seeds, nor of another form of law. `without the largest` fits the other sizes
and predicts the largest, which tells whether the law reaches further than its data.

    python -m benchmarks.scaling --config conf/demo.yaml [--set KEY=VALUE] [--fresh]

Models are kept in benchmarks/out as they come, and the plot lies there, too. FULL=1: a larger width, and two further seeds
of every one, whose mean is then fitted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes

from benchmarks.comparison import (
    CONFIDENCE,
    FULL,
    OUT,
    RESAMPLES,
    Row,
    code_losses,
    kept_or_made,
    parser_of,
    start,
    trained,
)
from benchmarks.lakes import prepare
from model.flops import parameters
from model.ranking_metrics import bootstrap_means
from pipelines.evaluate import ranker_of
from pipelines.report_plots import ACCENT, FAINT, INK, canvas, save_svg
from schemas.calendar import Calendar
from schemas.config import Config
from schemas.lineage import EMBED, ITEM_PAIRS, ORGANISE, SEQUENCES, TOKENIZE, TRAIN

WIDTHS = (16, 32, 48, 64, 96, 128) + ((192,) if FULL else ())
SEEDS = (0, 1, 2) if FULL else (0,)
HEAD = 32  # values of an attention head, where the width has so many
ALPHAS = np.arange(0.02, 2.001, 0.01)
CURVE = 3  # every which report of training is drawn
BOUNDS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)  # quantiles
TINY = 1e-6  # nats: a floor of zero, rounded


@dataclass(frozen=True)
class Laws:
    """Fits of D draws: L(x) = floor + scale / x^alpha, each float64 [D]."""

    floor: np.ndarray
    scale: np.ndarray
    alpha: np.ndarray

    def at(self, x: np.ndarray | float) -> np.ndarray:
        """float64 [D, ...]"""
        x = np.asarray(x, float)
        floor, scale, alpha = (part.reshape(-1, *[1] * x.ndim) for part in (self.floor, self.scale, self.alpha))
        return np.asarray(floor + scale * x**-alpha)


def fit_laws(x_S: np.ndarray, loss_DS: np.ndarray) -> Laws:
    """The best fit to each row of losses at the sizes `x`, of those with a floor that is not below zero."""
    loss_D1 = loss_DS.mean(1, keepdims=True)
    floors, scales, errors = [], [], []
    for alpha in ALPHAS:
        power_S = x_S**-alpha
        around_S = power_S - power_S.mean()
        scale_D = (loss_DS - loss_D1) @ around_S / (around_S @ around_S)
        floor_D = loss_D1[:, 0] - scale_D * power_S.mean()
        error_D = ((floor_D[:, None] + scale_D[:, None] * power_S - loss_DS) ** 2).sum(1)
        floors.append(floor_D)
        scales.append(scale_D)
        errors.append(np.where(floor_D > -TINY, error_D, np.inf))
    best = np.argmin(errors, axis=0), np.arange(len(loss_DS))
    return Laws(np.array(floors)[best], np.array(scales)[best], ALPHAS[best[0]])


def of_width(config: Config, width: int, seed: int) -> Config:
    heads = max(1, width // HEAD)
    model = replace(config.model, d_model=width, heads=heads, g_kv=heads)
    rate = config.train.learning_rate * config.model.d_model / width  # at one depth parameters grow with the square
    return replace(config, model=model, train=replace(config.train, epochs=1, learning_rate=rate, seed=seed))


def measured(config: Config, calendar: Calendar) -> Row:
    """For each positive target of the test days user and loss; parameters, and the curve of training."""
    with trained(config, calendar, (TRAIN,)) as (context, data, models):
        folder = models[TRAIN.name]
        ranker = ranker_of(context, folder, data.catalogue)
        users, losses = [], []
        for requests in data.queries("test"):
            losses.append(code_losses(ranker, requests))
            users.append(requests.user_ids[requests.target_rows()].numpy())
        rows = [row for row in json.loads((folder / "history.json").read_text()) if "flops" in row]
        count = parameters(config.model, ranker.decoder.sizes)
    user_T, loss_T = np.concatenate(users), np.concatenate(losses)
    known = ~np.isnan(loss_T)
    user_T, loss_T = user_T[known], loss_T[known]
    order = np.lexsort([loss_T, user_T])  # batches may come in another order; a user's targets are resampled together
    return {
        "user": user_T[order],
        "nll": loss_T[order],
        "parameters": np.array(count.blocks + count.context + count.heads),
        "tflop": np.cumsum([row["flops"] for row in rows]) / 1e12,
        "curve": np.array([row["loss"] for row in rows]),
    }


def interval(draws_D: np.ndarray, digits: int = 3) -> str:
    low, high = np.quantile(draws_D, BOUNDS)
    return f"{draws_D[0]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    options, config = start(parser_of(__doc__))
    calendar = prepare(config, (SEQUENCES, ITEM_PAIRS, EMBED, TOKENIZE, ORGANISE))
    folder = OUT / "scaling"
    rows = []
    for width in WIDTHS:
        of_seeds = []
        for seed in SEEDS:
            file = folder / f"{config.name}-{width}-{seed}.npz"
            of_seeds.append(
                kept_or_made(file, of_width(config, width, seed), options.fresh, lambda made: measured(made, calendar))
            )
        rows.append(of_seeds)
    loss_DS, sizes = draws(rows), sizes_of(rows)
    print("\n".join(page(rows, loss_DS, sizes)))
    print(f"\nplot: {plot(rows, loss_DS, sizes, config.name)}")


def draws(rows: Sequence[Sequence[Row]]) -> np.ndarray:
    """Mean losses float64 [1 + resamples, S]: first those of all users, then of users drawn anew."""
    nll_TS = np.column_stack([np.mean([seed["nll"] for seed in of_seeds], axis=0) for of_seeds in rows])
    return np.concatenate([nll_TS.mean(0)[None], bootstrap_means(nll_TS, rows[0][0]["user"], RESAMPLES, 0)])


def sizes_of(rows: Sequence[Sequence[Row]]) -> dict[str, np.ndarray]:
    """What the loss is drawn against, float64 [S] each."""
    return {
        "parameters": np.array([float(of_seeds[0]["parameters"]) for of_seeds in rows]),
        "TFLOP": np.array([float(of_seeds[0]["tflop"][-1]) for of_seeds in rows]),
    }


def page(rows: Sequence[Sequence[Row]], loss_DS: np.ndarray, sizes: Mapping[str, np.ndarray]) -> list[str]:
    """The tables: the models by width, and the laws."""
    law = fit_laws(sizes["parameters"], loss_DS)
    lines = ["| width | parameters | TFLOP | loss a code | law | from seed to seed |", "|---|---|---|---|---|---|"]
    for place, (width, of_seeds) in enumerate(zip(WIDTHS, rows, strict=True)):
        spread = np.std([seed["nll"].mean() for seed in of_seeds], ddof=1) if len(of_seeds) > 1 else np.nan
        x = sizes["parameters"][place]
        figures = f"{x:,.0f} | {sizes['TFLOP'][place]:,.1f} | {interval(loss_DS[:, place], 4)} | {law.at(x)[0]:.4f}"
        lines.append(f"| {width} | {figures} | {'one seed' if np.isnan(spread) else f'{spread:.4f}'} |")
    targets, users = len(rows[0][0]["user"]), len(np.unique(rows[0][0]["user"]))
    lines += ["", f"{targets:,} positives of {users:,} users; L = E + A / x^alpha:", ""]
    lines += ["| x | E | A | alpha | largest predicted without it | measured |", "|---|---|---|---|---|---|"]
    for name, x_S in sizes.items():
        law, smaller = fit_laws(x_S, loss_DS), fit_laws(x_S[:-1], loss_DS[:, :-1])
        figures = f"{interval(law.floor)} | {law.scale[0]:.3g} | {interval(law.alpha, 2)}"
        lines.append(f"| {name} | {figures} | {interval(smaller.at(x_S[-1]), 4)} | {loss_DS[0, -1]:.4f} |")
    return lines


def plot(rows: Sequence[Sequence[Row]], loss_DS: np.ndarray, sizes: Mapping[str, np.ndarray], name: str) -> str:
    """The losses with the law and its interval, against parameters and operations, as an SVG file; its path."""
    figure, axes = canvas(width=8.0, height=3.2, columns=2)
    for axis, (label, x_S) in zip(axes, sizes.items(), strict=True):
        with_law(axis, x_S, loss_DS)
        axis.set_xlabel(label, fontsize=8)
    for of_seeds in rows:
        tflop, curve = (of_seeds[0][column][::CURVE] for column in ("tflop", "curve"))
        axes[1].plot(tflop, curve, color=FAINT, linewidth=0.8, zorder=0)
    low, high = loss_DS[0].min(), loss_DS[0].max()
    axes[1].set_xlim(left=rows[0][0]["tflop"][-1] / 10)
    axes[1].set_ylim(low - 0.1 * (high - low), high + (high - low))  # the curves come from above
    axes[0].set_ylabel("nats a code", fontsize=8)
    axes[0].set_title("once over the log, test days", fontsize=9, color=INK)
    axes[1].set_title("faint: in training", fontsize=9, color=INK)
    file = OUT / "scaling" / f"{name}.svg"
    save_svg(figure, file)
    return str(file)


def with_law(axis: Axes, x_S: np.ndarray, loss_DS: np.ndarray) -> None:
    grid = np.geomspace(x_S[0] / 1.3, x_S[-1] * 3, 100)
    curves = fit_laws(x_S, loss_DS).at(grid)
    axis.fill_between(grid, *np.quantile(curves, BOUNDS, axis=0), color=ACCENT, alpha=0.15, linewidth=0)
    axis.plot(grid, curves[0], color=ACCENT, linewidth=1.4)
    axis.plot(x_S, loss_DS[0], "o", color=INK, markersize=4)
    axis.set_xscale("log")
    axis.minorticks_off()


if __name__ == "__main__":
    main()
