"""The lazy decoder beside its peers at equal parameters and equal samples: loss, recall, time and operations.

Every row sees the same examples as often. Its blocks have the layers of the configuration (one more where they are odd),
and its width is the multiple of the heads at which blocks, encoder and what makes keys and values have the parameters
nearest to those of the lazy decoder of the configuration. `session` predicts the targets of a request as one sequence.
See benchmarks/comparison.py.

    python -m benchmarks.compare_architectures --config conf/kuairand.yaml [--set KEY=VALUE] [--only ROW] [--seeds N]

Contexts have 64 tokens; FULL=1 adds 256, and trains every row with three seeds.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.architectures import core, system_of
from benchmarks.comparison import FULL, Change, Comparison, main
from schemas.config import Config
from schemas.lineage import EMBED, ITEM_PAIRS, ORGANISE, SEQUENCES, TOKENIZE
from schemas.model_config import ModelConfig

SYSTEMS = ("lazy", "encoder-decoder 1:1", "decoder-only", "session")


def equal(lazy: ModelConfig, system: str) -> ModelConfig:
    """The system at the width with the parameters of `lazy`."""
    widths = (replace(lazy, d_model=lazy.heads * n) for n in range(1, 2 * lazy.d_model // lazy.heads))
    return min((system_of(each, system) for each in widths), key=lambda each: abs(core(each) - core(lazy)))


def row(system: str, context: int) -> Change:
    def change(config: Config) -> Config:
        short = min(config.model.short_length, context // 2)
        layers = config.model.layers + config.model.layers % 2
        lazy = replace(config.model, layers=layers, short_length=short, positive_length=context - 1 - short)
        model = replace(lazy, target="session") if system == "session" else equal(lazy, system)
        return replace(config, model=model)

    return change


ROWS = {
    f"{system}, {context} tokens": row(system, context) for context in ((64, 256) if FULL else (64,)) for system in SYSTEMS
}
COMPARISON = Comparison(
    "compared_architectures",
    ROWS,
    shared=(SEQUENCES, ITEM_PAIRS, EMBED, TOKENIZE, ORGANISE),
    made=(),
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
