"""Samplers that solve the linear part of the ODE exactly: DPM-Solver, UniPC, DEIS.

Their time is lambda = log(alpha / sigma), the logarithm of the signal-to-noise ratio. They extrapolate the predicted
data m ("++"), or the predicted noise, over a step h in lambda, from `here` to the next sigma:

    data:   latents = sigma' / sigma * latents - alpha' * (phi_1(-h) * m + ...)
    noise:  latents = alpha' / alpha * latents - sigma' * (phi_1(h) * m + ...)

phi_1(k) = e^k - 1, phi_2 = phi_1 / k - 1, phi_3 = phi_2 / k - 1/2 and so on weigh the derivatives of m.
"""

import math

import numpy as np

from flaxkd.diffusion import sigmas, weights


class Unsolvable(ValueError):
    """Options that do not go together."""


def _phis(k: float, count: int) -> list[float]:
    found = [np.expm1(k)]
    for n in range(1, count):
        found.append(found[-1] / k - 1 / math.factorial(n))
    return found


class _Path:
    """The sigmas of a multistep solver and what follows from them; index i is the i-th step, whoever begins where."""

    def __init__(self, config: dict, sigma: np.ndarray, in_data: bool):
        self.config, self.in_data = config, in_data
        self.alpha, self.sigma = sigmas.split(sigma)
        with np.errstate(divide="ignore"):  # the end, where lambda is infinite
            self.lambdas = -np.log(sigma)

    def kept(self, i: int) -> float:
        """The weight of the latents in step i."""
        kept = self.sigma if self.in_data else self.alpha
        return kept[i + 1] / kept[i]

    def scale(self, i: int) -> float:
        """The weight of what is extrapolated in step i."""
        return self.alpha[i + 1] if self.in_data else self.sigma[i + 1]

    def step(self, i: int) -> float:
        return self.lambdas[i + 1] - self.lambdas[i]

    def schedule(self, timesteps, begin: int | None, latents, predictions, noise=None) -> weights.Schedule:
        alpha, sigma = self.alpha[begin:-1], self.sigma[begin:-1]
        predicted = weights.data if self.in_data else weights.noise
        return weights.make(
            timesteps[begin:],
            weights.start(begin, alpha, sigma),
            (alpha, sigma),
            **predicted(self.config, alpha, sigma),
            latents=latents,
            predictions=predictions,
            noise=noise,
        )


def _order(config: dict, i: int, steps: int, taken: int, first_at_end: bool) -> int:
    """The order of step i of `steps`, after `taken` ones: lower at both ends."""
    few = config["lower_order_final"] and steps < 15
    if taken < 1 or (i == steps - 1 and (first_at_end or few)):
        return 1
    return min(config["solver_order"], 2 if taken < 2 or (i == steps - 2 and few) else 3)


def dpm_solver(config, alphas_cumprod, steps, begin) -> weights.Schedule:
    """Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095 ("++"), of order 1 to 3, with or without noise ("sde")."""
    kind = {"deis": "dpmsolver++"}.get(config["algorithm_type"], config["algorithm_type"])  # as diffusers reads it
    heun, sde, in_data = config["solver_type"] == "heun", kind.startswith("sde"), kind.endswith("++")
    zero = config["final_sigmas_type"] == "zero"
    if zero and not in_data:
        raise Unsolvable(f"algorithm_type {kind!r} cannot end at sigma 0: final_sigmas_type must be 'sigma_min'")
    if kind == "sde-dpmsolver" and config["solver_order"] == 3:
        raise Unsolvable(f"algorithm_type {kind!r} has no solver_order 3: take 1 or 2")
    timesteps, sigma = sigmas.multistep(config, alphas_cumprod, steps, own_last=False)
    steps, path = len(timesteps), _Path(config, sigma, in_data)
    rows = []
    for i in range(begin or 0, steps):
        h = path.step(i)
        k = -h * (1 + sde) if in_data else h
        scale = path.scale(i) * (1 if in_data else 1 + sde)
        kept = path.kept(i) * (np.exp(-h) if sde and in_data else 1.0)
        added = path.sigma[i + 1] * np.sqrt(-np.expm1(-2 * h) if in_data else np.expm1(2 * h)) if sde else 0.0
        order = _order(config, i, steps, i - (begin or 0), config["euler_at_final"] or zero) if h else 1
        value = np.array([1.0, 0, 0])
        if order == 1:
            mixed = np.expm1(k) * value
        else:
            slope = np.array([1.0, -1, 0]) * h / path.step(i - 1)  # of m, by h
            phi_1, phi_2, phi_3 = _phis(k, 3)
            mixed = phi_1 * value + (phi_2 if heun or order == 3 else phi_1 / 2) * slope
            if order == 3:
                r = path.step(i - 1) / h, path.step(i - 2) / h
                bend = (slope - np.array([0, 1.0, -1]) / r[1]) / sum(r)
                mixed = phi_1 * value + phi_2 * (slope + r[0] * bend)
                mixed += (phi_3 + (sde and in_data)) * bend  # diffusers has this sign of 1/2 in phi_3
        rows.append((kept, -scale * mixed, added))
    latents, predictions, noise = map(np.array, zip(*rows, strict=True))
    return path.schedule(timesteps, begin, latents, predictions, noise if sde else None)


def deis(config, alphas_cumprod, steps, begin) -> weights.Schedule:
    """Zhang & Chen 2022, arXiv:2204.13902, log-rho: a polynomial in log(sigma) through the last 1 to 3 noises.

    latents / alpha is the integral of the noise over sigma, as in karras.py."""
    config = config | {"final_sigmas_type": "sigma_min"}  # the only one it knows
    timesteps, sigma = sigmas.multistep(config, alphas_cumprod, steps, own_last=True)
    steps, path = len(timesteps), _Path(config, sigma, in_data=False)
    first, logs, rows = begin or 0, np.log(sigma), []
    for i in range(first, steps):
        order = _order(config, i, steps, i - first, False)
        nodes, row = logs[i - order + 1 : i + 1][::-1], np.zeros(3)
        for j, basis in enumerate(weights.lagrange(nodes)):
            # The integral of p(u) e^u is (p - p' + p'' - ...) e^u.
            whole = sum((-1) ** n * basis.deriv(n) if n else basis for n in range(order))
            row[j] = whole(logs[i + 1]) * sigma[i + 1] - whole(logs[i]) * sigma[i]
        rows.append((path.kept(i), path.alpha[i + 1] * row))
    return path.schedule(timesteps, begin, *map(np.array, zip(*rows, strict=True)))


def unipc(config, alphas_cumprod, steps, begin) -> weights.Schedule:
    """Zhao et al. 2023, arXiv:2302.04867: each new prediction first corrects the step that led to it.

    The corrector and the predictor begin at the same latents, so a correction is the difference of their predictions.
    """
    timesteps, sigma = sigmas.multistep(config, alphas_cumprod, steps, own_last=True)
    zero, order = config["final_sigmas_type"] == "zero", config["solver_order"]
    if zero and not (config["predict_x0"] and (config["lower_order_final"] or order == 1)):
        wrong = "lower_order_final" if config["predict_x0"] else "predict_x0"
        raise Unsolvable(f"{wrong} = False cannot end at sigma 0: final_sigmas_type must be 'sigma_min'")
    steps, path = len(timesteps), _Path(config, sigma, config["predict_x0"])
    first, rows, before = begin or 0, [], None
    for i in range(first, steps):
        mixed = np.zeros(order + 1)
        if before is not None and i - 1 not in (config["disable_corrector"] or ()):
            taken, predicted = before
            mixed = _unified(path, i - 1, taken, order, corrects=True) - np.append(0.0, predicted[:-1])
        taken = min(order, i - first + 1, steps - i if config["lower_order_final"] else order)
        predicted = _unified(path, i, taken, order, corrects=False)
        before = taken, predicted
        rows.append((path.kept(i), path.kept(i) * mixed + predicted))
    return path.schedule(timesteps, begin, *map(np.array, zip(*rows, strict=True)))


def _unified(path: _Path, i: int, order: int, most: int, corrects: bool) -> np.ndarray:
    """Weights float[most + 1] of the predictions in step i, newest first; the corrector's begin with that of its end.

    B(h) is h ("bh1") or e^h - 1 ("bh2")."""
    found, h = np.zeros(most + 1), path.step(i)
    k = -h if path.in_data else h
    if not h:  # a respaced schedule that ends at its own lowest sigma
        return found
    here = int(corrects)
    found[here] = np.expm1(k)
    if order > 1 or corrects:
        phis = _phis(k, order + 1)
        b = k if path.config["solver_type"] == "bh1" else phis[0]
        nodes = np.array([(path.lambdas[i - n] - path.lambdas[i]) / h for n in range(1, order)] + [1.0] * corrects)
        wanted = np.array([phis[n] * math.factorial(n) / b for n in range(1, len(nodes) + 1)])
        if len(nodes) == 1:  # as in the paper's code
            rho = np.array([0.5])
        else:
            rho = np.linalg.solve(np.vander(nodes, increasing=True).T, wanted)
        past = rho[: order - 1] / nodes[: order - 1] * b
        found[here + 1 : here + order] += past
        found[here] -= past.sum()
        if corrects:
            found[0] += rho[-1] * b
            found[here] -= rho[-1] * b
    return -path.scale(i) * found
