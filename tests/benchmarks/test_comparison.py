"""The table of a comparison: means over seeds, paired differences, and losses where they compare."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.comparison import OWN, Row, loss_of, table

TARGETS = 240
ENTROPY = 3.0


def a_row(seed: int, codes: int = 1, entropy: float = ENTROPY) -> Row:
    rng = np.random.default_rng(seed)
    keys = np.stack([np.arange(TARGETS) // 4, np.arange(TARGETS), np.arange(TARGETS) % 9])
    return {
        "test": np.concatenate([keys, rng.integers(0, 30, (1, TARGETS))]),
        loss_of("test"): rng.uniform(1, 3, TARGETS),
        "entropy": np.array(entropy),
        "codes": np.array(codes),
        "seconds": np.array(60.0 * seed),
    }


def cells(rows: dict[str, list[Row]], system: str) -> dict[str, str]:
    """A system's cells by the heads of their columns; a difference is under the name before it."""
    lines = list(table(rows, "test", ("seconds",)))
    heads, found = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[1], of(lines, system)))
    pairs = zip(["", *heads], heads, strict=False)
    named = [f"{before} gap" if head.startswith("minus") else head for before, head in pairs]
    return dict(zip(named, found, strict=True))


def of(lines: list[str], system: str) -> str:
    return next(line for line in lines if line.startswith(f"| {system} |"))


def mean_of(cell: str) -> float:
    return float(cell.split()[0])


def test_figures_are_means_over_seeds_and_each_seed_is_shown() -> None:
    own, seeds = [a_row(1)], [a_row(2), a_row(3)]
    found = cells({OWN: own, "other": seeds}, "other")
    recalls = [(seed["test"][3] < 10).mean() for seed in seeds]
    losses = [seed[loss_of("test")].mean() for seed in seeds]
    assert mean_of(found["recall@10"]) == pytest.approx(np.mean(recalls), abs=1e-4)
    assert mean_of(found["loss gap"]) == pytest.approx(np.mean(losses) - own[0][loss_of("test")].mean(), abs=1e-4)
    assert [float(cell) for cell in found["loss by seed"].split(", ")] == pytest.approx(losses, abs=1e-4)
    assert found["seconds"] == "150"


def test_a_system_differs_from_itself_by_nothing() -> None:
    found = cells({OWN: [a_row(1)], "same": [a_row(1)]}, "same")
    assert all(found[f"{name} gap"] == ".0000 [.0000, .0000]" for name in ("recall@10", "ndcg@10", "loss"))


def test_losses_of_other_codes_are_not_subtracted_but_recall_is() -> None:
    found = cells({OWN: [a_row(1)], "other": [a_row(2, codes=2)]}, "other")
    assert found["loss"] and found["recall@10 gap"] and not found["loss gap"]


def test_items_that_the_catalogue_does_not_know_have_no_loss_but_count_as_missed() -> None:
    row = a_row(2)
    unknown = np.arange(TARGETS) % 5 == 0
    row["test"][3][unknown] = np.iinfo(np.int64).max
    known_mean = row[loss_of("test")][~unknown].mean()
    row[loss_of("test")][unknown] = np.nan
    found = cells({OWN: [a_row(1)], "other": [row]}, "other")
    assert mean_of(found["loss"]) == pytest.approx(known_mean, abs=1e-4)
    assert mean_of(found["recall@10"]) == pytest.approx((row["test"][3] < 10).mean(), abs=1e-4)


@pytest.mark.parametrize(("entropy", "trained"), [(2.1, False), (2.6, True)])  # losses are 2 on average
def test_a_loss_that_code_frequencies_alone_would_reach_is_called_untrained(entropy: float, trained: bool) -> None:
    found = cells({OWN: [a_row(1)], "other": [a_row(2, entropy=entropy)]}, "other")
    assert ("not trained" in found["loss"]) is not trained


def test_rows_of_other_requests_are_refused() -> None:
    other = a_row(2)
    other["test"][2] += 1
    with pytest.raises(ValueError, match="other requests"):
        list(table({OWN: [a_row(1)], "other": [other]}, "test", ()))
