"""A step with row-wise states for the large tables, beside the same done densely and one element at a time."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.decoder import Decoder
from model.row_wise_adagrad import EPS, RowWiseAdagrad
from pipelines.descent import Descent, clip_norm, sparse_tables
from schemas.config import TrainConfig
from tests.model.requests import catalogue, random_requests, small_decoder

ITEMS = catalogue(30)
ROWWISE = TrainConfig(table_optimizer="rowwise", clip_norm=0.05)
Lookups = list[list[int]]


def sparse_gradient(rows: list[int], table: Tensor, seed: int) -> Tensor:
    """Rows may repeat, as those of a batch do."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(rows), table.shape[1], generator=generator)
    return torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.int64), values, table.shape, check_invariants=True)


@given(st.lists(st.lists(st.integers(0, 8), max_size=12), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_row_wise_adagrad_is_the_dense_one_and_leaves_other_rows_alone(steps: Lookups) -> None:
    table = nn.Parameter(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = RowWiseAdagrad([table], lr=0.1)
    wanted, sums, before = table.detach().double(), [0.0] * 9, table.detach().clone()
    for seed, rows in enumerate(steps):
        table.grad = sparse_gradient(rows, table, seed)
        dense = table.grad.to_dense().double()
        optimizer.step()
        for row in range(9):
            sums[row] += float(dense[row].square().mean())
            wanted[row] -= 0.1 * dense[row] / (sums[row] ** 0.5 + EPS)
    assert torch.allclose(table.detach().double(), wanted, atol=1e-5)
    untouched = sorted(set(range(9)) - {row for rows in steps for row in rows})
    assert torch.equal(table[untouched], before[untouched])


def gradients(decoder: Decoder, seed: int) -> dict[str, Tensor]:
    decoder.loss(random_requests(8, 30, seed), ITEMS).total.backward()
    return {name: p.grad.to_dense() for name, p in decoder.named_parameters() if p.grad is not None}


def decoders() -> tuple[Decoder, Decoder]:
    """A dense one and its copy with sparse tables."""
    dense = small_decoder(fields=("item", "author", "tags", "play"))
    return dense, copy.deepcopy(dense)


def test_only_the_hashed_tables_have_sparse_gradients_and_they_are_the_dense_ones() -> None:
    dense, sparse = decoders()
    tables = sparse_tables(sparse, ROWWISE)
    assert not sparse_tables(dense, TrainConfig())
    wanted, got = gradients(dense, 0), gradients(sparse, 0)
    assert wanted.keys() == got.keys()
    assert all(torch.allclose(wanted[name], got[name], atol=1e-7) for name in wanted)
    found = {name for name, p in sparse.named_parameters() if p.grad is not None and p.grad.is_sparse}
    assert found == {name for name, p in sparse.named_parameters() if p in tables}
    assert found == {f"context.{t}.weight" for t in ("fields.items", "fields.authors", "fields.tags", "static.attributes")}


@given(st.floats(0.01, 100.0))
@settings(max_examples=10, deadline=None)
def test_clipping_takes_sparse_and_dense_gradients_together(limit: float) -> None:
    dense, sparse = decoders()
    tables = sparse_tables(sparse, ROWWISE)
    for seed in (0, 1):  # a second batch of the step adds to the rows of the first
        gradients(dense, seed)
        gradients(sparse, seed)
    wanted = nn.utils.clip_grad_norm_(dense.parameters(), limit)
    parameters = list(sparse.parameters())
    got = clip_norm([p for p in parameters if p not in tables], [p for p in parameters if p in tables], limit)
    assert torch.allclose(wanted, got)
    for (name, one), other in zip(dense.named_parameters(), parameters, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad.to_dense(), atol=1e-6), name


def test_a_step_is_adamw_on_the_rest_and_moves_only_rows_that_were_read() -> None:
    dense, sparse = decoders()
    tables = sparse_tables(sparse, ROWWISE)
    descent = Descent(sparse, tables, ROWWISE)
    alone = Descent(dense, set(), TrainConfig(clip_norm=ROWWISE.clip_norm))
    before = {name: p.detach().clone() for name, p in sparse.named_parameters()}
    wanted = gradients(dense, 0)
    gradients(sparse, 0)
    assert torch.allclose(alone.step(0.01), descent.step(0.01))
    others = dict(dense.named_parameters())
    for name, parameter in sparse.named_parameters():
        assert parameter.grad is None
        if parameter not in tables:
            assert torch.allclose(parameter, others[name], atol=1e-6), name
            continue
        moved = (parameter != before[name]).any(1)
        assert torch.equal(moved, (wanted[name] != 0).any(1)) and 0 < moved.sum() < len(moved), name
