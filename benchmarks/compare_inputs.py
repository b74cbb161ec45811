"""What do the model's inputs, its ids and its parts do? The form of OneRec-V1's Tables 2, 3 and 5 and V2's Tables 3 and 4.

One thing at a time differs from the configuration; see benchmarks/comparison.py. Losses compare where the codes are the
same. Contexts always read codes; what can be added is the item's own id.

    python -m benchmarks.compare_inputs --config conf/kuairand.yaml [--set KEY=VALUE] [--only ROW] [--fresh]

FULL=1 adds the rows of two further seeds, more sizes of codebooks and the parts of the decoder.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from benchmarks.comparison import Change, Comparison, main, seed
from benchmarks.semantic_ids import ids
from schemas.config import Config
from schemas.lineage import EMBED, ITEM_PAIRS, ORGANISE, SEQUENCES, TOKENIZE
from schemas.model_config import MoeConfig

FULL = os.environ.get("FULL") == "1"


def model(**settings: Any) -> Change:
    return lambda config: replace(config, model=replace(config.model, **settings))


def with_items(config: Config) -> Config:
    """The context shows the item's own id, too."""
    return config if "item" in config.model.fields else model(fields=("item", *config.model.fields))(config)


def with_head(config: Config) -> Config:
    """Items are scored directly, too."""
    return model(item_head=True)(with_items(config))


def head_at_vectors(config: Config) -> Config:
    config = with_head(config)
    return replace(config, train=replace(config.train, item_start="vectors"))


def experts(config: Config) -> Config:
    """As many parameters awake as in dense feed-forward parts of one width of the model."""
    moe = MoeConfig(experts=16, active=3, shared=1, width=config.model.d_model, first_dense=1)
    return model(moe=moe)(config)


ROWS: dict[str, Change] = {
    "context: codes alone": model(fields=()),
    "context: positives alone": model(short_length=1),
    "context: codes and item ids": with_items,
    "head: items, too": with_head,
    "head: items, too, from vectors": head_at_vectors,
    "codes: 64": ids(codes=64),
    "codes: 1024": ids(codes=1024),
    "levels: 2": ids(levels=2),
}
MORE: dict[str, Change] = {
    "seed 1": seed(1),
    "seed 2": seed(2),
    "codes: 128": ids(codes=128),
    "codes: 512": ids(codes=512),
    "levels: 4": ids(levels=4),
    "experts: 16, 3 awake": experts,
    "S_kv: 2": model(s_kv=2),
    "L_kv: 3": model(l_kv=3),
    "G_kv: 1": model(g_kv=1),
}
COMPARISON = Comparison(
    "inputs", ROWS | (MORE if FULL else {}), shared=(SEQUENCES, ITEM_PAIRS, EMBED, ORGANISE), made=(TOKENIZE,)
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
