"""Categorical attributes of items as vectors: a random-sign projection by hash, weighted by rarity.

A token (tag, author, duration bucket, 'name=value') has a vector of signs that its hash draws, so that no vocabulary is
kept and any process draws the same; an item is the sum of its tokens, each times its inverse document frequency among
the items of the fit. Two items' product then estimates the rarity-weighted overlap of their tokens, with an error of
about 1 / sqrt(width). What is kept of the fit is one weight a known token; an unknown one is as rare as can be.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_array


@dataclass(frozen=True)
class TokenWeights:
    """Inverse document frequency by token hash."""

    hashes: np.ndarray  # int64 [T], sorted
    weights: np.ndarray  # float64 [T]
    unknown: float

    def of(self, hashes: np.ndarray) -> np.ndarray:
        """float64 [...]: the weight of each token hash."""
        if len(self.hashes) == 0:
            return np.full(len(hashes), self.unknown)
        place = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        return np.where(self.hashes[place] == hashes, self.weights[place], self.unknown)


def token_pairs(items: pa.Table) -> tuple[np.ndarray, pa.StringArray]:
    """int64 [P] rows of `items` and the token of each: tags, author, duration on a log scale, attributes."""
    rows, tokens = [], []
    for name, prefix in (("tags", "tag="), ("attributes", "")):
        values = items.column(name).combine_chunks()
        rows.append(pc.list_parent_indices(values).to_numpy(zero_copy_only=False))
        tokens.append(pc.binary_join_element_wise(prefix, values.flatten().cast(pa.string()), ""))
    seconds = pc.divide(items.column("duration_ms"), 1000)
    duration = pc.cast(pc.floor(pc.log2(pc.cast(pc.add(seconds, 1), pa.float64()))), pa.int64())
    for prefix, single in (("author=", items.column("author_id")), ("seconds=2^", duration)):
        known = single.combine_chunks()
        rows.append(np.flatnonzero(known.is_valid().to_numpy(zero_copy_only=False)))
        tokens.append(pc.binary_join_element_wise(prefix, known.drop_null().cast(pa.string()), ""))
    return np.concatenate(rows).astype(np.int64), pa.concat_arrays(tokens)


def fit_weights(items: pa.Table, seed: int) -> TokenWeights:
    """Weights log((N + 1) / (items of the token + 1)): zero for a token that every item has."""
    _, tokens = token_pairs(items)
    counted = tokens.value_counts()
    hashes = _hashes(counted.field("values"), seed)
    weights = np.log((len(items) + 1) / (counted.field("counts").to_numpy() + 1))
    order = np.argsort(hashes)
    return TokenWeights(hashes[order], weights[order].clip(min=0), float(np.log(len(items) + 1)))


def attribute_vectors(items: pa.Table, weights: TokenWeights, width: int, seed: int) -> np.ndarray:
    """float32 [N, width], zero for an item without attributes."""
    rows, tokens = token_pairs(items)
    encoded = tokens.dictionary_encode()
    signs_TW = _signs(encoded.dictionary, width, seed) * weights.of(_hashes(encoded.dictionary, seed))[:, None]
    entries = (np.ones(len(rows)), (rows, encoded.indices.to_numpy()))
    return (csr_array(entries, shape=(len(items), len(signs_TW))) @ signs_TW).astype(np.float32)


def _hashes(tokens: pa.StringArray, seed: int) -> np.ndarray:
    digests = b"".join(_digest(token, seed, 8) for token in tokens.to_pylist())
    return np.frombuffer(digests, dtype="<i8").copy()


def _signs(tokens: pa.StringArray, width: int, seed: int) -> np.ndarray:
    """float64 [T, width] of plus and minus one."""
    size = -(-width // 8)
    rounds = range(-(-size // 64))  # blake2b gives at most 64 bytes at a time
    digests = [b"".join(_digest(token, seed, min(64, size), r + 1) for r in rounds)[:size] for token in tokens.to_pylist()]
    drawn = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), size)
    return np.unpackbits(drawn, axis=1)[:, :width] * 2.0 - 1.0


def _digest(token: str, seed: int, size: int, part: int = 0) -> bytes:
    return hashlib.blake2b(token.encode(), digest_size=size, salt=f"{seed}:{part}".encode()[:16]).digest()
