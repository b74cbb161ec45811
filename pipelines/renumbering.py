"""A new codebook keeps the code numbers of the one before it, where the two group the same items.

Which codebook that is follows from the fit day: that of the newest fit day before it in the lake. The plan reads it as an
input, so it is part of the new one's identity, and of it only the partition of its own fit day counts, which nothing but a
new fit on that day rewrites. So `--force`, a resumed run, and a lost codebook that is fitted again find the same numbers. A
codebook fitted anew on the same fit day is renumbered by the one before that day, as its predecessor was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc

from model.renumber import kept_prefixes, matching_numbers, renumber_codebook, renumber_codes
from model.rq_kmeans import Codebook
from pipelines.catalogue import codes_matrix
from pipelines.codebook import sizes_of
from pipelines.codebook_fit import CodebookFit
from pipelines.ray_tables import read_arrow
from pipelines.stage import StageContext
from schemas.config import TokenizeConfig
from schemas.lineage import newest_codebook

TABLE = "semantic_ids"


@dataclass(frozen=True)
class Renumbered:
    """A codebook with the codes of its fitted items, and what became of the earlier numbers."""

    codebook: Codebook
    codes: np.ndarray  # int32 [N, L]
    earlier: dict[str, Any] | None = None  # for the manifest
    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def renumbered(context: StageContext, fitted: CodebookFit) -> Renumbered:
    """`fitted` with the numbers of the earlier codebook; as it is where there is none of its shape."""
    day, earlier = newest_codebook(context.lake, context.calendar.fit_day)
    if day is None:
        return Renumbered(fitted.codebook, fitted.codes)
    if not same_shape(context, earlier):
        note = f"Codebook {earlier} of {day} has other levels or codes: the new one's numbers have nothing to do with it."
        return Renumbered(fitted.codebook, fitted.codes, notes=[note])
    rows = read_arrow(context.lake, TABLE, context.lake.open(TABLE).version(), days=[day])
    rows = rows.filter(pc.equal(rows.column("codebook_version"), earlier))
    _, ours, theirs = np.intersect1d(fitted.item_ids, rows.column("item_id").to_numpy(), return_indices=True)
    if len(ours) == 0:
        note = f"Codebook {earlier} of {day} knows no item of the new one, whose numbers have nothing to do with it."
        return Renumbered(fitted.codebook, fitted.codes, notes=[note])
    levels = fitted.codebook.levels
    old = codes_matrix(rows.column("codes"))[theirs, :levels]  # a further level may follow the codebook's
    numbers = matching_numbers(fitted.codes[ours], old, fitted.codebook.sizes)
    codes = renumber_codes(fitted.codes, numbers)
    kept = kept_prefixes(codes[ours], old)
    counts = ", ".join(f"{round(share * len(ours)):,}" for share in kept)
    return Renumbered(
        renumber_codebook(fitted.codebook, numbers),
        codes,
        {"codebook": earlier, "fit_day": str(day), "items": len(ours), "kept": kept},
        {f"kept_prefix_{n}": share for n, share in enumerate(kept, 1)},
        [f"Of the {len(ours):,} items of codebook {earlier} of {day}, {counts} keep their first 1 to {levels} codes."],
    )


def same_shape(context: StageContext, earlier: str) -> bool:
    """Whether an earlier codebook has the levels and codes of this configuration."""
    settings: dict[str, Any] = (context.lake.manifest("tokenize", earlier) or {}).get("settings", {})
    now: TokenizeConfig = context.config.tokenize
    return bool(settings) and sizes_of(settings["codes"], settings["levels"]) == now.sizes
