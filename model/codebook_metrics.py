"""How well a codebook is used: utilisation, entropy, collisions (the measures of OneRec-V1's Table 11).

Entropy is Shannon's in nats; its ceiling is ln K. A collision is an item that shares its codes with another item.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LevelUse:
    """Use of one level's codes by the items."""

    utilisation: float  # share of the K codes that some item has
    entropy: float  # nats
    perplexity: float  # exp(entropy): the number of codes that would be used evenly


@dataclass(frozen=True)
class Collisions:
    """Items that share all their codes."""

    rate: float  # share of items that share their codes with another item
    distinct: int  # different code tuples
    largest: int  # items in the fullest bucket


def code_counts(codes_N: Tensor, k: int) -> Tensor:
    """int64 [k]: the items of each code."""
    return torch.bincount(codes_N.long(), minlength=k)


def level_use(codes_N: Tensor, k: int) -> LevelUse:
    """`codes_N` are one level's codes in [0, k), one an item; at least one item."""
    counts_K = code_counts(codes_N, k)
    share = counts_K[counts_K > 0].double() / len(codes_N)
    entropy = -(share * share.log()).sum()
    return LevelUse(float((counts_K > 0).double().mean()), float(entropy), float(entropy.exp()))


def collisions(codes_NL: Tensor) -> Collisions:
    """`codes_NL` [N, L], at least one item."""
    _, counts = torch.unique(codes_NL, dim=0, return_counts=True)
    shared = int(counts[counts > 1].sum())
    return Collisions(shared / len(codes_NL), len(counts), int(counts.max()))
