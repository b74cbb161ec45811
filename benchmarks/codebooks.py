"""OneRec-V1's Table 11 in form: ways to make semantic ids, side by side, on item vectors that the pipeline made.

The stages up to `embed` run by the configuration of each work (KuaiRand and MovieLens from the development data, the demo
from simulated logs, a fifth of its impressions) into `--lakes`, which later runs find done. Every system gets the vectors
of all items of the fit day (float32 in memory), the same levels and the same codes a level; its codes are judged by
`model.codebook_metrics`:

loss      mean squared distance of an item's vector from what its codes stand for; `left` is its share of the variance
used      share of the codes of each level that some item has; `nats` is the entropy of a level, at most ln K
shared    share of items that share all their codes with another; `most` is the fullest bucket
purity    share of tagged items that have the commonest tag of their first code (two, three codes), and in brackets how far
          above chance that is: 0 is no better than the same buckets with shuffled tags, 1 is one tag a bucket
seconds   of wall time for the fit and the codes, on whatever else the machine does; shares of one core are not comparable

`rq-kmeans` is this project's tokenizer, `relaxed`, `equal` and `capped` its ways of `tokenize.balance`. `rq-vae` is
`model.rq_vae` at TIGER's sizes for 200 passes over the items; with restarts, codes that win no row for a pass start
anew; in the same seconds, it stops when it has taken as long as `rq-kmeans` did. `faiss` is its residual quantizer with
greedy codes (a beam of 1) and its defaults otherwise.

    python -m benchmarks.codebooks [--lakes FOLDER] [--fresh]

FULL=1 takes three seeds, of which the table gives the mean, five times as many passes for RQ-VAE, and
the whole demo.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch

from benchmarks.lakes import prepare
from model.codebook_metrics import collisions, hourglass, level_uses, prefix_labels, purity, rebuilt, reconstruction
from model.rq_kmeans import fit
from model.rq_vae import RqVaeSize, train_rq_vae
from pipelines.codebook_report import tags_of
from pipelines.item_vectors import matrix_of
from pipelines.ray_tables import read_arrow
from schemas.config import Config, TokenizeConfig
from schemas.lake import Lake, lake_of
from schemas.lineage import EMBED, ITEM_PAIRS, SEQUENCES
from schemas.loader import load_config

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LAZYREC_DATA", REPOSITORY.parent / "shared" / "data"))
OUT = REPOSITORY / "benchmarks" / "out" / "codebooks.jsonl"
WORKS = {"kuairand": "kuairand_pure", "movielens": "ml_latest_small", "demo": ""}  # configuration: its data
FULL = os.environ.get("FULL") == "1"
EPOCHS = 1000 if FULL else 200
MOST_STEPS = 1_000_000  # of a system whose end is a time
SAME_SECONDS = "rq-vae in the same seconds"


@dataclass(frozen=True)
class Items:
    """N items of a work, by ascending id."""

    ids_N: torch.Tensor  # int64
    x_ND: torch.Tensor  # float32
    owners_P: torch.Tensor  # int64, with tags_P: item owners_P[p] has tag tags_P[p]
    tags_P: torch.Tensor


@dataclass(frozen=True)
class Coded:
    """What a system made of the items."""

    codes_NL: torch.Tensor  # int32
    rebuilt_ND: torch.Tensor  # float32


def rq_kmeans(items: Items, settings: TokenizeConfig) -> Coded:
    found = fit(items.x_ND.clone(), items.ids_N, settings)
    return Coded(found.codes_NL, rebuilt(found.codebook.centroids, found.codes_NL))


def balanced(items: Items, settings: TokenizeConfig, balance: Literal["relaxed", "equal", "capped"]) -> Coded:
    return rq_kmeans(items, replace(settings, balance=balance))


def rq_vae(items: Items, settings: TokenizeConfig, restarts: bool = False, seconds: float = math.inf) -> Coded:
    size = RqVaeSize(settings.levels, settings.sizes[0])
    epoch = math.ceil(len(items.x_ND) / size.batch)
    size = replace(size, restart_every=epoch if restarts else 0)
    steps = EPOCHS * epoch if math.isinf(seconds) else MOST_STEPS
    model = train_rq_vae(items.x_ND, size, steps=steps, seconds=seconds, seed=settings.seed)
    return Coded(model.encode(items.x_ND), model.reconstruct(items.x_ND))


def by_faiss(items: Items, settings: TokenizeConfig) -> Coded:
    bits, x = settings.sizes[0].bit_length() - 1, items.x_ND.numpy()
    if set(settings.sizes) != {1 << bits}:
        raise ValueError(f"faiss wants a power of two as tokenize.codes, not {settings.codes}")
    quantizer = faiss.ResidualQuantizer(x.shape[1], settings.levels, bits)
    quantizer.max_beam_size = 1
    quantizer.cp.seed = settings.seed + 1234  # its default at seed 0
    quantizer.train(x)
    packed = quantizer.compute_codes(x)
    codes = faiss.unpack_bitstrings(packed, settings.levels, bits).astype(np.int32)
    return Coded(torch.from_numpy(codes), torch.from_numpy(quantizer.decode(packed)))


SYSTEMS: dict[str, Callable[[Items, TokenizeConfig], Coded]] = {
    "rq-kmeans": rq_kmeans,
    "rq-kmeans relaxed": partial(balanced, balance="relaxed"),
    "rq-kmeans equal": partial(balanced, balance="equal"),
    "rq-kmeans capped": partial(balanced, balance="capped"),
    "rq-vae": rq_vae,
    "rq-vae with restarts": partial(rq_vae, restarts=True),
    SAME_SECONDS: rq_vae,
    "faiss": by_faiss,
}


def config_of(work: str, lakes: Path) -> Config:
    settings: dict[str, Any] = {"lake": str(lakes / work)}
    if WORKS[work]:
        settings["source.path"] = str(DATA / WORKS[work])
    elif not FULL:
        settings["simulate.impressions"] = 200_000  # the catalogue is the demo's all the same
    return load_config(str(REPOSITORY / "conf" / f"{work}.yaml"), settings)


def items_of(lake: Lake, fit_day: datetime.date) -> Items:
    version = lake.version("item_embeddings")
    assert version is not None
    rows = read_arrow(lake, "item_embeddings", version, ["item_id", "vector"], [fit_day]).sort_by("item_id")
    ids = rows.column("item_id").to_numpy()
    return Items(torch.tensor(ids), torch.tensor(matrix_of(rows.column("vector"))), *tags_of(lake, ids))


def measure(items: Items, coded: Coded, sizes: tuple[int, ...]) -> dict[str, float]:
    lost = reconstruction(items.x_ND, coded.rebuilt_ND)
    uses, shared = level_uses(coded.codes_NL, sizes), collisions(coded.codes_NL)
    row: dict[str, float] = {"reconstruction_loss": lost.loss, "variance_left": lost.relative}
    for level, use in enumerate(uses, 1):
        row |= {f"utilisation_{level}": use.utilisation, f"entropy_nats_{level}": use.entropy, f"gini_{level}": use.gini}
        row |= {f"top_share_{level}": use.top_share}
    row |= {"collision_rate": shared.rate, "largest_bucket": shared.largest}
    waist = hourglass(uses)
    row |= {"hourglass": float(waist.found), "hourglass_waist": waist.waist} if waist else {}
    for level, labels_N in enumerate(prefix_labels(coded.codes_NL), 1):
        if pure := purity(labels_N, items.owners_P, items.tags_P):
            row |= {f"purity_{level}": pure.share, f"purity_chance_{level}": pure.chance}
            row |= {f"purity_above_chance_{level}": pure.adjusted}
    return row


def cell(system: str, items: Items, settings: TokenizeConfig, seconds: float) -> dict[str, float]:
    """`seconds` are those of `rq-kmeans` on the same items with the same seed."""
    make = partial(rq_vae, seconds=seconds) if system == SAME_SECONDS else SYSTEMS[system]
    started = time.monotonic()
    coded = make(items, settings)
    seconds = time.monotonic() - started
    return measure(items, coded, settings.sizes) | {"seconds": seconds}


def cells(lakes: Path, seeds: int, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows that are not among `rows` yet."""
    taken = {(row["work"], row["system"], row["seed"], row["epochs"]): row["seconds"] for row in rows}
    for work, data in WORKS.items():
        wanted = [(work, system, seed, EPOCHS) for seed in range(seeds) for system in SYSTEMS]
        todo = [key for key in wanted if key not in taken]
        if not todo:
            continue
        if data and not (DATA / data).is_dir():
            print(f"{work}: its data is not at {DATA / data}; set LAZYREC_DATA to the folder of {data}.", file=sys.stderr)
            continue
        config = config_of(work, lakes)
        items = items_of(lake_of(config), prepare(config, (SEQUENCES, ITEM_PAIRS, EMBED)).fit_day)
        size = {"items": len(items.ids_N), "dimensions": items.x_ND.shape[1]}
        size |= {"levels": config.tokenize.levels, "codes": config.tokenize.sizes[0]}
        for key in todo:
            _, system, seed, epochs = key
            same = taken.get((work, "rq-kmeans", seed, epochs), math.inf)
            found = cell(system, items, replace(config.tokenize, seed=seed), same)
            taken[key] = found["seconds"]
            yield {"work": work, "size": size, "system": system, "seed": seed, "epochs": epochs} | found


def mean_row(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The mean over seeds of each measure."""
    return {
        name: float(np.mean([row[name] for row in rows]))
        for name, value in rows[0].items()
        if isinstance(value, float | int)
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    for work in dict.fromkeys(row["work"] for row in rows):
        here = [row for row in rows if row["work"] == work]
        size = here[0]["size"]
        levels = range(1, size["levels"] + 1)
        shape = f"{size['items']:,} items of {size['dimensions']} dimensions, {size['levels']} x {size['codes']} codes"
        print(f"\n{work}: {shape}\n")
        print("| system | loss | left | used | nats | Gini | shared | most | waist | purity (above chance) | seconds |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for system in dict.fromkeys(row["system"] for row in here):
            print_row(system, mean_row([row for row in here if row["system"] == system]), levels)


def print_row(system: str, row: dict[str, float], levels: range) -> None:
    def each(name: str, digits: int) -> str:
        return " / ".join(f"{row[f'{name}_{level}']:.{digits}f}" for level in levels)

    pure = "-"
    if "purity_1" in row:
        pure = " / ".join(f"{row[f'purity_{n}']:.3f} ({row[f'purity_above_chance_{n}']:.2f})" for n in levels)
    waist = f"{row['hourglass_waist']:.2f}{' hourglass' if row['hourglass'] else ''}" if "hourglass" in row else "-"
    lost = f"{row['reconstruction_loss']:.4f} | {row['variance_left']:.3f}"
    use = f"{each('utilisation', 4)} | {each('entropy_nats', 4)} | {each('gini', 3)}"
    shared = f"{row['collision_rate']:.4f} | {row['largest_bucket']:.0f}"
    print(f"| {system} | {lost} | {use} | {shared} | {waist} | {pure} | {row['seconds']:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lakes", type=Path, help="where the lakes are made or found; default: a temporary folder")
    parser.add_argument("--fresh", action="store_true", help="run every cell again")
    arguments = parser.parse_args()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    rows = [] if arguments.fresh or not OUT.is_file() else [json.loads(line) for line in OUT.read_text().splitlines()]
    OUT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with tempfile.TemporaryDirectory(prefix="lazyrec-codebooks-") as folder:
        for row in cells(arguments.lakes or Path(folder), 3 if FULL else 1, list(rows)):
            rows.append(row)
            with OUT.open("a") as out:
                out.write(json.dumps(row) + "\n")
    print_table([row for row in rows if row["epochs"] == EPOCHS])


if __name__ == "__main__":
    main()
