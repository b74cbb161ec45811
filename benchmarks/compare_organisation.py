"""The organisers of OneRec-V2's Figure 3 at equal compute: what a longer slice, or every item's loss anew, costs and saves.

All rows pass once over the train days in the order of time, as a nightly job does: shuffled in epochs, organisers that
keep the same targets differ by noise alone. Every row organises the train days in its own way and may spend as many
operations as the configuration's own (`newest_only`, slices of a request), so that one that needs more misses the end of
the stream. Later days are organised alike in all rows, so validation and test ask for the same; split.by must be `days`.
See benchmarks/comparison.py.

    python -m benchmarks.compare_organisation --config conf/kuairand.yaml [--set KEY=VALUE] [--only ROW] [--seeds N]

FULL=1 adds `naive, all of it`, whatever it costs, and trains every row with three seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.comparison import FULL, Change, Comparison, Row, changed, main
from schemas.lineage import EMBED, ITEM_PAIRS, ORGANISE, SEQUENCES, TOKENIZE

ORGANISERS: dict[str, dict[str, Any]] = {
    "newest only, hour": {"organiser": "newest_only", "slice": "hour"},
    "newest only, day": {"organiser": "newest_only", "slice": "day"},
    "user-centric": {"organiser": "user_centric"},
    "naive": {"organiser": "naive"},
}


def row(settings: dict[str, Any], budget_tflop: float) -> Change:
    train = changed("train", budget_tflop=budget_tflop)
    return lambda config: changed("organise", **settings)(train(config))


def systems(own: Row) -> Mapping[str, Change]:
    rows = {name: row(settings, float(own["TFLOP"])) for name, settings in ORGANISERS.items()}
    return rows | {"naive, all of it": row(ORGANISERS["naive"], 0.0)} if FULL else rows


COMPARISON = Comparison(
    "organisation",
    systems,
    shared=(SEQUENCES, ITEM_PAIRS, EMBED, TOKENIZE),
    made=(ORGANISE,),
    columns=("targets", "MFLOP", "TFLOP", "seconds"),
    base=changed("train", mode="stream"),
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
