"""What do the model's inputs, its ids and its parts do? The form of OneRec-V1's Tables 2, 3 and 5 and V2's Tables 3 and 4.

One thing at a time differs from the configuration; see benchmarks/comparison.py. Losses compare where the codes are the
same. Contexts always read codes; what can be added is the item's own id.

    python -m benchmarks.compare_inputs --config conf/kuairand.yaml [--set KEY=VALUE] [--only ROW] [--seeds N]

FULL=1 adds more sizes of codebooks and the parts of the decoder, and trains every row with three seeds.
"""

from __future__ import annotations

from benchmarks.comparison import FULL, Change, Comparison, changed, main
from schemas.config import Config
from schemas.lineage import EMBED, ITEM_PAIRS, ORGANISE, SEQUENCES, TOKENIZE
from schemas.model_config import MoeConfig

ITEM_ROWS, NEIGHBOURS = 20_000, 200  # the most engaged items, and those beside each


def with_items(config: Config) -> Config:
    """The context shows the item's own id, too."""
    return changed("model", fields=("item", *config.model.fields), item_rows=ITEM_ROWS)(config)


def with_head(config: Config) -> Config:
    """Items are scored directly, too."""
    return changed("model", item_head=True)(with_items(config))


def head_at_vectors(config: Config) -> Config:
    return changed("train", item_start="vectors")(with_head(config))


def head_without_codes(config: Config) -> Config:
    """An item's vector is its own alone."""
    return changed("model", item_head_codes=False)(head_at_vectors(config))


def head_with_memory(config: Config) -> Config:
    """Its neighbours' probabilities are mixed with the head's."""
    return changed("model", item_neighbours=NEIGHBOURS)(head_at_vectors(config))


def experts(config: Config) -> Config:
    """As many parameters awake as in dense feed-forward parts of one width of the model."""
    moe = MoeConfig(experts=16, active=3, shared=1, width=config.model.d_model, first_dense=1)
    return changed("model", moe=moe)(config)


ROWS: dict[str, Change] = {
    "context: codes alone": changed("model", fields=()),
    "context: positives alone": changed("model", short_length=1),
    "context: codes and item ids": with_items,
    "head: items, too": with_head,
    "head: items, too, from vectors": head_at_vectors,
    "head: items, too, from vectors, without codes": head_without_codes,
    "head: items, too, from vectors, with a memory": head_with_memory,
    "codes: 64": changed("tokenize", codes=64),
    "codes: 1024": changed("tokenize", codes=1024),
    "levels: 2": changed("tokenize", levels=2),
}
MORE: dict[str, Change] = {
    "codes: 128": changed("tokenize", codes=128),
    "codes: 512": changed("tokenize", codes=512),
    "levels: 4": changed("tokenize", levels=4),
    "experts: 16, 3 awake": experts,
    "S_kv: 2": changed("model", s_kv=2),
    "L_kv: 3": changed("model", l_kv=3),
    "G_kv: 1": changed("model", g_kv=1),
}
COMPARISON = Comparison(
    "inputs",
    ROWS | MORE if FULL else ROWS,
    shared=(SEQUENCES, ITEM_PAIRS, EMBED, ORGANISE),
    made=(TOKENIZE,),
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
