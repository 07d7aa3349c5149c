"""Reference losses: a scaling law fitted to a domain's own validation losses, to be read at the end of training.

    L(T, S) = A T^-alpha S^-beta + E        T tokens of the domain seen so far, S expected sparsity (0 to 1)

It minimises the mean Huber loss of the raw residuals over A, E > 0, 0 <= alpha <= 10, |beta| <= 10 (beta < 0 where
pruning costs loss). delta = 1e-3 is about the noise of an evaluation: this is nearly least absolute deviations: kinks
and local minima, which gradient descent from a few starts misses. But given the exponents, A and E are linear:
`_profile` solves for them at every node of a grid of exponents at once, and `_polish` descends from the best nodes.
"""

from dataclasses import dataclass

import numpy as np

EXPONENT_MAX = 10.0
ALPHAS = np.geomspace(0.01, EXPONENT_MAX, 32)
ALPHAS_COARSE = np.append(0.0, np.geomspace(0.03, EXPONENT_MAX, 12))
BETAS_UP = np.geomspace(0.05, EXPONENT_MAX, 7)
BETAS = np.concatenate((-BETAS_UP[::-1], [0.0], BETAS_UP))
REWEIGHTINGS, STARTS, NEWTON_STEPS = 9, 4, (3, 3, 60)  # the better half of the starts goes on to the next round
RANGES = {"tokens": (1e-20, 1e20), "losses": (0.0, 1e9), "sparsity": (1e-6, 1.0)}  # keep A in the range of a float
TINY = 1e-300  # "positive, but nothing": A of a flat law, E of a pure power law
IDENTITY = np.eye(4)
DAMPINGS = np.array([0.0, 1e-3, 0.03, 0.2, 1.0])[:, None, None]
LENGTHS = np.array([1.0, 0.1, 2.5])[:, None]


class FitError(ValueError):
    """A history to which no law can be fitted; the message says what is wrong and what was expected."""


@dataclass(frozen=True)
class Law:
    """A T^-alpha S^-beta + E, and the mean Huber loss it was fitted with. Flat: alpha = beta = 0, A = 1e-300."""

    A: float
    alpha: float
    beta: float
    E: float
    objective: float

    def predict(self, tokens, sparsity=None):
        """Loss in nats at these tokens and sparsity, scalars or arrays that broadcast; a float if both are scalars.

        Positive and finite for any finite input. Raises FitError when the law needs a sparsity and none is given.
        """
        if self.beta and sparsity is None:
            raise FitError("predict: this law was fitted with sparsity: give the sparsity to predict at")
        log_T, log_S = (np.log(np.maximum(v, TINY)) for v in (tokens, 1.0 if sparsity is None else sparsity))
        loss = np.exp(np.minimum(np.log(self.A) - self.alpha * log_T - self.beta * log_S, 690.0)) + self.E
        return loss if np.ndim(loss) else float(loss)


def fit(tokens, losses, sparsity=None, delta: float = 1e-3) -> Law:
    """The law of one domain with the smallest mean Huber loss over its history of evaluations.

    tokens, losses, sparsity: (n,), in any order; tokens in any unit, losses in nats, sparsity between 0 and 1.
    Points that are not finite, with tokens <= 0 or with sparsity < 1e-6 (S^-beta has no value at 0) are left out.
    beta = 0 without sparsity, or if it does not vary. Where tokens and sparsity follow one power law, as they do during
    a sparsity ramp, only one exponent is determined: the better of the laws with beta = 0 and with alpha = 0 is taken.
    Losses that do not fall give a flat law at their robust mean. Raises FitError for fewer than three distinct token
    counts (two points fit any exponent), negative losses, sparsity above 1, and lengths or ranges that do not fit.
    """
    x, y = _usable(tokens, losses, sparsity, delta)
    u, v = x - x.mean(1, keepdims=True)
    if np.ptp(v) < 1e-9:
        grids = [(ALPHAS, np.zeros(1))]
    elif np.abs(v - u * (u @ v) / (u @ u)).max() < 1e-6 * np.ptp(v):
        grids = [(ALPHAS, np.zeros(1)), (np.zeros(1), BETAS[BETAS != 0])]
    else:
        grids = [(ALPHAS_COARSE, BETAS)]
    # the best constant, exactly: the slope of its Huber loss is piecewise linear with knots at y +- delta
    knots = np.sort(np.concatenate((y - delta, y + delta)))
    level = float(np.interp(0.0, np.clip(knots[:, None] - y, -delta, delta).sum(1), knots))
    flat = Law(TINY, 0.0, 0.0, max(level, TINY), float(_huber(y - level, delta)))
    best = min((_fit_on(*grid, x, y, delta) for grid in grids), key=lambda law: law.objective)
    # equal but for rounding: take the law that claims nothing
    return flat if flat.objective <= best.objective * (1 + 1e-9) + 1e-12 * delta**2 else best


def _usable(tokens, losses, sparsity, delta):
    """Logs of tokens and sparsity (2, n) and losses (n,) of the points that a law can use."""
    T, y = np.asarray(tokens, dtype=float), np.asarray(losses, dtype=float)
    S = np.ones_like(T) if sparsity is None else np.asarray(sparsity, dtype=float)
    if T.ndim != 1 or not T.shape == y.shape == S.shape:
        raise FitError(f"fit: tokens, losses, sparsity of shapes {T.shape}, {y.shape}, {S.shape}: expected one (n,)")
    if not (np.isfinite(delta) and delta > 0):
        raise FitError(f"fit: delta is {delta}: expected a positive number of nats")
    points = np.stack((T, y, S))
    points = points[:, np.isfinite(points).all(0) & (T > 0) & (RANGES["sparsity"][0] <= S)]
    distinct = np.unique(np.log(points[0]).round(9)).size
    if distinct < 3:
        raise FitError(
            f"fit: {T.size} points, {points.shape[1]} usable, with {distinct} distinct token counts: "
            "a law needs at least 3: wait for more evaluations"
        )
    for values, (name, (low, high)) in zip(points[[0, 1, 2]], RANGES.items(), strict=True):
        if not low <= values.min() <= values.max() <= high:
            raise FitError(f"fit: {name} from {values.min():g} to {values.max():g}: expected {low:g} to {high:g}")
    return np.log(points[[0, 2]]), points[1]


def _huber(residual, delta):
    """Mean over the last axis: r^2 / 2 up to delta, delta (|r| - delta / 2) beyond."""
    clipped = np.maximum(np.minimum(residual, delta), -delta)
    return (clipped * (residual - 0.5 * clipped)).sum(-1) / residual.shape[-1]


def _fit_on(alphas, betas, x, y, delta) -> Law:
    """The best law that starts from a node of the grid and keeps its exponents between the grid's edges."""
    nodes = np.stack(np.meshgrid(alphas, betas, indexing="ij"), -1).reshape(-1, 2)
    log_f = -nodes @ x
    A, E, objective = _profile(np.exp(log_f - log_f.max(1, keepdims=True)), y, delta)
    p = np.pad(objective.reshape(len(alphas), len(betas)), 1, constant_values=np.inf)
    around = np.min([p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]], axis=0)
    minima = np.flatnonzero(objective <= around.ravel())
    starts = minima[np.argsort(objective[minima])[:STARTS]]
    theta = np.column_stack((A, E, nodes))[starts]
    origin = x[:, log_f[starts].argmax(1)].T  # A is measured where f is largest, so that no power overflows
    bounds = np.array([[0.0, 0.0, 0.0, betas[0]], [1e12, 1e12, alphas[-1], betas[-1]]])
    for steps in NEWTON_STEPS:
        theta, objective = _polish(theta, x - origin[..., None], y, delta, bounds, steps)
        better_half = np.argsort(objective)[: (len(theta) + 1) // 2]
        theta, origin = theta[better_half], origin[better_half]
    A, E, alpha, beta = theta[0].tolist()
    A *= float(np.exp(theta[0, 2:] @ origin[0]))
    return Law(max(A, TINY), alpha, beta, max(E, TINY), float(objective.min()))


def _profile(f, y, delta):
    """A, E >= 0 and the objective of y ~ A f + E for every row of f (nodes, n), by reweighted least squares."""
    w, constant_and_y = np.ones_like(f), np.column_stack((np.ones_like(y), y))
    for _ in range(REWEIGHTINGS):
        wf = w * f
        (s, sy), (sf, sfy), sff = (w @ constant_and_y).T, (wf @ constant_and_y).T, np.einsum("kn,kn->k", wf, f)
        A = np.maximum((s * sfy - sf * sy) / np.maximum(s * sff - sf * sf, 1e-12 * s * sff), 0.0)
        E = (sy - A * sf) / s
        A, E = np.where(E < 0, sfy / sff, A), np.maximum(E, 0.0)
        r = y - A[:, None] * f - E[:, None]
        w = delta / np.maximum(np.abs(r), delta)
    return A, E, _huber(r, delta)


def _polish(theta, x, y, delta, bounds, steps):
    """Descend from every start, theta = A, E, alpha, beta (starts, 4) and x (starts, 2, n); theta and its objective.

    Each step tries Newton's direction and four blends of it with that of reweighted least squares, which always
    descends but slowly, at three lengths, and keeps the best: where few residuals are within delta, none does alone.
    """
    each = np.arange(len(theta))
    objective = _huber(_residuals(theta[:, None], x, y)[1][:, 0], delta)
    for _ in range(steps):
        try:
            change = _bounded_steps(theta, *_derivatives(theta, x, y, delta), *bounds)
        except np.linalg.LinAlgError:  # one start has become singular: what is reached stands
            break
        tried = np.clip(theta[:, None, None] + change[:, :, None] * LENGTHS, *bounds).reshape(len(theta), -1, 4)
        tried_objective = _huber(_residuals(tried, x, y)[1], delta)
        best = each, tried_objective.argmin(1)
        gain = objective - tried_objective[best]
        theta = np.where((gain > 0)[:, None], tried[best], theta)
        objective = np.where(gain > 0, tried_objective[best], objective)
        if (gain <= 1e-9 * objective).all():
            break
    return theta, objective


def _residuals(theta, x, y):
    f = np.exp(np.minimum(-theta[..., 2:] @ x, 200.0))
    return f, y - theta[..., :1] * f - theta[..., 1:2]


def _derivatives(theta, x, y, delta):
    """Of n times the objective: minus the gradient (starts, 4), and curvatures (starts, dampings, 4, 4)."""
    f, r = _residuals(theta[:, None], x, y)
    J = np.concatenate((f, np.ones_like(f), -theta[:, :1, None] * f * x), 1)
    pull = np.maximum(np.minimum(r, delta), -delta)
    bend = x * f * pull
    hessian = J * (pull == r) @ J.mT
    hessian[:, 0, 2:] += bend.sum(-1)
    hessian[:, 2:, 0] += bend.sum(-1)
    hessian[:, 2:, 2:] -= theta[:, :1, None] * (bend @ x.mT)
    above = J * (delta / np.maximum(np.abs(r), delta)) @ J.mT  # of a quadratic above the objective
    ridge = IDENTITY * above
    undamped = hessian + 1e-9 * ridge + TINY * IDENTITY
    return (J @ pull.mT)[..., 0], undamped[:, None] + DAMPINGS * (above + 1e-3 * ridge)[:, None]


def _bounded_steps(theta, descent, curvature, low, high):
    """Solve curvature @ step = descent, (starts, dampings, 4); a parameter that would cross its bound stops there."""
    theta, descent = theta[:, None], descent[:, None]
    held, stop = ((theta <= low) & (descent <= 0)) | ((theta >= high) & (descent >= 0)), 0.0
    for _ in range(2):
        system, target = np.where(held[..., None], IDENTITY, curvature), np.where(held, stop, descent)
        step = np.linalg.solve(system, target[..., None])[..., 0]
        end = theta + step
        crosses = (end < low) | (end > high)
        if not crosses.any():
            break
        room = np.clip(end, low, high) - theta
        share = np.where(crosses, room / np.where(crosses, step, 1.0), 1.0)
        first = crosses & (share == share.min(-1, keepdims=True))
        held, stop = held | first, np.where(first, room, 0.0)
    return step
