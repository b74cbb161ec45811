"""Items with a row of their own keep it whatever else the catalogue holds; the others share rows by a hash."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.item_table import ItemEmbeddings, hashed

IDS = st.sets(st.integers(0, 2**62), max_size=20)


@settings(max_examples=50, deadline=None)
@given(IDS, IDS, st.integers(0, 5))
def test_own_rows_are_apart_and_shared_ones_come_by_hash(known: set[int], others: set[int], spare: int) -> None:
    table = ItemEmbeddings(len(known) + spare, buckets=7, width=2)
    before = torch.tensor(sorted(others), dtype=torch.int64)
    assert torch.equal(table.places(before), hashed(before, 7))  # nobody has a row yet
    table.give_rows(torch.tensor(list(known), dtype=torch.int64))
    places = dict(zip(known, table.places(torch.tensor(list(known), dtype=torch.int64)).tolist(), strict=True))
    assert len(set(places.values())) == len(known)
    assert all(7 < place < len(table.weight) for place in places.values())
    later = torch.tensor([*others, -1], dtype=torch.int64)
    shared = hashed(later, 7).tolist()
    assert table.places(later).tolist() == [places.get(i, s) for i, s in zip(later.tolist(), shared, strict=True)]
    assert shared[-1] == 0  # the unknown item


def test_rows_are_a_part_of_the_weights() -> None:
    table, other = ItemEmbeddings(3, 5, 2), ItemEmbeddings(3, 5, 2)
    table.give_rows(torch.tensor([30, 10, 20]))
    other.load_state_dict(table.state_dict())
    ids = torch.tensor([10, 20, 30, 40, -1])
    assert torch.equal(other(ids), table(ids))
    assert "own_ids" not in ItemEmbeddings(0, 5, 2).state_dict()
