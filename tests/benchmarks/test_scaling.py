"""The law of scaling: fitted where it holds exactly, beside a search over all of its constants, and with a floor."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import least_squares

from benchmarks.scaling import ALPHAS, fit_laws

SIZES = np.array([7e3, 2e4, 5e4, 1e5, 3e5, 8e5])


@given(st.floats(0, 4), st.floats(10, 4000), st.sampled_from(list(ALPHAS[10:100])))
def test_an_exact_law_is_found_and_goes_on_beyond_its_data(floor: float, scale: float, alpha: float) -> None:
    law = fit_laws(SIZES, (floor + scale * SIZES**-alpha)[None])
    assert np.isclose(law.alpha[0], alpha)
    assert np.isclose(law.floor[0], floor, rtol=1e-6, atol=1e-6)
    assert np.isclose(law.at(1e8)[0], floor + scale * 1e8**-alpha, rtol=1e-5, atol=1e-6)


def test_no_fit_by_a_search_over_all_constants_is_better() -> None:
    rng = np.random.default_rng(0)
    losses = 2 + 300 * SIZES**-0.5 + rng.normal(0, 0.02, (20, len(SIZES)))
    laws = fit_laws(SIZES, losses)
    ours = ((laws.at(SIZES) - losses) ** 2).sum(1)
    for row, loss in enumerate(losses):
        for start in ([1, 100, 0.3], [2, 300, 0.5], [2.2, 1000, 0.8]):
            best = least_squares(
                lambda law, loss=loss: law[0] + law[1] * SIZES ** -law[2] - loss,
                start,
                x_scale=start,
                bounds=([0, -np.inf, ALPHAS[0]], [np.inf, np.inf, ALPHAS[-1]]),
            )
            assert np.sqrt(ours[row]) <= np.sqrt(2 * best.cost) + 0.002  # nats: alpha lies on a grid


def test_a_floor_is_never_below_zero() -> None:
    straight = 5 - 0.3 * np.log(SIZES)  # it would fall below any floor
    law = fit_laws(SIZES, straight[None])
    assert law.floor[0] > -1e-5 and law.alpha[0] > ALPHAS[0]
