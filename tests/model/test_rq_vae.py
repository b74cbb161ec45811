"""The peer is sound: codes are nearest in its own codebooks, gradients pass straight through, and it learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from model.codebook_metrics import level_use
from model.rq_vae import RqVae, RqVaeSize, train_rq_vae
from schemas.errors import ContractViolation
from tests.model.test_kmeans import true_labels

SIZE = RqVaeSize(levels=2, codes=16, hidden=(32,), latent=6, batch=128, learning_rate=5e-3)


def curved_rows(n: int, seed: int = 0) -> Tensor:
    """Three hidden causes seen through a fixed nonlinear map to twelve dimensions, far from the origin."""
    fixed = torch.Generator().manual_seed(99)
    mix, bend = torch.randn(3, 12, generator=fixed), torch.randn(3, 12, generator=fixed)
    hidden = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return 0.05 * (hidden @ mix + torch.tanh(hidden @ bend)) + 2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The work of a step is too small to share, and waiting for a thread on a busy machine takes longer than the step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> RqVae:
    return train_rq_vae(curved_rows(2000), SIZE, steps=200)


def test_codes_are_the_nearest_of_its_own_codebooks(model: RqVae) -> None:
    x = curved_rows(500, 1)
    residual = model.latents(x).numpy().copy()
    codes = model.encode(x)
    assert (codes.dtype, codes.shape) == (torch.int32, (500, 2))
    for level, book in enumerate(model.codebooks.detach().numpy()):
        labels = true_labels(residual, book)
        assert np.array_equal(codes[:, level].numpy(), labels)
        residual -= book[labels]


def test_the_loss_falls_and_reconstruction_beats_the_mean_and_one_level(model: RqVae) -> None:
    assert len(model.curve) == 200
    assert np.mean(model.curve[-20:]) < 0.5 * np.mean(model.curve[:20])
    x = curved_rows(500, 1)
    found = model.reconstruct(x)
    assert (found.dtype, found.shape) == (torch.float32, x.shape)
    error = float((found - x).square().sum())
    assert error < 0.3 * float((x - x.mean(0)).square().sum())
    first_only = train_rq_vae(curved_rows(2000), replace(SIZE, levels=1), steps=200)
    assert error < float((first_only.reconstruct(x) - x).square().sum())


def test_a_row_is_encoded_without_regard_to_the_others(model: RqVae) -> None:
    x = curved_rows(300, 2)
    codes, values = model.encode(x), model.reconstruct(x)
    order = torch.randperm(300)
    assert torch.equal(model.encode(x[order]), codes[order])
    assert torch.equal(torch.cat([model.encode(row[None]) for row in x[:50]]), codes[:50])
    assert torch.allclose(model.reconstruct(x[order]), values[order], rtol=1e-6)
    assert model.encode(x[:0]).shape == (0, 2)
    assert model.reconstruct(x[:0]).shape == (0, 12)


def test_the_gradient_of_reconstruction_reaches_the_encoder_unchanged(model: RqVae) -> None:
    latent = model.latents(curved_rows(64)).requires_grad_()
    quantised, codes, _ = model.quantised(latent)
    chosen = sum(book[codes[:, level]] for level, book in enumerate(model.codebooks))
    assert torch.allclose(quantised, chosen, atol=1e-6)
    weights = torch.randn(quantised.shape)
    to_latent, to_codes = torch.autograd.grad((quantised * weights).sum(), [latent, model.codebooks], allow_unused=True)
    assert torch.equal(to_latent, weights)
    assert to_codes is None  # codes learn by their own part of the loss alone


def test_each_part_of_the_quantisers_loss_moves_its_own_side(model: RqVae) -> None:
    """With r_1 = z, e the chosen codes: d/dz of beta |r_l - e_l|^2 and d/de of |r_l - e_l|^2, by hand."""
    latent = model.latents(curved_rows(40)).requires_grad_()
    _, codes, loss = model.quantised(latent)
    gradient_z, gradient_e = torch.autograd.grad(loss, [latent, model.codebooks])
    residual, expected_z, expected_e = latent.detach(), torch.zeros_like(latent), torch.zeros_like(model.codebooks)
    for level, book in enumerate(model.codebooks.detach()):
        gap = residual - book[codes[:, level]]
        expected_z += 2 * SIZE.commitment * gap / 40
        expected_e[level].index_add_(0, codes[:, level], -2 * gap / 40)
        residual = gap
    assert torch.allclose(gradient_z, expected_z, atol=1e-6)
    assert torch.allclose(gradient_e, expected_e, atol=1e-6)


def test_the_seed_decides_and_nothing_else_random_does() -> None:
    x = curved_rows(300)
    torch.manual_seed(1)
    one, state = train_rq_vae(x, SIZE, steps=12, seed=5), torch.random.get_rng_state()
    torch.manual_seed(2)
    two, other = train_rq_vae(x, SIZE, steps=12, seed=5), train_rq_vae(x, SIZE, steps=12, seed=6)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.curve == two.curve != other.curve
    assert torch.equal(one.codebooks, two.codebooks)
    assert torch.equal(one.encode(x), two.encode(x))


def test_a_spent_budget_ends_training() -> None:
    assert len(train_rq_vae(curved_rows(300), SIZE, steps=10**9, seconds=0.0).curve) == 1


def test_codes_without_rows_start_anew() -> None:
    x = curved_rows(2000)
    model = train_rq_vae(x, SIZE, steps=1)
    with torch.no_grad():
        model.codebooks[:, 1:] = 1e3  # collapsed: one code has all the rows
        assert level_use(model.encode(x)[:, 0], 16).utilisation == 1 / 16
        unused = torch.ones(2, 16, dtype=torch.bool)
        unused[:, 0] = False
        kept = model.codebooks[:, 0].clone()
        model.restart(model.scaled(x[:500]), unused, torch.Generator().manual_seed(0))
    assert level_use(model.encode(x)[:, 0], 16).utilisation > 0.9
    assert level_use(model.encode(x)[:, 1], 16).utilisation > 0.9
    assert torch.equal(model.codebooks[:, 0], kept)
    restarted = train_rq_vae(x, replace(SIZE, codes=64, batch=64, restart_every=5), steps=20)
    plain = train_rq_vae(x, replace(SIZE, codes=64, batch=64), steps=20)
    assert restarted.curve[:5] == plain.curve[:5]
    assert restarted.curve[5:] != plain.curve[5:]


def test_more_codes_than_rows_and_equal_rows_work() -> None:
    x = torch.ones(7, 12)
    model = train_rq_vae(x, SIZE, steps=3)
    assert np.isfinite(model.curve).all()
    assert torch.allclose(model.reconstruct(x), x, atol=1e-4)


@pytest.mark.parametrize("x", [torch.zeros(0, 4), torch.full((3, 4), torch.nan)])
def test_no_rows_and_values_that_are_not_finite_are_refused(x: Tensor) -> None:
    with pytest.raises(ContractViolation, match="no rows, or a value that is not finite"):
        train_rq_vae(x, SIZE, steps=1)
