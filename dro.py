"""The data mix: distributionally robust optimisation over domains, its baselines, and the state of a run.

Given how far each domain's loss lies above its reference loss, choose the ratios that train on it next. Sources:
DRPruning (Deng et al. 2025, arXiv 2411.14055) for the robust mix and the dynamic reference ratio, Sheared LLaMA (Xia et
al. 2024, arXiv 2310.06694) for `sheared`. Suffix _M: one float64 per domain.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

import refloss

CLAMP = 2.0  # n: the reference ratio stays within [p0 / n, n p0]
SMOOTHING = 1e-4  # c of the baselines
MOVE = 0.1  # delta: how fast the reference ratio follows the mix
EMA = 0.1  # weight of the newest training loss
HISTORY_FROM, FIT_FROM, MOVE_FROM = 0.02, 0.10, 0.20  # shares of the run: record, first fit, reference ratio moves
FIT_MORE_THAN, FIT_POINTS = 10, 64  # a fit needs more than 10 points of the history and takes at most 64
NEARLY_ONE = 0.9  # a ratio above this is warned about: near one-hot mixes are the field's best-known failure
BELOW_REFERENCE = 0.05  # nats that a loss may lie below its reference without a warning
STATE = ("ratio_M", "reference_ratio_M", "reference_loss_M", "loss_M", "train_loss_M", "train_weight_M", "fitted_M")


def _checked(ratio_M, *losses) -> np.ndarray:
    """Ratios that sum to one, and the losses, (1 + len(losses), M). Raises ValueError for what is no ratio or loss."""
    arrays = np.array([ratio_M, *losses], dtype=np.float64)
    if not np.isfinite(arrays).all() or (arrays[0] < 0).any() or arrays[0].sum() <= 0:
        raise ValueError(f"losses must be finite, ratios not negative and not all zero, are {arrays.tolist()}")
    arrays[0] /= arrays[0].max()
    arrays[0] /= arrays[0].sum()
    return arrays


def divergence(q_M: np.ndarray, p_M: np.ndarray) -> float:
    """1/2 sum_m p_m (q_m / p_m - 1)^2, the chi-square divergence; domains with p_m = 0 are out."""
    with np.errstate(over="ignore"):  # a ratio p near 0 may make it infinite, which is right
        return 0.5 * ((q_M - p_M) ** 2 / np.where(p_M > 0, p_M, np.inf)).sum()


def excess_loss(loss_M: np.ndarray, reference_loss_M: np.ndarray) -> np.ndarray:
    """loss - reference; where none is positive the reference is scaled by 0.9, 0.8, ... until one is (as published)."""
    scaled = (loss_M - reference_loss_M * (tenths / 10) for tenths in range(10, 0, -1))
    return next((excess_M for excess_M in scaled if (excess_M > 0).any()), loss_M)


def chi_square_ratio(loss_M, reference_loss_M, reference_ratio_M, rho=0.1, floor=0.2, clamp_to_min=True) -> np.ndarray:
    """The most robust mix in a chi-square ball around the reference ratio p.

        max_q sum_m q_m e_m   s.t.  1/2 sum_m p_m (q_m / p_m - 1)^2 <= rho
        q_m(eta) = p_m max(relu(e_m - eta) / sum_k p_k relu(e_k - eta), floor), renormalised

    loss_M, reference_loss_M: nats. clamp_to_min: raise every ratio to min p afterwards, renormalised (as published).
    Returns q (M,), finite, summing to one. Where the ball reaches further than eta can go (one domain holds most of
    p), that is the mix of eta -> max e; where all excess losses are equal, it is p.
    Raises ValueError for values that are not finite and for ratios that are negative or all zero.
    """
    p_M, loss_M, reference_loss_M = _checked(reference_ratio_M, loss_M, reference_loss_M)
    excess_M = excess_loss(loss_M / 4, reference_loss_M / 4)  # quarters: no difference of floats overflows
    top, bottom = excess_M[p_M > 0].max(), excess_M[p_M > 0].min()
    if rho <= 0 or top == bottom:
        return p_M
    below_M = 1.0 - (np.clip(excess_M, bottom, top) - bottom) / (top - bottom)  # the mix keeps under shift and scale
    below_M[below_M < 1e-12] = 0.0  # the worst domains tie, but for rounding

    def mix(s: float) -> np.ndarray:  # s = 1 / (max e - eta): 0 gives p
        share_M = p_M * np.maximum(1.0 - s * below_M, 0.0)
        q_M = np.maximum(share_M / share_M.sum(), floor * p_M)
        return q_M / q_M.sum()

    s = 1.0 / below_M[below_M > 0].min()  # from here on everything above the floor is on the worst domains
    if divergence(mix(s), p_M) > rho:
        s = brentq(lambda s: (s > 0) * divergence(mix(s), p_M) - rho, 0.0, s, xtol=1e-15, rtol=1e-15, maxiter=10_000)
    q_M = np.maximum(mix(s), p_M.min() if clamp_to_min else 0.0)
    return q_M / q_M.sum()


def _smoothed_softmax(logit_M, loss_M, reference_loss_M) -> np.ndarray:
    with np.errstate(over="ignore"):
        x_M = logit_M + np.clip(loss_M - reference_loss_M, -1e300, 1e300)
    y_M = np.exp(x_M - x_M.max())
    return (1 - SMOOTHING) * y_M / y_M.sum() + SMOOTHING / len(y_M)


def sheared_ratio(loss_M, reference_loss_M, ratio_M) -> np.ndarray:
    """Sheared LLaMA's dynamic batch loading: (1 - c) softmax(log w + loss - reference) + c / M."""
    w_M, loss_M, reference_loss_M = _checked(ratio_M, loss_M, reference_loss_M)
    with np.errstate(divide="ignore"):
        return _smoothed_softmax(np.log(w_M), loss_M, reference_loss_M)


def bandit_ratio(loss_M, reference_loss_M, ratio_M) -> np.ndarray:
    """The published bandit baseline: (1 - c) softmax(w + loss - reference) + c / M."""
    return _smoothed_softmax(*_checked(ratio_M, loss_M, reference_loss_M))


def next_reference_ratio(reference_ratio_M, ratio_M, initial_ratio_M, within_extremes=True) -> np.ndarray:
    """The dynamic reference ratio: p follows q, within [p0 / n, n p0] and then [min p0, max p0] (all (M,)).

    within_extremes: the last, as published; it lets an equal p0 never move.
    """
    p0_M, p_M, q_M = _checked(initial_ratio_M, reference_ratio_M, ratio_M)
    p_M = (1 - MOVE) * p_M + MOVE * q_M
    p_M = np.clip(p_M / p_M.sum(), p0_M / CLAMP, p0_M * CLAMP)
    if within_extremes:
        p_M = np.clip(p_M / p_M.sum(), p0_M.min(), p0_M.max())
    return p_M / p_M.sum()


RULES: dict[str, Callable[["Mix", np.ndarray], np.ndarray]] = {  # (mix, loss_M) -> ratio_M; losses in nats
    "constant": lambda mix, loss_M: mix.ratio_M,
    "sheared": lambda mix, loss_M: sheared_ratio(loss_M, mix.reference_loss_M, mix.ratio_M),
    "bandit": lambda mix, loss_M: bandit_ratio(loss_M, mix.reference_loss_M, mix.ratio_M),
    "dro": lambda mix, loss_M: chi_square_ratio(
        loss_M, mix.reference_loss_M, mix.reference_ratio_M, clamp_to_min=mix.absolute
    ),
}


@dataclass
class Mix:
    """The mix of one run: what it is now, and what the next evaluation makes of it."""

    domains: tuple[str, ...]
    initial_ratio_M: np.ndarray
    kind: str = "constant"  # a key of RULES
    dynamic_reference: bool = True  # predict the reference losses by the scaling law (refloss.py)
    dynamic_ratio: bool = True  # the reference ratio follows the mix (dro only)
    clip_reference: bool = True  # a prediction lies under all losses so far and never rises (pinned in a sparsity ramp)
    on_training_loss: bool = False  # the rule sees the moving average of the training loss
    reference_loss_M: np.ndarray | None = None  # nats; None: the mix stays until each domain has a law
    prior: float = 1.0  # the mix starts, and its ball is centred, at initial_ratio^prior; below 1 bounds are relative

    def __post_init__(self) -> None:
        M = len(self.domains)
        self.rule = RULES[self.kind]
        p0_M = _checked(self.initial_ratio_M)[0]
        self.initial_ratio_M = _checked(np.where(p0_M > 0, p0_M**self.prior, 0.0))[0] if self.prior != 1.0 else p0_M
        self.absolute = self.prior == 1.0  # bounds by the smallest and largest ratio, as published
        self.ratio_M, self.reference_ratio_M = self.initial_ratio_M.copy(), self.initial_ratio_M.copy()
        self.loss_M = np.full(M, np.nan)  # the last finite validation loss of each domain
        self.train_loss_M, self.train_weight_M = np.zeros(M), np.zeros(M)  # a moving average and what it weighs
        self.fitted_M = np.zeros(M, bool)  # has the domain's reference loss come from its own law yet
        self.history, self.warned = [], []  # [tokens_M, loss_M, sparsity] of evaluations; warnings of the last one

    def observe_training(self, loss_sum_M: np.ndarray, count_M: np.ndarray) -> None:
        """One step's summed loss and number of tokens of each domain; a domain without any keeps its average."""
        seen_M = (count_M > 0) & np.isfinite(loss_sum_M)
        loss_M, weight_M = self.train_loss_M[seen_M], self.train_weight_M[seen_M]
        self.train_weight_M[seen_M] = (1 - EMA) * weight_M + EMA  # which corrects for the start
        self.train_loss_M[seen_M] += EMA / self.train_weight_M[seen_M] * (loss_sum_M[seen_M] / count_M[seen_M] - loss_M)

    def update(self, loss_M, tokens_M, progress, sparsity=0.0, final_sparsity=0.0, record=True) -> list[str]:
        """Take in one evaluation and choose the next ratios. Returns warnings, each when it begins to hold.

        loss_M: validation losses, nats. tokens_M: training tokens so far. progress: step / max_steps. sparsity: overall
        expected sparsity now, and final_ at the end (0: no pruning). record: whether the law sees this evaluation.
        """
        before, self.warned = self.warned, []
        self._warn(~np.isfinite(loss_M), "no finite validation loss, its last one stays")
        self.loss_M = np.where(np.isfinite(loss_M), loss_M, self.loss_M)
        if np.isfinite(self.loss_M).all():  # else some domain has never had a loss: nothing to compare yet
            if self.dynamic_reference and record and progress >= HISTORY_FROM:
                self.history.append([np.asarray(tokens_M, float).tolist(), self.loss_M.tolist(), float(sparsity)])
                if progress >= FIT_FROM and len(self.history) > FIT_MORE_THAN:
                    self._predict_reference(progress, final_sparsity)
            if self.reference_loss_M is not None:
                self._choose_ratio(progress)
        return [text for text in self.warned if text not in before]

    def _warn(self, concerned_M: np.ndarray, text: str) -> None:
        self.warned += [f"domain {domain}: {text}" for domain in np.array(self.domains)[concerned_M]]

    def _choose_ratio(self, progress: float) -> None:
        trained_M = self.on_training_loss & (self.train_weight_M > 0)
        self.ratio_M = self.rule(self, np.where(trained_M, self.train_loss_M, self.loss_M))
        self._warn(self.ratio_M > max(NEARLY_ONE, self.initial_ratio_M.max()), "the mix is nearly this domain alone")
        if self.kind == "dro" and self.dynamic_ratio and progress >= MOVE_FROM:
            self.reference_ratio_M = next_reference_ratio(
                self.reference_ratio_M, self.ratio_M, self.initial_ratio_M, within_extremes=self.absolute
            )

    def _predict_reference(self, progress: float, final_sparsity: float) -> None:
        """reference <- the scaling law's loss at the end of the run, fitted to the history."""
        spread_out = np.unique(np.linspace(0, len(self.history) - 1, FIT_POINTS).round().astype(int))
        tokens_PM, loss_PM, sparsity_P = map(np.array, zip(*(self.history[i] for i in spread_out), strict=True))
        before_M = np.full(len(self.domains), np.nan) if self.reference_loss_M is None else self.reference_loss_M
        most_M = np.where(self.fitted_M, before_M, np.min([loss_M for _, loss_M, _ in self.history], axis=0))
        reference_M, fitted_M = before_M.copy(), self.fitted_M.copy()
        for m in range(len(self.domains)):
            try:
                law = refloss.fit(tokens_PM[:, m], loss_PM[:, m], sparsity_P if final_sparsity else None)
            except refloss.FitError:
                self._warn(np.array([m]), "no scaling law yet, its reference loss stays")
                continue
            end = law.predict(tokens_PM[-1, m] / progress, final_sparsity or 1.0)
            reference_M[m], fitted_M[m] = min(end, most_M[m]) if self.clip_reference else end, True
        if np.isfinite(reference_M).all():  # else a domain has neither a given nor a predicted one: the mix waits
            self.reference_loss_M, self.fitted_M = reference_M, fitted_M
            self._warn(self.loss_M < reference_M - BELOW_REFERENCE, "its loss is already below its reference loss")

    def state_dict(self) -> dict:
        arrays = {name: np.asarray(getattr(self, name)).tolist() for name in STATE}
        return {**arrays, "history": self.history, "warned": self.warned}

    def load_state_dict(self, state: dict) -> None:
        for name in STATE:
            setattr(self, name, None if state[name] is None else np.array(state[name]))
        self.history, self.warned = state["history"], state["warned"]
