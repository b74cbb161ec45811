"""What do the choice of item vector, the balance of codes and the rule for collisions do to the model's recall?

One way to make ids at a time differs from the configuration; see benchmarks/comparison.py.

    python -m benchmarks.semantic_ids --config conf/kuairand.yaml [--set KEY=VALUE] [--only ROW] [--seeds N]
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.comparison import Change, Comparison, changed, main
from schemas.config import Config
from schemas.lineage import EMBED, ITEM_PAIRS, ORGANISE, SEQUENCES, TOKENIZE


def vectors(*sources: Any, model: Any = "mlp") -> Change:
    def change(config: Config) -> Config:
        aligned = replace(config.embed.aligned, model=model)
        weights = tuple(1.0 for _ in sources)
        return changed("embed", sources=sources, weights=weights, aligned=aligned)(config)

    return change


COMPARISON = Comparison(
    "semantic_ids",
    {
        "vectors: content": vectors("text", "attributes"),
        "vectors: pairs": vectors("pairs"),
        "vectors: aligned, MLP": vectors("aligned"),
        "vectors: aligned, MLP, and pairs": vectors("aligned", "pairs"),
        "vectors: aligned, QFormer, and pairs": vectors("aligned", "pairs", model="qformer"),
        "balance: relaxed": changed("tokenize", balance="relaxed"),
        "balance: equal": changed("tokenize", balance="equal"),
        "balance: capped": changed("tokenize", balance="capped"),
        "collisions: level": changed("tokenize", collisions="level"),
        "collisions: nearest_free": changed("tokenize", collisions="nearest_free"),
        "balance: capped, collisions: nearest_free": changed("tokenize", balance="capped", collisions="nearest_free"),
    },
    shared=(SEQUENCES, ITEM_PAIRS, ORGANISE),
    made=(EMBED, TOKENIZE),
    columns=("shared", "seconds"),
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
