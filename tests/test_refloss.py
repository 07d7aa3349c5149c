"""The scaling law of a domain's loss: accuracy, optimality against brute force, and histories that are no law."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refloss import FitError, fit

DELTA = 1e-3
PARTS = np.linspace(0.06, 0.5, 40)  # of the run, at which a series is evaluated


def series(seed, noise=2e-3, scale=1.0):
    """Tokens, losses, and the noiseless loss at the end of the run, where tokens = scale."""
    rng = np.random.default_rng(seed)
    alpha, E, first = rng.uniform(0.15, 0.6), rng.uniform(0.5, 2.0), rng.uniform(0.1, 1.5)
    A = first * PARTS[0] ** alpha
    return scale * PARTS, A * PARTS**-alpha + E + noise * rng.standard_normal(PARTS.size), A + E


def pruning_series(seed, noise=2e-3):
    """Tokens, losses, sparsity (a ramp to 0.5 over the first fifth), and the noiseless loss at the end of the run."""
    rng = np.random.default_rng(seed)
    parts = np.linspace(0.02, 0.5, 64)
    sparsity = 0.05 + 0.45 * np.minimum(1.0, parts / 0.2)
    alpha, beta, E = rng.uniform(0.15, 0.6), rng.uniform(-0.6, -0.1), rng.uniform(0.5, 2.0)
    A = rng.uniform(0.1, 1.5) * parts[0] ** alpha * sparsity[0] ** beta
    losses = A * parts**-alpha * sparsity**-beta + E + noise * rng.standard_normal(parts.size)
    return parts, losses, sparsity, A * 0.5**-beta + E


def mean_huber(residual):
    size = np.abs(residual)
    return np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA)).mean(-1)


def brute_force(tokens, losses, sparsity, alphas, betas):
    """The best objective on a grid of all four parameters; A is gridded by the law's height at the first point."""
    heights, levels = np.linspace(0.0, 1.2 * np.ptp(losses), 31), np.linspace(0.0, losses.max(), 101)
    best = np.inf
    for alpha in alphas:
        for beta in betas:
            shape = (tokens / tokens[0]) ** -alpha * (sparsity / sparsity[0]) ** -beta
            best = min(best, mean_huber(losses - heights[:, None, None] * shape - levels[:, None]).min())
    return best


def adversarial(kind, seed):
    tokens, losses, _ = series(seed)
    rng = np.random.default_rng(seed)
    return tokens, {
        "law": losses,
        "outliers": losses + (rng.random(40) < 0.2) * rng.exponential(0.5, 40),
        "noise": 2.0 + 0.3 * rng.uniform(-1, 1, 40),
        "step": np.where(tokens < 0.2, 3.0, 2.0) + 0.01 * rng.standard_normal(40),
        "wave": 2.0 + 0.5 * np.sin(np.arange(40) * rng.uniform(0.1, 3.0)),
    }[kind]


@pytest.mark.parametrize("seed", range(3))
def test_a_noiseless_law_is_recovered(seed):
    tokens, losses, sparsity, end = pruning_series(seed, noise=0.0)
    law = fit(tokens, losses, sparsity)
    assert law.beta < 0 < law.alpha
    assert law.predict(1.0, 0.5) == pytest.approx(end, abs=1e-4)


def test_the_end_of_training_and_of_pruning_is_predicted_within_thousandths_of_a_nat():
    errors = [abs(fit(T, y).predict(1.0) - end) for T, y, end in map(series, range(60))]
    assert np.mean(errors) <= 0.0025 and max(errors) <= 0.015
    errors = [abs(fit(T, y, S).predict(1.0, 0.5) - end) for T, y, S, end in map(pruning_series, range(40))]
    assert np.mean(errors) <= 0.006


@pytest.mark.parametrize("kind", ["law", "outliers", "noise", "step", "wave"])
def test_no_fine_grid_beats_the_fit(kind):
    tokens, losses = adversarial(kind, 1)
    law = fit(tokens, losses)
    assert law.objective <= 1.02 * brute_force(tokens, losses, np.ones(40), np.linspace(0, 3, 31), [0.0])
    sparsity = np.random.default_rng(1).uniform(0.01, 0.8, 40)
    law = fit(tokens, losses, sparsity)
    best = brute_force(tokens, losses, sparsity, np.linspace(0, 2, 9), np.linspace(-2, 2, 9))
    assert law.objective == pytest.approx(mean_huber(losses - law.predict(tokens, sparsity)), rel=1e-6)
    assert law.objective <= 1.02 * best


@pytest.mark.parametrize("scale", [1e-6, 1e11])
def test_the_unit_of_tokens_does_not_matter(scale):
    tokens, losses, _ = series(0)
    assert fit(tokens * scale, losses).predict(scale) == pytest.approx(fit(tokens, losses).predict(1.0), abs=1e-6)


@pytest.mark.parametrize("losses", [np.full(40, 2.5), np.linspace(2.0, 3.0, 40), 2.0 + PARTS**2, np.zeros(40)])
def test_losses_that_do_not_fall_give_a_flat_law(losses):
    law = fit(PARTS, losses)
    assert law.alpha == law.beta == 0.0 and law.A > 0 and law.E > 0
    assert law.predict(1.0) == pytest.approx(np.median(losses))


def test_points_without_a_finite_value_tokens_or_sparsity_are_left_out():
    tokens, losses, _ = series(0)
    spoiled_T, spoiled = np.append(tokens, [0.55, 0.6, np.nan, 0.0, -1.0]), np.append(losses, [np.nan, np.inf, 1, 1, 1])
    assert fit(spoiled_T, spoiled) == fit(tokens, losses)
    tokens, losses, sparsity, _ = pruning_series(0)
    assert fit(tokens, losses, np.r_[np.zeros(5), sparsity[5:]]) == fit(tokens[5:], losses[5:], sparsity[5:])


def test_sparsity_that_does_not_vary_changes_nothing():
    tokens, losses, _ = series(0)
    assert fit(tokens, losses, np.full(40, 0.5)) == fit(tokens, losses)


@pytest.mark.parametrize("exponent", [-0.3, 0.3])
def test_during_a_ramp_one_exponent_explains_the_loss(exponent):
    law = fit(PARTS, 1.0 + PARTS**exponent, 0.9 * PARTS)
    assert (law.alpha, law.beta) == pytest.approx((max(-exponent, 0.0), min(-exponent, 0.0)), abs=1e-3)


@pytest.mark.parametrize(("tokens", "losses"), [([], []), ([1, 1, 2, 2], [3, 3, 2, 2]), ([1, 2, 3], [np.nan] * 3)])
def test_a_history_of_fewer_than_three_token_counts_is_refused(tokens, losses):
    with pytest.raises(FitError, match="at least 3"):
        fit(tokens, losses)


positive = st.floats(1e-20, 1e20) | st.integers(1, 8).map(float) | st.floats(1e5, 1e11)
loss = st.floats(0, 1e9) | st.floats(0, 10) | st.sampled_from([2.0, 2.5, 1e-8])
point = st.tuples(positive | st.sampled_from([np.nan, np.inf, -1.0, 0.0]), loss | st.just(np.nan), st.floats(0, 1))


@settings(max_examples=50, deadline=None)
@given(st.lists(point, max_size=30), st.booleans())
def test_any_history_is_refused_or_gives_finite_positive_predictions(points, with_sparsity):
    tokens, losses, sparsity = np.array(points).reshape(-1, 3).T
    try:
        law = fit(tokens, losses, sparsity if with_sparsity else None)
    except FitError:
        return
    assert min(law.A, law.E) > 0 and 0 <= law.alpha <= 10 and -10 <= law.beta <= 10
    predicted = law.predict(np.array([1e-20, 1.0, 1e11, 1e20])[:, None], np.array([0.0, 0.5, 1.0]))
    assert np.isfinite(predicted).all() and (predicted > 0).all() and np.isfinite(law.objective)
