"""The mix: the published code's outputs, the definition by brute force, and every corner the method names."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import dro
from dro import Mix, bandit_ratio, chi_square_ratio, divergence, next_reference_ratio, sheared_ratio

ORACLE = {name: json.loads((Path(__file__).parent / f"oracle/{name}.json").read_text()) for name in ("dro", "sheared")}
losses_in_nats = st.floats(0, 12)
any_float = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def domains(draw, loss=losses_in_nats, least_ratio=1e-4):
    m = draw(st.integers(1, 12))
    losses = [np.array(draw(st.lists(loss, min_size=m, max_size=m))) for _ in range(2)]
    p_M = np.array(draw(st.lists(st.floats(least_ratio, 1.0), min_size=m, max_size=m).filter(any)))
    return *losses, p_M / p_M.max() / (p_M / p_M.max()).sum()


@pytest.mark.parametrize("case", ORACLE["dro"])
def test_the_robust_mix_agrees_with_the_published_code(case):
    arguments = [np.array(case[k]) for k in ("loss", "reference_loss", "reference_ratio")]
    for clamp, expected in ((False, case["weights_unclamped"]), (True, case["weights_clamped"])):
        q_M = chi_square_ratio(*arguments, rho=case["rho"], floor=case["min_ratio"], clamp_to_min=clamp)
        assert np.abs(q_M - expected).max() < 1e-4


@pytest.mark.parametrize("case", ORACLE["sheared"])
def test_the_sheared_mix_agrees_with_the_published_code(case):
    assert np.abs(sheared_ratio(case["loss"], case["reference_loss"], case["ratio"]) - case["new_ratio"]).max() < 1e-4


@settings(max_examples=25)
@given(domains(st.floats(1, 6), least_ratio=0.05), st.floats(0.01, 0.5))
def test_without_a_floor_the_robust_mix_is_the_solution_of_the_optimisation_problem(case, rho):
    loss_M, reference_M, p_M = case
    excess_M = dro.excess_loss(loss_M, reference_M)
    q_M = chi_square_ratio(loss_M, reference_M, p_M, rho=rho, floor=0.0, clamp_to_min=False)
    best = minimize(
        lambda q: -q @ excess_M,
        p_M,
        jac=lambda q: -excess_M,
        method="SLSQP",
        bounds=[(0, 1)] * len(p_M),
        constraints=[
            {"type": "eq", "fun": lambda q: q.sum() - 1, "jac": np.ones_like},
            {"type": "ineq", "fun": lambda q: rho - divergence(q, p_M), "jac": lambda q: -(q - p_M) / p_M},
        ],
    )
    if best.success:
        assert q_M @ excess_M >= -best.fun - 1e-4 * (1 + np.ptp(excess_M))


@given(domains(any_float, least_ratio=0.0), st.floats(0, 10), st.floats(0, 1), st.booleans())
def test_any_finite_input_gives_a_mix(case, rho, floor, clamp):
    loss_M, reference_M, p_M = case
    q_M = chi_square_ratio(loss_M, reference_M, p_M, rho, floor, clamp)
    assert np.isfinite(q_M).all() and (q_M >= 0).all() and abs(q_M.sum() - 1) < 1e-9
    for baseline in (sheared_ratio, bandit_ratio):
        w_M = baseline(loss_M, reference_M, p_M)
        assert np.isfinite(w_M).all() and abs(w_M.sum() - 1) < 1e-9 and (w_M >= 0.99e-4 / len(w_M)).all()


@given(domains(), st.floats(1e-3, 2), st.floats(0, 0.9))
def test_the_mix_stays_in_the_ball_and_above_the_floor(case, rho, floor):
    loss_M, reference_M, p_M = case
    q_M = chi_square_ratio(loss_M, reference_M, p_M, rho, floor, clamp_to_min=False)
    assert divergence(q_M, p_M) <= rho * (1 + 1e-6) + 1e-12
    assert (q_M >= floor * p_M / (1 + floor) - 1e-12).all()


@given(domains(), st.randoms())
def test_the_mix_does_not_depend_on_the_order_of_the_domains(case, random):
    order = list(range(len(case[0])))
    random.shuffle(order)
    assert np.allclose(chi_square_ratio(*(a[order] for a in case)), chi_square_ratio(*case)[order], atol=1e-9)


@given(domains(st.floats(2, 6)), st.floats(0.1, 10))
def test_the_mix_does_not_depend_on_the_scale_of_the_excess(case, scale):
    loss_M, reference_M, p_M = case
    excess_M = np.abs(loss_M - reference_M) + 0.01
    once_M, scaled_M = (chi_square_ratio(x * excess_M, np.zeros_like(p_M), p_M) for x in (1.0, scale))
    assert np.allclose(once_M, scaled_M, atol=1e-6)


def test_equal_excess_losses_leave_the_reference_ratio_and_those_equal_but_for_rounding_share():
    assert np.allclose(chi_square_ratio([3.0, 4.0, 5.0], [2.0, 3.0, 4.0], [0.5, 0.3, 0.2]), [0.5, 0.3, 0.2])
    q_M = chi_square_ratio([0.3, 0.1 + 0.2, 0.0], [0.0] * 3, [1 / 3] * 3, rho=10.0)
    assert q_M[0] == pytest.approx(q_M[1])


@pytest.mark.parametrize("largest", [0.76, 0.9, 0.99])
def test_a_ball_that_reaches_past_the_simplex_gives_the_most_robust_mix_not_the_reference(largest):
    p_M = np.array([largest, *[(1 - largest) / 3] * 3])
    q_M = chi_square_ratio([3.0, 2.0, 2.1, 2.2], [1.0, 1.0, 1.0, 1.0], p_M, rho=1.0, clamp_to_min=False)
    expected_M = p_M * np.array([1 / largest, 0.2, 0.2, 0.2])
    assert np.allclose(q_M, expected_M / expected_M.sum())


def test_when_every_domain_beats_its_reference_the_reference_is_scaled_down():
    loss_M, p_M = np.array([1.75, 2.4]), np.array([0.5, 0.5])
    reference_M = np.array([2.0, 3.0])  # at 0.8 of it the excess is 0.15 and 0
    assert np.allclose(dro.excess_loss(loss_M, reference_M), [0.15, 0.0])
    assert chi_square_ratio(loss_M, reference_M, p_M)[0] > 0.5


@given(domains())
def test_the_last_clamp_raises_every_ratio_to_the_least_reference_ratio(case):
    q_M = chi_square_ratio(*case)
    assert (q_M * (1 + len(q_M) * case[2].min()) >= case[2].min() - 1e-12).all()


@pytest.mark.parametrize("loss, ratio", [([1, np.nan], [0.5, 0.5]), ([1, 2], [0.5, -0.5]), ([1, 2], [0, 0])])
def test_what_is_no_loss_or_no_ratio_is_refused(loss, ratio):
    with pytest.raises(ValueError, match="must be finite"):
        chi_square_ratio(loss, [1.0, 1.0], ratio)


@given(domains(least_ratio=0.01), st.integers(1, 30))
def test_the_dynamic_reference_ratio_stays_within_its_bounds(case, updates):
    loss_M, reference_M, p0_M = case
    p_M = p0_M
    for _ in range(updates):
        p_M = next_reference_ratio(p_M, chi_square_ratio(loss_M, reference_M, p_M), p0_M)
    assert abs(p_M.sum() - 1) < 1e-9
    # the last renormalisation divides by the sum of the clipped values, which lies in [1/2, 2]
    assert (p_M >= p0_M / 4 - 1e-12).all() and (p_M <= p0_M * 4 + 1e-12).all()


def test_the_dynamic_reference_ratio_is_its_formula():
    p0_M, p_M, q_M = np.array([0.6, 0.3, 0.1]), np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.7])
    moved_M = 0.9 * p_M + 0.1 * q_M  # 0.46 0.29 0.25; the bounds [p0/2, 2 p0] cut the last to 0.2
    clipped_M = np.array([moved_M[0], moved_M[1], 0.2])
    expected_M = np.clip(clipped_M / clipped_M.sum(), 0.1, 0.6)
    assert np.allclose(next_reference_ratio(p_M, q_M, p0_M), expected_M / expected_M.sum())


def mix(kind="dro", **options):
    return Mix(("a", "b", "c"), np.array([0.5, 0.3, 0.2]), kind, **options)


def run(m, losses=lambda t: np.array([2 + t**-0.5, 3 + t**-0.2, 1 + 0.2 * t**-0.5]), evaluations=30, of=30):
    """(evaluation, text) of each warning of the first evaluations of a run."""
    said = []
    for i in range(1, evaluations + 1):
        t = i / of
        said += [(i, text) for text in m.update(losses(t), 1e5 * t * np.array([0.5, 0.3, 0.2]), t)]
    return said


def test_a_constant_mix_never_moves_and_still_predicts_reference_losses():
    m = mix("constant")
    assert run(m, evaluations=15) == []
    assert np.array_equal(m.ratio_M, m.initial_ratio_M)
    assert np.allclose(m.reference_loss_M, [3.0, 4.0, 1.2], atol=0.01)


@pytest.mark.parametrize("kind", ["sheared", "bandit", "dro"])
def test_without_reference_losses_the_mix_waits_for_the_first_fit(kind):
    m = mix(kind)
    run(m, evaluations=10)  # ten points are not more than ten
    assert np.array_equal(m.ratio_M, m.initial_ratio_M)
    run(m, evaluations=11)
    assert not np.array_equal(m.ratio_M, m.initial_ratio_M)


def test_given_reference_losses_are_used_at_once_and_kept_when_not_dynamic():
    given_M = np.array([2.0, 2.0, 2.0])
    m = mix("dro", dynamic_reference=False, dynamic_ratio=False, reference_loss_M=given_M)
    m.update(np.array([2.1, 2.9, 2.3]), np.ones(3), 0.01)
    assert np.allclose(m.ratio_M, chi_square_ratio([2.1, 2.9, 2.3], given_M, m.initial_ratio_M))
    run(m)
    assert np.array_equal(m.reference_loss_M, given_M)
    assert np.array_equal(m.reference_ratio_M, m.initial_ratio_M)


def test_the_reference_ratio_moves_from_a_fifth_of_the_run_on():
    m = mix("dro", dynamic_reference=False, reference_loss_M=np.array([2.0, 2.0, 2.0]))
    m.update(np.array([2.1, 2.9, 2.3]), np.ones(3), 0.19)
    assert np.array_equal(m.reference_ratio_M, m.initial_ratio_M)
    m.update(np.array([2.1, 2.9, 2.3]), np.ones(3), 0.20)
    assert m.reference_ratio_M[1] > m.initial_ratio_M[1]


def test_a_clipped_reference_never_rises_and_starts_at_most_at_the_lowest_loss():
    m, references = mix("constant"), []
    for i in range(1, 31):
        rising = 2 + 0.1 * i * np.array([1.0, -0.1, 0.5])
        m.update(rising, 1e4 * i * m.ratio_M, i / 30)
        if m.reference_loss_M is not None:
            references.append(m.reference_loss_M)
    assert (np.diff(references, axis=0) <= 0).all()
    assert (references[0] <= [2.1, 2.0, 2.05]).all()


def test_without_any_law_the_mix_stays_where_it_is():
    m, said = mix("dro"), []
    for i in range(1, 31):
        said += m.update(np.array([3.0, 2.0, 1.0]) / i**0.1, np.full(3, 1e5), i / 30)  # the tokens never move
    assert m.reference_loss_M is None
    assert np.array_equal(m.ratio_M, m.initial_ratio_M)
    assert said == [f"domain {d}: no scaling law yet, its reference loss stays" for d in "abc"]


def test_evaluations_that_are_not_recorded_do_not_enter_the_law():
    m = mix("dro")
    for i in range(1, 31):
        m.update(np.array([3.0, 2.0, 1.0]) / i**0.1, np.full(3, 1e5 * i), i / 30, record=i > 25)
    assert len(m.history) == 5 and m.reference_loss_M is None


def test_an_unclipped_reference_follows_the_law():
    m = mix("constant", clip_reference=False)
    run(m, lambda t: np.array([2 + t, 3 + t**-0.2, 1.0]))
    assert m.reference_loss_M[0] > 2.1


def test_a_loss_that_falls_below_its_reference_is_warned_about_once_when_it_does():
    falls = lambda t: np.array([2 + t**-0.5 - (0.8 if t > 0.8 else 0), 3 + t**-0.2, 1 + 0.2 * t**-0.5])  # noqa: E731
    assert run(mix(), falls) == [(25, "domain a: its loss is already below its reference loss")]


def test_a_mix_of_nearly_one_domain_is_warned_about_unless_it_began_so():
    m = mix("sheared", dynamic_reference=False, reference_loss_M=np.full(3, 2.0))
    assert run(m, lambda t: np.array([2.0, 2.0, 9.0])) == [(1, "domain c: the mix is nearly this domain alone")]
    alone = Mix(("a",), np.ones(1), "sheared", False, reference_loss_M=np.ones(1))
    assert alone.update(np.array([2.0]), np.ones(1), 0.5) == []


def test_a_loss_that_is_not_finite_keeps_the_last_one_and_the_mix_waits_for_a_first_one():
    m = mix("dro", dynamic_reference=False, reference_loss_M=np.array([2.0, 2.0, 2.0]))
    (text,) = m.update(np.array([2.1, np.nan, 2.3]), np.ones(3), 0.01)
    assert text == "domain b: no finite validation loss, its last one stays"
    assert np.array_equal(m.ratio_M, m.initial_ratio_M)
    m.update(np.array([2.1, 2.9, 2.3]), np.ones(3), 0.01)
    before_M = m.ratio_M
    m.update(np.array([2.1, np.nan, 2.3]), np.ones(3), 0.02)
    assert np.array_equal(m.ratio_M, before_M)


def test_the_training_loss_is_a_bias_corrected_average_and_a_domain_without_tokens_keeps_its_own():
    m = mix("dro", on_training_loss=True, dynamic_reference=False, reference_loss_M=np.array([2.0, 2.0, 2.0]))
    m.observe_training(np.array([30.0, 0.0, np.nan]), np.array([10, 0, 4]))
    m.observe_training(np.array([20.0, 10.0, np.nan]), np.array([10, 4, 4]))
    m.observe_training(np.array([20.0, 0.0, np.nan]), np.array([10, 0, 4]))
    average = (0.081 * 3 + 0.09 * 2 + 0.1 * 2) / (1 - 0.9**3)
    m.update(np.array([4.0, 4.0, 4.0]), np.ones(3), 0.1)  # the last one has no training loss: its validation loss
    assert np.allclose(m.ratio_M, chi_square_ratio([average, 2.5, 4.0], [2.0] * 3, m.initial_ratio_M))


@pytest.mark.parametrize("kind", ["sheared", "dro"])
def test_a_restored_mix_goes_on_exactly(kind):
    whole, half = mix(kind), mix(kind)
    for i in range(1, 31):
        loss_M = np.array([2.0, 3.0, 1.0]) + (i / 30) ** -np.array([0.5, 0.2, 0.3])
        if i == 17:
            restored = mix(kind)
            restored.load_state_dict(json.loads(json.dumps(half.state_dict())))
            half = restored
        for m in (whole, half):
            m.observe_training(loss_M * 5, np.array([5, 5, 5]))
            m.update(loss_M, 1e4 * i * np.ones(3), i / 30, sparsity=i / 60, final_sparsity=0.5)
    assert whole.state_dict() == half.state_dict()


def test_a_rule_added_from_outside_is_used(monkeypatch):
    monkeypatch.setitem(dro.RULES, "mine", lambda mix, loss_M: loss_M / loss_M.sum())
    m = mix("mine", dynamic_reference=False, reference_loss_M=np.ones(3))
    m.update(np.array([2.0, 1.0, 5.0]), np.ones(3), 0.5)
    assert np.allclose(m.ratio_M, [0.25, 0.125, 0.625])


@pytest.mark.parametrize(("prior", "begins"), [(1.0, [0.8, 0.2]), (0.5, [2 / 3, 1 / 3]), (0.0, [0.5, 0.5])])
def test_a_prior_flattens_the_ratios_that_the_mix_begins_with_and_bounds_are_relative_to(prior, begins):
    mix = Mix(("a", "b"), np.array([0.8, 0.2]), "dro", False, reference_loss_M=np.ones(2), prior=prior)
    assert mix.ratio_M == pytest.approx(begins)
    for step in range(1, 300):
        mix.update(np.array([1.1, 3.0]), np.ones(2), step / 300)
    share = mix.reference_ratio_M[1]
    assert share == pytest.approx(min(2 * begins[1], 1 - begins[0] / 2), abs=0.05)  # p0 / n to n p0 can be reached
    for step in range(1, 300):
        mix.update(np.array([3.0, 1.1]), np.ones(2), step / 300)
    least = 0.2 if prior == 1.0 else begins[1] / 2  # published: never under the least ratio of the start
    assert mix.reference_ratio_M[1] == pytest.approx(least, abs=0.02)


def test_a_domain_without_a_share_gets_none_from_an_equal_prior():
    mix = Mix(("a", "b", "c"), np.array([0.7, 0.3, 0.0]), prior=0.0)
    assert mix.ratio_M.tolist() == [0.5, 0.5, 0.0]
