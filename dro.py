"""The data mix: distributionally robust optimisation over domains, its baselines, and the state of a run.

Given how far each domain's loss lies above its reference loss, choose the ratios that train on it next. Everything
is float64 numpy of shape (M,), M domains; the functions are pure and the state is small.

Sources: DRPruning (Deng et al. 2025, arXiv 2411.14055) for the robust mix and the dynamic reference ratio, Sheared
LLaMA (Xia et al. 2024, arXiv 2310.06694) for `sheared`. Suffix _M: one number per domain.
"""

import math
import warnings
from dataclasses import astuple, dataclass, field

import numpy as np

import refloss

SECTIONS, SECTIONINGS = np.linspace(0.0, 1.0, 129), 6  # of the bracket of eta: to 1e-12 of the spread of the losses
CLAMP = 2.0  # n: the reference ratio stays within [p0 / n, n p0]
MOVE = 0.1  # delta: how fast the reference ratio follows the mix
EMA = 0.1  # weight of the newest training loss
HISTORY_FROM, FIT_FROM, MOVE_FROM = 0.02, 0.10, 0.20  # shares of the run: record, first fit, reference ratio moves
FIT_POINTS = 64  # at most this many points of the history go into a fit
FIT_MORE_THAN = 10  # and it needs more than this many
SEARCH_EVERY = 4  # fits: the others start from the last laws
AT_BOUND_FOR = 10  # evaluations in a row with a ratio at its bound that are worth a warning
BELOW_REFERENCE = 0.05  # nats that a loss may lie below its reference without a warning
LAW_MISSES = 0.1  # nats that a law may miss the last evaluation, or as much as this lies above the reference
MIXES = ("constant", "sheared", "bandit", "dro")


def _checked(ratio_M, *losses: np.ndarray) -> tuple[np.ndarray, ...]:
    arrays = [np.asarray(a, dtype=np.float64) for a in (ratio_M, *losses)]
    p_M = arrays[0]
    if p_M.ndim != 1 or any(a.shape != p_M.shape for a in arrays):
        raise ValueError(f"losses and ratios must all have shape (M,), are {[a.shape for a in arrays]}")
    if not np.isfinite(arrays).all():
        raise ValueError(f"losses and ratios must be finite, are {[a.tolist() for a in arrays[1:]]}, {p_M.tolist()}")
    if (p_M < 0).any() or p_M.sum() <= 0:
        raise ValueError(f"ratios must not be negative and not all zero, are {p_M.tolist()}")
    p_M = p_M / p_M.max()
    return (p_M / p_M.sum(), *arrays[1:])


def divergence(q_M: np.ndarray, p_M: np.ndarray) -> np.ndarray:
    """1/2 sum_m p_m (q_m / p_m - 1)^2, the chi-square divergence; domains with p_m = 0 are out. q (..., M)."""
    with np.errstate(over="ignore"):  # a ratio p near 0 may make it infinite, which is right
        return 0.5 * ((q_M - p_M) ** 2 / np.where(p_M > 0, p_M, np.inf)).sum(-1)


def excess_loss(loss_M: np.ndarray, reference_loss_M: np.ndarray) -> np.ndarray:
    """loss - reference; where none is positive the reference is scaled by 0.9, 0.8, ... until one is (as published)."""
    for tenths in range(10, -1, -1):
        excess_M = loss_M - reference_loss_M * (tenths / 10)
        if (excess_M > 0).any():
            break
    return excess_M


def chi_square_ratio(
    loss_M, reference_loss_M, reference_ratio_M, rho: float = 0.1, floor: float = 0.2, clamp_to_min: bool = True
) -> np.ndarray:
    """The most robust mix in a chi-square ball around the reference ratio (DRPruning, equation of the mix).

        max_q sum_m q_m e_m   s.t.  1/2 sum_m p_m (q_m / p_m - 1)^2 <= rho
        q_m(eta) = p_m max(relu(e_m - eta) / sum_k p_k relu(e_k - eta), floor), renormalised; eta by 128-section

    loss_M, reference_loss_M: nats. reference_ratio_M: p, sums to one. rho: radius of the ball. floor: least q_m / p_m
    before renormalisation. clamp_to_min: raise every ratio to min p afterwards, renormalised (as published).
    Returns q (M,), finite, summing to one. Where the ball reaches further than eta can go (one domain holds most of
    p), that is the mix of eta -> max e; where all excess losses are equal, it is p.
    Raises ValueError for values that are not finite and for ratios that are negative or all zero.
    """
    p_M, loss_M, reference_loss_M = _checked(reference_ratio_M, loss_M, reference_loss_M)
    excess_M = excess_loss(loss_M / 4, reference_loss_M / 4)  # quarters: no difference of floats overflows
    on = p_M > 0
    top, bottom = excess_M[on].max(), excess_M[on].min()
    if rho <= 0 or top == bottom:
        return p_M
    e_M = (np.where(on, excess_M, bottom) - bottom) / (top - bottom)  # the mix does not depend on shift and scale

    def mix(weight_M: np.ndarray) -> np.ndarray:  # or weights of many etas, (K, M)
        share_M = p_M * weight_M
        q_M = np.maximum(share_M / share_M.sum(-1, keepdims=True), floor * p_M)
        return q_M / q_M.sum(-1, keepdims=True)

    q_M = mix((e_M == 1.0).astype(float))  # eta -> max e: everything above the floor on the worst domains
    if divergence(q_M, p_M) > rho:
        inside, outside = -1.0 / math.sqrt(2 * rho), 1.0  # at that eta the divergence is under rho whatever e is
        for _ in range(SECTIONINGS):
            eta_K = inside + (outside - inside) * SECTIONS
            with np.errstate(invalid="ignore"):  # no domain has weight: NaN, which is not under rho
                under_K = divergence(mix(np.maximum(e_M - eta_K[1:-1, None], 0.0)), p_M) <= rho
            k = int(np.append(under_K, False).argmin())
            inside, outside = eta_K[k], eta_K[k + 1]
        q_M = mix(np.maximum(e_M - inside, 0.0))
    return clamped_to_min(q_M, p_M) if clamp_to_min else q_M


def clamped_to_min(q_M: np.ndarray, p_M: np.ndarray) -> np.ndarray:
    q_M = np.maximum(q_M, p_M.min())
    return q_M / q_M.sum()


def _bounded_difference(a_M: np.ndarray, b_M: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.clip(a_M - b_M, -1e300, 1e300)


def _softmax(x_M: np.ndarray) -> np.ndarray:
    y_M = np.exp(x_M - x_M.max())
    return y_M / y_M.sum()


def sheared_ratio(loss_M, reference_loss_M, ratio_M, smoothing: float = 1e-4) -> np.ndarray:
    """Sheared LLaMA's dynamic batch loading: (1 - c) softmax(log w + loss - reference) + c / M."""
    w_M, loss_M, reference_loss_M = _checked(ratio_M, loss_M, reference_loss_M)
    with np.errstate(divide="ignore"):
        q_M = _softmax(np.log(w_M) + _bounded_difference(loss_M, reference_loss_M))
    return (1 - smoothing) * q_M + smoothing / len(q_M)


def bandit_ratio(loss_M, reference_loss_M, ratio_M, smoothing: float = 1e-4) -> np.ndarray:
    """The published bandit baseline: (1 - c) softmax(w + loss - reference) + c / M."""
    w_M, loss_M, reference_loss_M = _checked(ratio_M, loss_M, reference_loss_M)
    q_M = _softmax(w_M + _bounded_difference(loss_M, reference_loss_M))
    return (1 - smoothing) * q_M + smoothing / len(q_M)


def next_reference_ratio(
    reference_ratio_M, ratio_M, initial_ratio_M, move: float = MOVE, n: float = CLAMP
) -> np.ndarray:
    """The dynamic reference ratio: p follows q, within [p0 / n, n p0] and then [min p0, max p0] (all (M,))."""
    p0_M, p_M, q_M = _checked(initial_ratio_M, reference_ratio_M, ratio_M)
    p_M = (1 - move) * p_M + move * q_M
    p_M = np.clip(p_M / p_M.sum(), p0_M / n, p0_M * n)
    p_M = np.clip(p_M / p_M.sum(), p0_M.min(), p0_M.max())
    return p_M / p_M.sum()


@dataclass
class Mix:
    """The mix of one run: what it is now, and what the next evaluation makes of it.

    kind: constant | sheared | bandit | dro. reference_loss_M: given losses in nats, or None: then the mix stays until
    the scaling law has its first fit. dynamic_reference: predict the reference losses (refloss.py), else keep them.
    dynamic_ratio: let the reference ratio follow the mix (dro only). clip_reference: a predicted reference loss is
    never above the lowest loss observed and never rises (as published; while sparsity ramps the loss rises, and this
    pins the reference to the first points and makes the law inert).
    """

    domains: tuple[str, ...]
    initial_ratio_M: np.ndarray
    kind: str = "constant"
    dynamic_reference: bool = True
    dynamic_ratio: bool = True
    clip_reference: bool = True
    on_training_loss: bool = False
    reference_loss_M: np.ndarray | None = None
    ratio_M: np.ndarray = field(init=False)
    reference_ratio_M: np.ndarray = field(init=False)
    loss_M: np.ndarray = field(init=False)  # the last finite validation loss of each domain; NaN before the first
    train_loss_M: np.ndarray = field(init=False)  # moving average of the training loss, before bias correction
    train_weight_M: np.ndarray = field(init=False)  # and the weight it holds, for the correction
    history: list = field(default_factory=list)  # [tokens_M, loss_M, sparsity] of each evaluation
    laws: list | None = None  # of the last fit, where each domain has one that is not flat
    fitted: list = field(init=False)  # has the domain's reference loss come from its own law yet
    at_bound: list = field(init=False)  # for how many evaluations each reference ratio has been at a bound of its range
    unpredictive: list = field(init=False)  # was the domain's reference loss no longer predictive, the last time

    def __post_init__(self) -> None:
        if self.kind not in MIXES:
            raise ValueError(f"mix = {self.kind!r}: must be one of {', '.join(MIXES)}")
        M = len(self.domains)
        self.fitted, self.at_bound, self.unpredictive = [False] * M, [0] * M, [False] * M
        self.initial_ratio_M = _checked(self.initial_ratio_M)[0]
        self.ratio_M, self.reference_ratio_M = self.initial_ratio_M.copy(), self.initial_ratio_M.copy()
        self.loss_M, self.train_loss_M, self.train_weight_M = np.full(M, np.nan), np.zeros(M), np.zeros(M)

    def observe_training(self, loss_sum_M: np.ndarray, count_M: np.ndarray) -> None:
        """One step's summed loss and number of tokens of each domain; a domain without any keeps its average."""
        seen = (count_M > 0) & np.isfinite(loss_sum_M)
        weight_M = np.where(seen, EMA, 0.0)
        mean_M = np.where(seen, loss_sum_M, 0.0) / np.maximum(count_M, 1)
        self.train_loss_M = (1 - weight_M) * self.train_loss_M + weight_M * mean_M
        self.train_weight_M = (1 - weight_M) * self.train_weight_M + weight_M

    @property
    def training_loss_M(self) -> np.ndarray:
        """Bias-corrected moving average of the training loss; NaN for a domain never seen."""
        none = np.full(len(self.domains), np.nan)
        return np.divide(self.train_loss_M, self.train_weight_M, out=none, where=self.train_weight_M > 0)

    def update(
        self,
        loss_M: np.ndarray,
        tokens_M: np.ndarray,
        progress: float,
        sparsity: float = 0.0,
        final_sparsity: float = 0.0,
        record: bool = True,
    ) -> None:
        """Take in one evaluation and choose the next ratios.

        loss_M: validation loss, nats. tokens_M: training tokens of each domain so far. progress: step / max_steps.
        sparsity, final_sparsity: overall expected sparsity now and at the end (0: nothing is pruned).
        record: whether the scaling law is to see this evaluation.
        A loss that is not finite leaves its domain at the last one, with a warning. So do warn, once each time that it
        begins: a reference ratio that stays at a bound of its range, a reference loss that is no longer predictive.
        """
        for domain in np.array(self.domains)[~np.isfinite(loss_M)]:
            warnings.warn(f"domain {domain}: no finite validation loss, its last one stays", stacklevel=2)
        self.loss_M = np.where(np.isfinite(loss_M), loss_M, self.loss_M)
        if not np.isfinite(self.loss_M).all():
            return  # some domain has never had a loss: nothing to compare yet
        if self.dynamic_reference and record:
            self._predict_reference(tokens_M, progress, sparsity, final_sparsity)
        if self.kind == "constant" or self.reference_loss_M is None:
            return
        loss_M = self.loss_M
        if self.on_training_loss:  # where a domain was never trained on, its validation loss stands in
            loss_M = np.where(self.train_weight_M > 0, self.training_loss_M, self.loss_M)
        if self.kind == "sheared":
            self.ratio_M = sheared_ratio(loss_M, self.reference_loss_M, self.ratio_M)
        elif self.kind == "bandit":
            self.ratio_M = bandit_ratio(loss_M, self.reference_loss_M, self.ratio_M)
        else:
            self.ratio_M = chi_square_ratio(loss_M, self.reference_loss_M, self.reference_ratio_M)
            if self.dynamic_ratio and progress >= MOVE_FROM:
                self.reference_ratio_M = next_reference_ratio(
                    self.reference_ratio_M, self.ratio_M, self.initial_ratio_M
                )
                self._warn_of_bounds()

    def _warn_of_bounds(self) -> None:
        p_M, p0_M = self.reference_ratio_M, self.initial_ratio_M
        if len(p_M) == 1:
            return
        low_M, high_M = np.maximum(p0_M / CLAMP, p0_M.min()), np.minimum(p0_M * CLAMP, p0_M.max())
        for m, (p, low, high) in enumerate(zip(p_M, low_M, high_M, strict=True)):
            inside = 1.02 * low < p < 0.98 * high  # the last normalisation moves them a little
            self.at_bound[m] = 0 if inside else self.at_bound[m] + 1
            if self.at_bound[m] == AT_BOUND_FOR:
                why = "the initial ratios are equal" if low == high else f"of a range {low:.3f} to {high:.3f}"
                warnings.warn(
                    f"domain {self.domains[m]}: its reference ratio has been at {p:.3f} for {AT_BOUND_FOR} evaluations "
                    f"({why}): other initial ratios would let the mix move",
                    stacklevel=3,
                )

    def _warn_of_reference(self, m: int, law_misses: float) -> None:
        excess = self.loss_M[m] - self.reference_loss_M[m]
        below, missed = excess < -BELOW_REFERENCE, abs(law_misses) > max(LAW_MISSES, excess)
        if (below or missed) and not self.unpredictive[m]:
            what = f"the validation loss {self.loss_M[m]:.3f} is {-excess:.3f} nats below it already"
            if not below:
                what = f"its law misses the last evaluation by {abs(law_misses):.3f} nats, more than is left to fall"
            warnings.warn(f"domain {self.domains[m]}: its reference loss is no longer predictive: {what}", stacklevel=4)
        self.unpredictive[m] = bool(below or missed)

    def _predict_reference(self, tokens_M: np.ndarray, progress: float, sparsity: float, final_sparsity: float) -> None:
        """reference <- the scaling law's loss at the end of the run, fitted to the history (refloss.py)."""
        if progress < HISTORY_FROM:
            return
        self.history.append([np.asarray(tokens_M, float).tolist(), self.loss_M.tolist(), float(sparsity)])
        if progress < FIT_FROM or len(self.history) <= FIT_MORE_THAN:
            return
        spread_out = np.unique(np.linspace(0, len(self.history) - 1, FIT_POINTS).round().astype(int))
        points = [self.history[i] for i in spread_out]
        tokens_PM, loss_PM, sparsity_P = (np.array(column) for column in zip(*points, strict=True))
        with_sparsity = final_sparsity > 0
        M = len(self.domains)
        before_M = np.full(M, np.nan) if self.reference_loss_M is None else self.reference_loss_M
        reference_M, misses_M = before_M.copy(), np.zeros(M)
        near = self.laws if len(self.history) % SEARCH_EVERY else None
        laws = refloss.fit_domains(tokens_PM.T, loss_PM.T, sparsity_P if with_sparsity else None, near=near)
        self.laws = laws if all(isinstance(law, refloss.Law) and not law.flat for law in laws) else None
        for m, law in enumerate(laws):
            if isinstance(law, refloss.FitError):
                domain = self.domains[m]
                warnings.warn(f"domain {domain}: no scaling law, its reference loss stays: {law}", stacklevel=3)
                continue
            tokens, sparsities = tokens_M[m] / np.array([progress, 1.0]), np.array([final_sparsity, sparsity])
            reference_M[m], now = law.predict(tokens, sparsities if with_sparsity else None)
            misses_M[m] = now - self.loss_M[m]
            if self.clip_reference:
                lowest = before_M[m] if self.fitted[m] else min(loss_M[m] for _, loss_M, _ in self.history)
                reference_M[m] = min(reference_M[m], lowest)
            self.fitted[m] = True
        if np.isfinite(reference_M).all():
            self.reference_loss_M = reference_M
            for m in range(M):
                self._warn_of_reference(m, misses_M[m])
        else:  # a domain has neither a given nor a predicted reference: the mix waits
            self.fitted = [False] * M

    def state_dict(self) -> dict:
        state = {
            name: getattr(self, name).tolist()
            for name in ("ratio_M", "reference_ratio_M", "loss_M", "train_loss_M", "train_weight_M")
        }
        reference = None if self.reference_loss_M is None else self.reference_loss_M.tolist()
        lists = {name: list(getattr(self, name)) for name in ("history", "fitted", "at_bound", "unpredictive")}
        laws = self.laws and [astuple(law) for law in self.laws]
        return {**state, "reference_loss_M": reference, **lists, "laws": laws}

    def load_state_dict(self, state: dict) -> None:
        if len(state["ratio_M"]) != len(self.domains):
            raise ValueError(f"mix state is of {len(state['ratio_M'])} domains, the run has {len(self.domains)}")
        laws = state.get("laws")  # a run of an earlier version has kept none
        self.laws = laws and [refloss.Law(*law) for law in laws]
        for name in self.state_dict().keys() - {"laws"}:
            value = state[name]
            setattr(self, name, np.array(value, float) if name.endswith("_M") and value is not None else value)
