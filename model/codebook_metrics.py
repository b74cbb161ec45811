"""How good a codebook is: use of its codes, items a prefix, what the codes lose, and whether prefixes mean something.

Reconstruction, utilisation and entropy are the measures of OneRec-V1's Table 11; the hourglass is OneRec's reason to turn
RQ-VAE down (arXiv 2502.18965, section 3.1). Entropies are Shannon's in nats, with ceiling ln K. The prefix of length l of
an item is its first l codes. A collision is an item that shares all its codes with another. Levels count from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.nearest import row_blocks, squared_distances

WAIST = 0.8  # of the neighbours' effective codes: a middle level below it is a waist
TOP = 0.01  # of the codes, those used most


@dataclass(frozen=True)
class LevelUse:
    """Use of one level's codes by the items."""

    utilisation: float  # share of the K codes that some item has
    entropy: float  # nats
    perplexity: float  # exp(entropy): the number of codes that would be used evenly
    gini: float  # of the items a code over all K codes; 0: all alike, 1 - 1 / K: one code has all
    top_share: float  # share of the items that the most used 1 % of the K codes hold, at least one code


@dataclass(frozen=True)
class PrefixUse:
    """Items by the prefixes of one length. Percentiles are those of the used prefixes, by nearest rank."""

    prefixes: int  # different ones that some item has
    items_mean: float
    items_p50: int
    items_p99: int
    items_max: int
    conditional_entropy: float  # nats, of the last code given those before it, over the items
    conditional_ceiling: float  # what it would be if every shorter prefix spread its n items over min(n, K) codes evenly


@dataclass(frozen=True)
class Collisions:
    """Items that share all their codes."""

    rate: float  # share of items that share their codes with another item
    distinct: int  # different code tuples
    largest: int  # items in the fullest bucket


@dataclass(frozen=True)
class Hourglass:
    """The narrowest middle level, of waists the narrowest one, and whether it makes the codebook an hourglass."""

    level: int
    waist: float  # its perplexity over the smaller one of its two neighbours
    concentrated: bool  # its most used 1 % of codes hold more of the items than those of either neighbour
    found: bool  # concentrated, and the waist is below 0.8


@dataclass(frozen=True)
class Purity:
    """Share of tagged items that have the commonest tag of their bucket."""

    share: float
    chance: float  # the same with the tags shuffled among the tagged items: small buckets are pure by chance
    adjusted: float  # (share - chance) / (1 - chance): 0 is chance, 1 is a tag a bucket; 0 where chance is 1
    items: int  # that have tags


@dataclass(frozen=True)
class Reconstruction:
    """What the codes lose of the vectors."""

    loss: float  # mean squared distance of an item's vector from the one that its codes stand for
    variance: float  # mean squared distance from the mean vector: the loss without any code
    relative: float  # loss / variance, the share of the variance that is left; 0 where both are 0


def code_counts(codes_N: Tensor, k: int) -> Tensor:
    """int64 [k]: the items of each code."""
    return torch.bincount(codes_N.long(), minlength=k)


def entropy_of(counts: Tensor) -> float:
    """Nats of the distribution that int64 `counts`, not all zero, are proportional to."""
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log()).sum().clamp(max=0))  # one code alone: 0, never -0


def gini_of(counts_K: Tensor) -> float:
    """Gini coefficient of int64 [K] `counts`, not all zero."""
    k = len(counts_K)
    weights = 2 * torch.arange(1, k + 1, device=counts_K.device) - k - 1
    return int((counts_K.sort().values * weights).sum()) / (k * int(counts_K.sum()))


def level_use(codes_N: Tensor, k: int) -> LevelUse:
    """`codes_N` are one level's codes in [0, k), one an item; at least one item."""
    counts_K = code_counts(codes_N, k)
    entropy = torch.tensor(entropy_of(counts_K), dtype=torch.float64)
    top = counts_K.topk(max(1, round(k * TOP))).values.sum()
    used = float((counts_K > 0).double().mean())
    return LevelUse(used, float(entropy), float(entropy.exp()), gini_of(counts_K), int(top) / len(codes_N))


def level_uses(codes_NL: Tensor, sizes: Sequence[int]) -> list[LevelUse]:
    """For each level of `codes_NL`, of `sizes` codes a level; at least one item."""
    return [level_use(codes_N, size) for codes_N, size in zip(codes_NL.unbind(1), sizes, strict=True)]


def collisions(codes_NL: Tensor) -> Collisions:
    """`codes_NL` [N, L], at least one item."""
    counts = torch.bincount(prefix_labels(codes_NL)[-1])
    shared = int(counts[counts > 1].sum())
    return Collisions(shared / len(codes_NL), len(counts), int(counts.max()))


def prefix_labels(codes_NL: Tensor) -> list[Tensor]:
    """int64 [N] for each prefix length from 1 to L: items have one number, counted from 0, where they share the prefix."""
    labels, found = torch.zeros(len(codes_NL), dtype=torch.int64, device=codes_NL.device), []
    for codes_N in codes_NL.long().unbind(1):
        labels = torch.unique(labels * (int(codes_N.max()) + 1) + codes_N, return_inverse=True)[1]
        found.append(labels)
    return found


def prefix_use(codes_NL: Tensor, sizes: Sequence[int]) -> list[PrefixUse]:
    """For each prefix length from 1 to L. `codes_NL`, of `sizes` codes a level, has at least one item."""
    before = torch.tensor([len(codes_NL)], device=codes_NL.device)  # items of the empty prefix
    found = []
    for labels_N, k in zip(prefix_labels(codes_NL), sizes, strict=True):
        items = torch.bincount(labels_N)
        share = before.double() / len(codes_NL)
        ceiling = float((share * before.clamp(max=k).double().log()).sum())
        conditional = max(0.0, entropy_of(items) - entropy_of(before))
        ordered = items.sort().values
        p50, p99 = (int(ordered[-(-len(ordered) * percent // 100) - 1]) for percent in (50, 99))
        mean = len(codes_NL) / len(items)
        found.append(PrefixUse(len(items), mean, p50, p99, int(ordered[-1]), conditional, ceiling))
        before = items
    return found


def hourglass(levels: Sequence[LevelUse]) -> Hourglass | None:
    """Of the levels in order; None for fewer than three, which have no middle.

    Check: a middle level whose perplexity is less than 0.8 of that of each neighbour, and whose most used 1 % of codes hold
    a larger share of the items than those of each neighbour. Conditional entropies are no part of it: they are at most the
    level's own, and fall with the size of the catalogue as well.
    """
    found = []
    for level in range(1, len(levels) - 1):
        own, near = levels[level], (levels[level - 1], levels[level + 1])
        waist = own.perplexity / min(other.perplexity for other in near)
        concentrated = own.top_share > max(other.top_share for other in near)
        found.append(Hourglass(level + 1, waist, concentrated, concentrated and waist < WAIST))
    return min(found, key=lambda one: (not one.found, one.waist), default=None)


def purity(labels_N: Tensor, owners_P: Tensor, tags_P: Tensor, shuffles: int = 5, seed: int = 0) -> Purity | None:
    """Of the buckets `labels_N` (int64 [N], a number of its bucket an item); None where no item has a tag.

    `owners_P` and `tags_P` (int64 [P], from 0 on) say that item `owners_P[p]` has tag `tags_P[p]`, each pair once. Items
    without tags count nowhere. Chance is the mean over `shuffles` permutations of the tag sets among the tagged items.
    """
    if len(owners_P) == 0:
        return None
    tagged, places_P = torch.unique(owners_P, return_inverse=True)
    labels_T = torch.unique(labels_N[tagged], return_inverse=True)[1]
    share = _majority(labels_T, places_P, tags_P)
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(tagged), generator=generator).to(labels_N.device) for _ in range(shuffles))
    chance = sum(_majority(labels_T[order], places_P, tags_P) for order in orders) / shuffles
    return Purity(share, chance, (share - chance) / (1 - chance) if chance < 1 else 0.0, len(tagged))


def _majority(labels_T: Tensor, places_P: Tensor, tags_P: Tensor) -> float:
    """The share of items that have the commonest tag of their bucket."""
    tags = int(tags_P.max()) + 1
    cells, counts = torch.unique(labels_T[places_P] * tags + tags_P, return_counts=True)
    most = torch.zeros(int(labels_T.max()) + 1, dtype=torch.int64, device=counts.device)
    most.scatter_reduce_(0, cells // tags, counts, "amax")
    return int(most.sum()) / len(labels_T)


def rebuilt(centroids: Sequence[Tensor], codes_NL: Tensor) -> Tensor:
    """float32 [N, D]: the sum of each item's centroids, for residual codes. `centroids` are float32 [K, D] a level."""
    return torch.stack([centroids_KD[codes_NL[:, level].long()] for level, centroids_KD in enumerate(centroids)]).sum(0)


def reconstruction(x_ND: Tensor, rebuilt_ND: Tensor) -> Reconstruction:
    """Of the vectors `x_ND` by `rebuilt_ND`, both float32 and of at least one item; sums in float64."""
    mean_1D = x_ND.double().mean(0, keepdim=True)
    loss = variance = 0.0
    for rows in row_blocks(x_ND):
        loss += float(squared_distances(x_ND[rows], rebuilt_ND[rows]).sum())
        variance += float(squared_distances(x_ND[rows], mean_1D).sum())
    relative = loss / variance if variance else (float("inf") if loss else 0.0)
    return Reconstruction(loss / len(x_ND), variance / len(x_ND), relative)
