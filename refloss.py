"""Reference losses: a scaling law fitted to a domain's own validation losses, to be read at the end of training.

    L(T, S) = A T^-alpha S^-beta + E        T tokens of the domain seen so far, S expected sparsity (0 to 1)

It minimises the mean Huber loss of the raw residuals over A, E > 0, 0 <= alpha <= 10, |beta| <= 10 (beta < 0 where
pruning costs loss). delta = 1e-3 is about the noise of an evaluation: this is nearly least absolute deviations: kinks
and local minima, which gradient descent from a few starts misses. But given the exponents, A and E are linear:
`_profile` solves for them at every node of a grid of exponents at once, and `_polish` descends from the best nodes,
or from laws known to be near.
Domains are fitted side by side: at these sizes the time goes into how often numpy is called.

Shapes: M domains, n points, K nodes of the grid or laws to try, R rows (one start of one domain each), D dampings.
"""

from dataclasses import dataclass

import numpy as np

EXPONENT_MAX = 10.0
ALPHAS = np.geomspace(0.01, EXPONENT_MAX, 32)
ALPHAS_COARSE = np.append(0.0, np.geomspace(0.03, EXPONENT_MAX, 12))
BETAS_UP = np.geomspace(0.05, EXPONENT_MAX, 7)
BETAS = np.concatenate((-BETAS_UP[::-1], [0.0], BETAS_UP))
ZERO = np.zeros(1)
REWEIGHTINGS, STARTS = 2, 2
SOFT_STEPS, SOFT, STEPS = 3, 10.0, 60  # from all starts with 10 delta, which has fewer kinks; then from the best one
CONVERGED = 1e-6  # a step's gain, as a share of the objective
RANGES = {"tokens": (1e-20, 1e20), "losses": (0.0, 1e9), "sparsity": (1e-6, 1.0)}  # keep A in the range of a float
TINY = 1e-300  # "positive, but nothing": A of a flat law, E of a pure power law
IDENTITY = np.eye(4)
DAMPINGS = np.array([0.0, 0.03, 1.0])[:, None, None]
BLENDS = 1e-9 * IDENTITY + DAMPINGS * (1.0 + 1e-3 * IDENTITY)  # (D, 4, 4): the reweighted curvature's share
LENGTHS = np.array([1.0, 0.3, 3.0, 10.0])[:, None]


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

    @property
    def flat(self) -> bool:
        return not (self.alpha or self.beta)

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
    (law,) = fit_domains(np.asarray(tokens, float)[None], np.asarray(losses, float)[None], sparsity, delta)
    if isinstance(law, FitError):
        raise law
    return law


def fit_domains(tokens_Mn, losses_Mn, sparsity_n=None, delta: float = 1e-3, near=None) -> list[Law | FitError]:
    """`fit` of every domain, each as if alone: its law, or the error that says why it has none.

    tokens_Mn, losses_Mn: (M, n). sparsity_n: (n,), of the one model that was evaluated. near: M laws of a history that
    has grown by a few points since, none of them flat: descend from them in place of a search, in half the time, and
    stay in their valley. Raises FitError for lengths and a delta that do not fit.
    """
    T, y = np.asarray(tokens_Mn, dtype=float), np.asarray(losses_Mn, dtype=float)
    S = np.ones(T.shape[-1:]) if sparsity_n is None else np.asarray(sparsity_n, dtype=float)
    if T.ndim != 2 or T.shape != y.shape or T.shape[1:] != S.shape:
        shapes = f"{T.shape}, {y.shape}, {S.shape}"
        raise FitError(f"fit: tokens, losses, sparsity of shapes {shapes}: expected (M, n), (M, n), (n,), M domains")
    if not (np.isfinite(delta) and delta > 0):
        raise FitError(f"fit: delta is {delta}: expected a positive number of nats")
    points = np.stack((T, y, np.broadcast_to(S, T.shape)), 1)  # (M, 3, n)
    usable_Mn = np.isfinite(points).all(1) & (T > 0) & (RANGES["sparsity"][0] <= S)
    found: list = _unfit(points, usable_Mn)
    n_M, good_M = usable_Mn.sum(1), np.array([error is None for error in found])
    for n in np.unique(n_M[good_M]):  # domains with as many points are fitted together
        alike = np.flatnonzero(good_M & (n_M == n))
        some = np.stack([points[m][:, usable_Mn[m]] for m in alike])
        before = near and [near[m] for m in alike]
        for m, law in zip(alike, _fit_alike(np.log(some[:, [0, 2]]), some[:, 1], delta, before), strict=True):
            found[m] = law
    return found


def _unfit(points, usable_Mn) -> list[FitError | None]:
    """Why no law can be fitted to a domain's usable points (M, 3, n), or None."""
    in_order = np.sort(np.log(np.where(usable_Mn, points[:, 0], np.nan)).round(9))  # NaN last
    distinct_M = usable_Mn.any(1) + (np.diff(in_order) > 0).sum(1)
    low = points.min(2, where=usable_Mn[:, None], initial=np.inf)
    high = points.max(2, where=usable_Mn[:, None], initial=-np.inf)
    errors: list[FitError | None] = []
    for m, distinct in enumerate(distinct_M.tolist()):
        ranges = zip(RANGES.items(), low[m], high[m], strict=True)
        wrong = (
            FitError(f"fit: {name} from {a:g} to {b:g}: expected {least:g} to {most:g}")
            for (name, (least, most)), a, b in ranges
            if not least <= a <= b <= most
        )
        error = next(wrong, None)
        if distinct < 3:
            error = FitError(
                f"fit: {len(usable_Mn[m])} points, {usable_Mn[m].sum()} usable, with {distinct} distinct token counts: "
                "a law needs at least 3: wait for more evaluations"
            )
        errors.append(error)
    return errors


def _fit_alike(x, y, delta, near) -> list[Law]:
    """The laws of domains with n usable points each: x (M, 2, n) logs of tokens and sparsity, y (M, n) losses."""
    laws = _flat(y, delta)
    u, v = np.moveaxis(x - x.mean(2, keepdims=True), 1, 0)
    constant = np.ptp(v, 1) < 1e-9
    off_line = np.abs(v - u * (np.vecdot(u, v) / np.vecdot(u, u))[:, None]).max(1)
    on_line = ~constant & (off_line < 1e-6 * np.ptp(v, 1))
    for alphas, betas, these in (
        (ALPHAS, ZERO, constant | on_line),
        (ZERO, BETAS[BETAS != 0], on_line),
        (ALPHAS_COARSE, BETAS, ~constant & ~on_line),
    ):
        rows = np.flatnonzero(these)
        if not rows.size:
            continue
        bounds = np.array([[0.0, 0.0, 0.0, betas[0]], [1e12, 1e12, alphas[-1], betas[-1]]])
        if near:
            starts = _from_laws([near[m] for m in rows], x[rows], bounds)
        else:
            starts = _from_grid(alphas, betas, x[rows], y[rows], delta, bounds)
        for m, law in zip(rows, _descended(*starts, x[rows], y[rows], delta, bounds), strict=True):
            # equal but for rounding: the law that claims less stays
            if law.objective * (1 + 1e-9) + 1e-12 * delta**2 < laws[m].objective:
                laws[m] = law
    return laws


def _flat(y, delta) -> list[Law]:
    """The best constants, exactly: the slope of their Huber loss is piecewise linear with knots at y +- delta."""
    knots = np.sort(np.concatenate((y - delta, y + delta), 1))
    pulls = knots[:, :, None] - y[:, None]
    slopes = np.clip(pulls, -delta, delta, out=pulls).sum(2)
    levels = np.array([np.interp(0.0, *curve) for curve in zip(slopes, knots, strict=True)])
    residual = y - levels[:, None]
    objectives = _huber(residual, _clipped(residual, delta))
    return [Law(TINY, 0.0, 0.0, max(E, TINY), o) for E, o in zip(levels.tolist(), objectives.tolist(), strict=True)]


def _clipped(residual, delta):
    return np.maximum(np.minimum(residual, delta), -delta)


def _huber(residual, clipped):
    """Mean over the last axis: r^2 / 2 up to delta, delta (|r| - delta / 2) beyond."""
    return (clipped * (residual - 0.5 * clipped)).sum(-1) / residual.shape[-1]


def _from_laws(laws, x, bounds):
    """theta (M, 4) = A, E, alpha, beta, and the log tokens and sparsity (M, 2) where A is measured: f is largest there,
    so that no power overflows."""
    theta = np.array([[law.A, law.E * (law.E > TINY), law.alpha, law.beta] for law in laws])
    log_height = np.log(theta[:, 0]) + (-theta[:, None, 2:] @ x).max((1, 2))
    theta[:, 2:] = np.clip(theta[:, 2:], *bounds[:, 2:])
    theta[:, 0] = np.exp(np.minimum(log_height, np.log(bounds[1, 0])))
    return theta, x[np.arange(len(x)), :, (-theta[:, None, 2:] @ x)[:, 0].argmax(1)]


def _from_grid(alphas, betas, x, y, delta, bounds):
    """Likewise, of the best nodes of a grid of exponents, after some steps with a softer objective."""
    M, each = len(y), np.arange(len(y))[:, None]
    f = _powers(alphas, x[:, :1])[:, :, None] * _powers(betas, x[:, 1:])[:, None]  # (M, alphas, betas, n)
    A, E, objective = _profile(f.reshape(M, -1, f.shape[-1]), y, delta)
    p = np.full((M, len(alphas) + 2, len(betas) + 2), np.inf)
    p[:, 1:-1, 1:-1] = objective.reshape(f.shape[:3])
    around = np.min([p[:, :-2, 1:-1], p[:, 2:, 1:-1], p[:, 1:-1, :-2], p[:, 1:-1, 2:]], axis=0).reshape(M, -1)
    starts = np.argsort(np.where(objective <= around, objective, np.inf), 1)[:, :STARTS]
    i, j = np.divmod(starts, len(betas))
    f, K = f[each, i, j], starts.shape[1]
    theta = np.stack((A[each, starts] * f.max(2), E[each, starts], alphas[i], betas[j]), 2).reshape(M * K, 4)
    origin = x[each, :, f.argmax(2)].reshape(M * K, 2)
    from_origin = x.repeat(K, 0) - origin[..., None]
    theta, objective = _polish(theta, from_origin, y.repeat(K, 0)[:, None], SOFT * delta, bounds, SOFT_STEPS)
    best = np.arange(0, M * K, K) + objective.reshape(M, K).argmin(1)
    return theta[best], origin[best]


def _descended(theta, origin, x, y, delta, bounds) -> list[Law]:
    theta, objective = _polish(theta, x - origin[..., None], y[:, None], delta, bounds, STEPS)
    theta[:, 0] *= np.exp(np.vecdot(theta[:, 2:], origin))
    return [
        Law(max(A, TINY), alpha, beta, max(E, TINY), least)
        for (A, E, alpha, beta), least in zip(theta.tolist(), objective.tolist(), strict=True)
    ]


def _powers(exponents, log):
    """exp(-exponent log), (M, exponents, n), of log (M, 1, n), the largest of each exponent scaled to 1."""
    log_power = -exponents[:, None] * log
    return np.exp(log_power - log_power.max(2, keepdims=True))


def _profile(f, y, delta):
    """A, E >= 0 and the objective, (M, K) each, of y (M, n) ~ A f + E with f (M, K, n), by reweighted least squares."""
    r, constant_and_y = np.zeros_like(f), np.stack((np.ones_like(y), y), -1)
    for _ in range(REWEIGHTINGS):
        w = delta / np.maximum(np.abs(r), delta)
        wf = w * f
        (s, sy), (sf, sfy) = np.moveaxis(w @ constant_and_y, 2, 0), np.moveaxis(wf @ constant_and_y, 2, 0)
        sff = np.vecdot(wf, f)
        A = np.maximum((s * sfy - sf * sy) / np.maximum(s * sff - sf * sf, 1e-12 * s * sff), 0.0)
        E = (sy - A * sf) / s
        A, E = np.where(E < 0, sfy / sff, A), np.maximum(E, 0.0)
        r = y[:, None] - A[..., None] * f - E[..., None]
    return A, E, _huber(r, _clipped(r, delta))


def _polish(theta, x, y, delta, bounds, steps):
    """Descend from every row of theta = A, E, alpha, beta (R, 4), at x (R, 2, n), y (R, 1, n); theta and its objective.

    Each step tries Newton's direction and two blends of it with that of reweighted least squares, which always
    descends but slowly, at four lengths, and keeps the best: where few residuals are within delta, none does alone.
    The valleys are bent: along them A + E and A times the exponents stay, so a step moves these products in a line.
    """
    f, r, pull, objective = (a[:, 0] for a in _evaluate(theta[:, None], x, y, delta))
    ended, best_objective = theta.copy(), objective.copy()
    rows = np.arange(len(theta))
    for _ in range(steps):
        change = _bounded_steps(theta, *_derivatives(theta, x, f, r, pull, delta), *bounds)[:, :, None] * LENGTHS
        tried = theta[:, None, None] + change
        A = theta[:, None, None, :1]
        bend = A / np.maximum(tried[..., :1], 0.1 * A + TINY)
        tried[..., 2:] = theta[:, None, None, 2:] + change[..., 2:] * bend
        tried = np.minimum(np.maximum(tried, bounds[0]), bounds[1]).reshape(len(theta), -1, 4)
        outcome = tried, *_evaluate(tried, x, y, delta)
        best = np.arange(len(theta)), outcome[-1].argmin(1)
        gain = objective - outcome[-1][best]
        theta, f, r, pull, objective = (a[best] for a in outcome)
        better, go_on = gain > 0, gain > CONVERGED * objective
        ended[rows[better]], best_objective[rows[better]] = theta[better], objective[better]
        if not go_on.all():
            if not go_on.any():
                break
            rows, theta, x, y = rows[go_on], theta[go_on], x[go_on], y[go_on]
            f, r, pull, objective = f[go_on], r[go_on], pull[go_on], objective[go_on]
    return ended, best_objective


def _evaluate(theta, x, y, delta):
    """f = T^-alpha S^-beta, residuals, residuals within delta (R, K, n) and objective (R, K) of theta (R, K, 4)."""
    f = np.exp(np.minimum(-theta[..., 2:] @ x, 200.0))
    r = y - theta[..., :1] * f - theta[..., 1:2]
    pull = _clipped(r, delta)
    return f, r, pull, _huber(r, pull)


def _derivatives(theta, x, f, r, pull, delta):
    """Of n times the objective, by A, E, A alpha, A beta: minus the gradient (R, 4), and curvatures (R, D, 4, 4).

    The products are measured in units of A, so that to first order they move as alpha and beta do.
    """
    A, fx = theta[:, :1, None], f[:, None] * x
    J, weight = np.ones((len(f), 4, f.shape[1])), np.empty((2, len(f), 1, f.shape[1]))
    J[:, 0], J[:, 2:] = f, -A * fx
    weight[0, :, 0], weight[1, :, 0] = pull == r, delta / np.maximum(np.abs(r), delta)
    hessian, above = J * weight @ J.mT  # above: of a quadratic above the objective
    hessian[:, 2:, 2:] -= A * (fx * pull[:, None] @ x.mT)
    return (J @ pull[..., None])[..., 0], hessian[:, None] + BLENDS * above[:, None] + TINY * IDENTITY


def _bounded_steps(theta, descent, curvature, low, high):
    """Solve curvature @ step = descent, (R, D, 4); the parameter that would cross its bound first stops there."""
    held = (theta == np.where(descent > 0, high, low))[:, None]
    target = np.where(held, 0.0, descent[:, None])
    step = _solve(np.where(held[..., None], IDENTITY, curvature), target)
    room = np.where(step > 0, high, low) - theta[:, None]
    crosses = np.abs(step) > np.abs(room)
    if not crosses.any():
        return step
    share = np.where(crosses, room / np.where(crosses, step, 1.0), 1.0)
    first = crosses & (share == share.min(-1, keepdims=True))
    return _solve(np.where((held | first)[..., None], IDENTITY, curvature), np.where(first, room, target))


def _solve(systems, targets):
    """The solution of each system (..., 4, 4); a singular one gets zeros."""
    try:
        return np.linalg.solve(systems, targets[..., None])[..., 0]
    except np.linalg.LinAlgError:
        regular = np.linalg.slogdet(systems).sign[..., None] != 0
        return np.linalg.solve(np.where(regular[..., None], systems, IDENTITY), (targets * regular)[..., None])[..., 0]
