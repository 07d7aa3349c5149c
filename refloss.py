"""Reference losses: a scaling law fitted to a domain's own validation losses, to be read at the end of training.

    L(T, S) = A T^-alpha S^-beta + E        T tokens of the domain seen so far, S expected sparsity

The fit minimises the mean Huber loss of the residuals over A, E > 0, 0 <= alpha <= 10, |beta| <= 10; beta < 0 where
pruning costs loss. delta = 1e-3 nats is about the noise of an evaluation, so that this is nearly least absolute
deviations, which has kinks and many local minima. Two things make it safe. Given the exponents, A and E are linear
(variable projection), so that a coarse grid of exponents has the best start. And the descent from there begins with a
wide Huber loss and narrows it.

Shapes: n points, X variables (log T, log S, or both), K nodes of the grid. h: the largest value of A T^-alpha S^-beta.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.special import huber

UP = np.geomspace(0.03, 10.0, 20)
EXPONENTS = np.concatenate((-UP[::-1], [0.0], UP))  # of the grid; alpha takes those from 0 on
LOWEST = np.array([0.0, -10.0])  # alpha, beta
DELTA = 1e-3  # nats, of the Huber loss
WIDTHS = (30, 5, 1)  # times DELTA: Huber losses of the descent, one after the other
TINY, LOG_MAX = 1e-300, 690.0  # "positive, but nothing", and the logarithm of about 1 / TINY


class FitError(ValueError):
    """A history to which no law can be fitted. The message says why."""


@dataclass(frozen=True)
class Law:
    """A T^-alpha S^-beta + E, and the mean Huber loss of its fit. A flat law has A = 1e-300 and alpha = beta = 0."""

    A: float
    alpha: float
    beta: float
    E: float
    objective: float

    def predict(self, tokens, sparsity=1.0):
        """Loss in nats at these tokens and sparsity, which broadcast. Positive and finite for any finite input."""
        log_T, log_S = (np.log(np.maximum(v, TINY)) for v in (tokens, sparsity))
        return np.exp(np.minimum(np.log(self.A) - self.alpha * log_T - self.beta * log_S, LOG_MAX)) + self.E


def fit(tokens, losses, sparsity=None) -> Law:
    """The law of one domain with the smallest mean Huber loss over its history of evaluations.

    tokens, losses, sparsity: (n,), in any order; tokens in any unit, losses in nats, sparsity above 0 and up to 1.
    Points that are not finite and points without tokens or sparsity are left out (0^-beta has no value). beta = 0
    without sparsity, or if it does not vary. Where tokens and sparsity follow one power law, as they do during a
    sparsity ramp, only one exponent is determined: the better of the laws with beta = 0 and with alpha = 0 is taken.
    Losses that do not fall give a flat law at their median. Raises FitError for fewer than three distinct token counts.
    """
    T, y, S = np.array(np.broadcast_arrays(tokens, losses, 1.0 if sparsity is None else sparsity), dtype=float)
    usable = np.isfinite([T, y, S]).all(0) & (T > 0) & (S > 0)
    x_Xn, y = np.log([T[usable], S[usable]]), y[usable]
    distinct = np.unique(x_Xn[0].round(9)).size
    if distinct < 3:
        raise FitError(f"{distinct} distinct token counts: a law needs at least 3")
    level = float(np.median(y))
    best = Law(TINY, 0.0, 0.0, max(level, TINY), huber(DELTA, y - level).mean())
    both = np.linalg.matrix_rank(x_Xn - x_Xn.mean(1, keepdims=True), rtol=1e-6) == 2
    for free in ([0, 1],) if both else ([0], [1]):
        law = _search(x_Xn, free, y)
        if law.objective * (1 + 1e-6) + 1e-12 * DELTA**2 < best.objective:  # else the law that claims less stays
            best = law
    return best


def _search(x_Xn, free, y) -> Law:
    """The best law whose other exponents than the free ones are 0."""
    exponents, x_Xn = np.zeros(2), x_Xn[free]

    def powers(k):  # (..., X) -> (..., n), scaled so that the largest is 1
        log_power = -k @ x_Xn
        return np.exp(log_power - log_power.max(-1, keepdims=True))

    def residuals(theta):
        return theta[0] * powers(theta[2:]) + theta[1] - y

    def jacobian(theta):
        f = powers(theta[2:])
        return np.vstack((f, np.ones_like(f), -theta[0] * f * (x_Xn - x_Xn[:, f.argmax(), None]))).T

    grid_KX = np.array(list(itertools.product(*(EXPONENTS[low <= EXPONENTS] for low in LOWEST[free]))))
    f_Kn = powers(grid_KX)
    h_K, E_K = _linear(f_Kn, y)
    best = huber(WIDTHS[0] * DELTA, h_K[:, None] * f_Kn + E_K[:, None] - y).mean(1).argmin()
    theta = np.r_[h_K[best], E_K[best], grid_KX[best]]
    bounds = np.r_[0.0, 0.0, LOWEST[free]], np.r_[np.inf, np.inf, np.full(len(free), EXPONENTS[-1])]
    for width in WIDTHS:
        theta = least_squares(residuals, theta, jacobian, bounds, loss="huber", f_scale=width * DELTA, max_nfev=60).x
    h, E, exponents[free] = theta[0], theta[1], theta[2:]
    top = (-theta[2:] @ x_Xn).max()
    A = max(h * np.exp(np.clip(-top, -LOG_MAX, LOG_MAX)), TINY)
    return Law(A, *exponents, max(E, TINY), huber(DELTA, residuals(theta)).mean())


def _linear(f_Kn, y) -> tuple[np.ndarray, np.ndarray]:
    """h, E >= 0 of the least squares fit y ~ h f + E, for each of K powers f."""
    centred_Kn = f_Kn - f_Kn.mean(1, keepdims=True)
    h_K = np.maximum(centred_Kn @ y / np.maximum((centred_Kn**2).sum(1), TINY), 0.0)
    E_K = y.mean() - h_K * f_Kn.mean(1)
    h_K = np.where(E_K < 0, f_Kn @ y / (f_Kn**2).sum(1), h_K)
    return h_K, np.maximum(E_K, 0.0)
