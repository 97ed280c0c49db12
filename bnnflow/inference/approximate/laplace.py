"""The Laplace approximation: a Gaussian at a mode, with the curvature there."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn

from bnnflow.arguments import choice, integer, number, settle
from bnnflow.draws import Draws
from bnnflow.forward_mode import jvp
from bnnflow.gaussian import Gaussian
from bnnflow.inference.approximate import kinks
from bnnflow.inference.approximate.empirical import Expansion, check_tunable, tune_prior
from bnnflow.inference.start import accelerated_ascent, first_points
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel, likelihoods
from bnnflow.model.network import at_once
from bnnflow.posteriors import Conditional, KroneckerGaussian
from bnnflow.progress import until_interrupted
from bnnflow.seeding import isolated
from bnnflow.warn import warn

__all__ = ["Laplace", "find_mode", "gauss_newton_precision", "prior_precision"]

LARGEST_FULL = 8000
"""Largest number of coordinates with a full covariance: a float64 matrix of them takes 512 MB, and
three are needed.
"""

# of what a network writes, that the tape of its gradient keeps; measured on convolutions
_COPIES = 24
_NEWTON_STEPS = 50
# of the spread of predictions, by which a mode may differ from the network that it was found from
_FAR = 0.25
_SMALL = 1e-3  # nats that a Newton step from a mode may still promise
# nats a coordinate that may be left where pieces meet: a seventh of a posterior standard deviation
_LOOSE = 1e-2
_NEAR = 1e-3  # posterior standard deviations within which the pieces of a density with kinks meet
_KINKED_ROUNDS = 5  # of searches that begin anew
_DRAWS = 64  # over which curvature is averaged, in pairs of opposite ones
_AVERAGES = 10  # rounds of averages
# of the way to the next average: a Gaussian too wide has too little curvature, and the next too
# much
_SHARE = 0.7
# nats a coordinate by which a round still changes log |P|: half a per cent of a standard deviation
_SETTLED = 1e-2
_PIECES = 1000  # of which the gradients are compared, at most

Structure = Literal["full", "diagonal", "last_layer", "kronecker"]


@dataclass(frozen=True)
class Laplace(Method):
    """Put a Gaussian on the best of several modes (MacKay 1992; Daxberger et al. 2021).

    Approximates the posterior (at its temperature) by N(mode, P^-1). The mode is found by Adam from
    random networks, all in one batch, and polished by L-BFGS and Gauss-Newton steps in float64, and
    by BFGS where it lies in kinks, as those of ReLU networks do. P is the generalised Gauss-Newton
    matrix J^T Lambda J of the likelihood, with the Fisher information of its learned parameters,
    plus the prior's own negative curvature, coordinate by coordinate; where that is not positive
    (the kink of a Laplace prior, the tail of a Student t) the precision of a Gaussian with the
    prior's interquartile range takes its place. Exact where the posterior is Gaussian. Learned
    scales of the *prior* usually have no joint mode with the weights: a warning is given, and no
    evidence; where log_joint is found to grow without bound, a ``ValueError``.

    Trained networks that ``init`` gives are only polished, the one of the highest log_joint.
    ``info["moved"]`` says how far it was from the mode: in nats of log_joint, in weights relative
    to their norm, and in the mean of predictions relative to its spread over the data. A warning is
    given where the last is above a quarter.

    Prior and noise are those of the model. ``prior_precision="evidence"`` (MacKay 1992; Immer et
    al. 2021) multiplies the precision of a normal prior by the factor that is best for the
    curvature at the mode, finds the mode again, and keeps it if the Laplace evidence has risen: to
    the maximum in linear models, and as far as such steps lead in networks, whose modes differ by
    many nats (on digits the model's own N(0, 1) stays). Mode, Gaussian and draws are then those of
    the tuned prior, whose precisions are at ``draws.info["prior_precision"]`` and whose evidence is
    at ``draws.info["log_evidence_tuned"]``; ``draws.log_joint`` and ``draws.log_evidence`` stay
    those of the model. Learned noise is a coordinate of theta, and needs no tuning.

    A classifier that is sure of its rows has hardly any curvature at the mode, though all of them
    object to a change as large as the Gaussian then allows: it is far too wide, and its predictions
    are underconfident. So ``hessian="averaged"`` takes the mean of the Fisher information over the
    outputs of the linearised network under the Gaussian itself, a fixed point, at which its
    covariance is that of the best Gaussian around the mode (Opper and Archambeau 2009). The
    evidence stays Laplace's. With normal noise there is no difference.

    ``draws.posterior`` is the density, and its ``loc`` the mode. Draws predict through the network
    itself, which is poor where the Gaussian is wide; the linearised predictive (Immer, Korzepa and
    Bauer 2021) is ``bf.predict(model.linearised(draws.posterior.loc), draws, x)``; compare both.

    ``draws.log_evidence`` is log_joint(mode) - log N(mode; mode, P^-1) at temperature 1; its error
    is NaN because nothing is known of it. At other temperatures that number is the log normaliser
    of the tempered posterior, and is at ``draws.info["log_tempered_normaliser"]``.

    Args:
        structure: ``"full"``, for up to 8,000 coordinates; ``"diagonal"``, the diagonal of P;
            ``"last_layer"``, all other weights held at the mode; ``"kronecker"``, one Kronecker
            product a tensor, computed by laplace-torch (``pip install bnnflow[laplace]``) for
            Gaussian and categorical likelihoods.
        hessian: ``"ggn"``; ``"averaged"``, see above (not with Kronecker products); or ``"exact"``
            for the Hessian of log_joint itself (full and diagonal only), which any likelihood has
            but which is not positive definite everywhere. ``"auto"`` takes ``"averaged"`` where the
            prior is tuned, else ``"ggn"``.
        starts: random networks to climb from.
        steps: Adam steps.
        learning_rate: its first value; a cosine takes it to zero.
        polish: L-BFGS iterations at most.
        prior_precision: None for the model's own prior; ``"evidence"`` to tune it, see above.

    Example:
        >>> net = torch.nn.Linear(1, 1)
        >>> x = torch.linspace(-1, 1, 5)[:, None]
        >>> prior = torch.distributions.Normal(0.0, 1.0)
        >>> model = BayesianModel(net, prior, likelihoods.Gaussian(0.1), x, x)
        >>> from bnnflow import predict, sample
        >>> draws = sample(model, Laplace(), draws=100, seed=0)
        >>> predict(model.linearised(draws.posterior.loc), draws, x).mean.shape
        torch.Size([5])
    """

    refused = ("warmup", "checkpoint")

    structure: Structure = "full"
    hessian: Literal["auto", "ggn", "averaged", "exact"] = "auto"
    starts: int = 8
    steps: int = 1000
    learning_rate: float = 0.02
    polish: int = 2000
    prior_precision: Literal["evidence"] | None = None

    def __post_init__(self) -> None:
        settle(
            self,
            choice,
            "structure",
            choices=("full", "diagonal", "last_layer", "kronecker"),
        )
        settle(self, choice, "hessian", choices=("auto", "ggn", "averaged", "exact"))
        settle(self, choice, "prior_precision", choices=("evidence",))
        settle(self, integer, "starts", "steps", "polish", least=1)
        settle(self, number, "learning_rate", above=0)
        if self.hessian == "exact" and self.structure not in ("full", "diagonal"):
            raise ValueError(
                f"hessian must be 'ggn' for structure={self.structure!r}, or 'averaged'"
            )
        if self.hessian == "averaged" and self.structure == "kronecker":
            raise ValueError("hessian must be 'ggn' for structure='kronecker'")
        if self.prior_precision is not None and self.structure == "kronecker":
            raise ValueError("prior_precision must be None for structure='kronecker'")

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Find the mode and draw from the Gaussian.

        See `bnnflow.sample`. ``chains`` only shapes the draws. Ctrl-C puts the Gaussian at the best
        point so far, with ``info["interrupted"]``; without a mode there is no evidence.
        """
        run.refuse(self, "structure and starts")
        names = self._check(model)
        start, given = (
            first_points(model, run.init, self.starts, run.generator),
            isinstance(run.init, Tensor),
        )
        steps = 0 if given else self.steps
        ascent = accelerated_ascent(
            model, start, steps, self.learning_rate, run.progress, "Laplace"
        )
        best = ascent.best[model.log_joint(ascent.best).nan_to_num(-math.inf).argmax()]
        polish = 0 if ascent.steps.interrupted else self.polish
        first = self._expand(model.to(dtype=torch.float64), best.double(), names, polish)
        at, info = first, first.info
        info["interrupted"] |= ascent.steps.interrupted
        if self.prior_precision == "evidence" and not info["interrupted"]:
            at, tuned = tune_prior(
                first,
                names,
                lambda model, theta: self._expand(model, theta, names, self.polish),
            )
            info = at.info | tuned
        info["gradients_per_chain"] = ascent.steps.done * len(start) + info["gradients"]
        if given:
            info["moved"] = _moved(first.model, best.double(), first.mode)
        posterior = at.posterior
        averaged = self.hessian == "averaged" or (
            self.hessian == "auto" and self.prior_precision is not None
        )
        if averaged and not info["interrupted"]:
            with until_interrupted(least=0) as averaging:
                precision = averaged_precision(
                    at.model, at.mode, names, diagonal=self.structure == "diagonal"
                )
                posterior = self._gaussian(at.model, at.mode, names, precision)
            info["interrupted"] = averaging.interrupted
        if info["interrupted"]:
            warn(_INTERRUPTED)
        elif not info["converged"]:
            warn(_NO_MODE.format(**info))
        posterior = _in_dtype(posterior, model.dtype)

        chains, draws = run.chains or 4, run.draws or 1000
        theta = posterior.sample(chains * draws, run.generator)
        log_joint = model.log_joint(theta).reshape(chains, draws)
        evidence = None
        whole = self.structure != "last_layer" and first.info["converged"]
        if whole and model.temperature == 1:
            evidence = (first.log_evidence, math.nan)
        elif whole:
            info["log_tempered_normaliser"] = first.log_evidence
        theta = theta.unflatten(0, (chains, draws))
        return Draws(
            theta, log_joint, log_evidence=evidence, posterior=posterior, info=info
        )

    def _expand(
        self, model: BayesianModel, theta: Tensor, names: tuple[str, ...], polish: int
    ) -> Expansion:
        """Climb from ``theta`` ``(dim,)`` to a mode, and put the Gaussian there.

        Without ``polish`` it is put where theta is.
        """
        mode, info = find_mode(model, theta, polish)
        bounded = math.isfinite(info["left_to_gain"]) and info["gradient_norm"] < _STEEPEST
        if polish and not info["interrupted"] and not bounded:
            raise ValueError(_UNBOUNDED.format(type(model.prior).__name__))
        precision, posterior = self._posterior(model, mode, names)
        log_evidence = float(model.log_joint(mode) - posterior.log_prob(mode))
        return Expansion(model, mode, precision, posterior, log_evidence, info)

    def _check(self, model: BayesianModel) -> tuple[str, ...]:
        """Return the tensors that are not held at the mode.

        Raise before any work if the method cannot be had.
        """
        if self.hessian != "exact" and not model.likelihood.has_fisher_factor:
            raise ValueError(
                f"{model.likelihood.name} has no fisher_factor for a Gauss-Newton matrix; use "
                "hessian='exact'"
            )
        if self.prior_precision == "evidence":
            check_tunable(model)
        names = _last_layer(model) if self.structure == "last_layer" else model.spec.names
        if self.structure == "kronecker":
            if model.row_weights is not None:
                raise ValueError(
                    "structure='kronecker' takes no row_weights: use 'full', 'diagonal' or "
                    "'last_layer'"
                )
            _import_laplace()
            if not isinstance(
                model.likelihood, likelihoods.Gaussian | likelihoods.Categorical
            ):
                raise ValueError(
                    "structure='kronecker' is for Gaussian and Categorical likelihoods, not "
                    f"{model.likelihood.name}"
                )
        size = len(_indices(model, names))
        if self.structure in ("full", "last_layer") and size > LARGEST_FULL:
            raise ValueError(
                f"structure={self.structure!r} is for up to {LARGEST_FULL} coordinates, this model "
                f"has {size}; "
                "use structure='diagonal' or 'kronecker'"
            )
        return names

    def _posterior(
        self, model: BayesianModel, mode: Tensor, names: tuple[str, ...]
    ) -> tuple[Tensor | None, Gaussian | KroneckerGaussian | Conditional]:
        """Return the precision where it is a matrix ``(k, k)`` or a diagonal ``(k,)``, and the
        Gaussian.
        """
        if self.structure == "kronecker":
            return None, _kronecker(model, mode)
        if self.hessian == "exact":
            precision = exact_precision(model, mode, diagonal=self.structure == "diagonal")
        else:
            precision = gauss_newton_precision(
                model, mode, names, diagonal=self.structure == "diagonal"
            )
        return precision, self._gaussian(model, mode, names, precision)

    def _gaussian(
        self, model: BayesianModel, mode: Tensor, names: tuple[str, ...], precision: Tensor
    ) -> Gaussian | Conditional:
        """Return the Gaussian at the mode with this precision ``(k, k)`` or ``(k,)`` of the tensors
        not held there.
        """
        if precision.dim() == 1:
            if not bool((precision > 0).all()):
                raise ValueError(_INDEFINITE.format(float(precision.min())))
            return Gaussian(mode, precision.rsqrt())
        free = _indices(model, names)
        try:
            gaussian = Gaussian.of_precision(mode[free], precision)
        except RuntimeError as error:
            if self.hessian != "exact":
                raise _too_stiff(precision) from error
            least = float(torch.linalg.eigvalsh(precision)[0])
            raise ValueError(_INDEFINITE.format(least)) from error
        return gaussian if self.structure == "full" else Conditional(mode, free, gaussian)


# Where the gradient is larger, the rounding of a coordinate near one moves the density by nats.
_STEEPEST = 1 / torch.finfo(torch.float64).eps
_NO_MODE = (
    "no mode was found: after {gradients} evaluations another step promises {left_to_gain:.3g} "
    "nats, and the norm of the gradient is {gradient_norm:.2g}; give Laplace more polish or "
    "starts, or use another method (the scales of a hierarchical prior have no joint mode with the "
    "weights, nor has the noise of a network that can fit every row)"
)
_INTERRUPTED = (
    "interrupted: Laplace returns the Gaussian at the best point so far, which may be no mode, and "
    "with the curvature and the prior that it had there"
)
_UNBOUNDED = (
    "log_joint has no mode: it grows without bound on the way up, as under a hierarchical prior "
    "where the scale and the weights of a tensor go to zero together (the prior is {}). Use HMC or "
    "SMC, or a normal prior of fixed scale with prior_precision='evidence'"
)
_TOO_STIFF = (
    "the curvature of log_joint is beyond what double precision holds (it reaches {:.2g}): the "
    "noise is all but zero, or runs there since the network can fit every row. Use a likelihood "
    "with a larger fixed scale, more rows, or HMC"
)
_INDEFINITE = (
    "the curvature at the mode is not positive definite (smallest value {:.3g}); "
    "use hessian='ggn'"
)


# ---------------------------------------- the mode


def find_mode(
    model: BayesianModel, theta: Tensor, iterations: int
) -> tuple[Tensor, dict[str, Any]]:
    """Climb log_joint in float64 from ``theta`` ``(dim,)`` by L-BFGS, then by Gauss-Newton steps
    where they fit.

    Where a Newton step still promises something and does not keep it there are kinks: BFGS then
    goes on, and what is left to gain is judged by the gradients of all pieces that meet there,
    within a thousandth of a posterior standard deviation.

    Ctrl-C ends the climb at the best point so far, and without ``iterations`` there is none.

    Returns:
        The mode, and what it took; it has converged if less than a hundredth of a nat a coordinate
        can be gained.
    """
    climb, gain, allowed = _Climb(model, theta), math.nan, _SMALL + _LOOSE * model.dim
    with until_interrupted(least=0) as taken:
        if iterations > 0:
            gain = climb.to_the_mode(iterations, allowed)
    if taken.interrupted:
        climb.keep_the_best()
        gain = math.nan
    if not math.isfinite(gain):
        climb.look()
    return climb.mode, {
        "gradient_norm": float(climb.grad.norm()),
        "log_joint_mode": float(climb.value),
        "left_to_gain": gain,
        "gradients": climb.gradients,
        "converged": gain <= allowed,
        "interrupted": taken.interrupted,
    }


class _Climb:
    """A point on its way to the mode, its log joint density ``(1,)`` and the gradient of that
    ``(1, dim)``.
    """

    def __init__(self, model: BayesianModel, theta: Tensor) -> None:
        self.model, self.mode, self.gradients = model, theta, 0
        self.newton = model.dim <= LARGEST_FULL // 4 and model.likelihood.has_fisher_factor
        self.value = self.grad = torch.empty(0)
        self.highest = (-math.inf, theta)  # of what the optimisers of scipy have seen

    def to_the_mode(self, iterations: int, allowed: float) -> float:
        """Climb until no more than what is allowed is left to gain; return what is."""
        self.by_bfgs(iterations)
        with torch.no_grad():
            gain = self.by_newton()
            return gain if gain <= _SMALL else self.over_kinks(iterations, allowed)

    def keep_the_best(self) -> None:
        """Go to the highest point of an optimiser that was interrupted."""
        value, point = self.highest
        if value > float(self.model.log_joint(self.mode)):
            self.mode = point

    def negative(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Return minus the log joint density and its gradient, for an optimiser of scipy."""
        self.gradients += 1
        point = torch.from_numpy(flat.copy()).to(self.model.device)
        with torch.no_grad():
            value, grad = self.model.log_joint_and_grad(point.unsqueeze(0))
        if not bool(value.isfinite()):
            return math.inf, np.zeros_like(flat)
        if float(value) > self.highest[0]:
            self.highest = (float(value), point)
        return -float(value), -grad[0].cpu().numpy()

    def look(self) -> None:
        """Evaluate density and gradient where the climb is."""
        self.value, self.grad = self.model.log_joint_and_grad(self.mode.unsqueeze(0))

    def ascend(self, step: Tensor) -> bool:
        """Take a step ``(1, dim)``, or as much of it as gains; say whether any did."""
        better, moved = _line_search(self.model, self.mode, step)
        if not bool(better > self.value):
            return False
        self.mode, self.value = moved, better
        return True

    def by_bfgs(self, iterations: int) -> None:
        """Go as far as L-BFGS does."""
        options = {
            "maxiter": iterations,
            "maxfun": 2 * iterations,
            "maxcor": 30,
            "ftol": 0.0,
            "gtol": 1e-8,
        }
        found = scipy.optimize.minimize(
            self.negative,
            self.mode.cpu().numpy(),
            method="L-BFGS-B",
            jac=True,
            options=options,
        )
        self.mode = torch.from_numpy(np.asarray(found.x)).to(self.mode)

    def by_newton(self) -> float:
        """Take Gauss-Newton steps while they gain; return what the last one promised, NaN if there
        was none.
        """
        gain = math.nan
        self.look()
        for _ in range(_NEWTON_STEPS if self.newton else 0):
            precision = gauss_newton_precision(self.model, self.mode)
            factor, failed = torch.linalg.cholesky_ex(precision)
            if bool(failed):  # for rounding: no step to judge by
                return math.nan
            step = torch.cholesky_solve(self.grad.T, factor).T  # (1, dim)
            gain = 0.5 * float((step * self.grad).sum())
            self.gradients += 2
            if not self.ascend(step):
                break
            self.grad = self.model.log_joint_and_grad(self.mode.unsqueeze(0))[1]
            if gain < 1e-14:
                break
        return gain

    def over_kinks(self, iterations: int, allowed: float) -> float:
        """Go on where pieces of the density meet, until no more than what is allowed is left to
        gain; return what is.
        """
        gain = math.nan
        for _ in range(_KINKED_ROUNDS):
            if self.newton:
                precision = gauss_newton_precision(self.model, self.mode)
                inverse, failed = torch.linalg.inv_ex(precision)
                if bool(failed):
                    raise _too_stiff(precision)
                point = kinks.minimise(
                    self.negative,
                    self.mode.cpu().numpy(),
                    inverse.cpu().numpy(),
                    iterations,
                )
                self.mode = torch.from_numpy(point).to(self.mode)
            self.look()
            gain, step = _left_to_gain(self.model, self.mode, self.grad)
            self.gradients += min(2 * self.model.dim, _PIECES) + 2
            if gain <= allowed or not self.ascend(step):
                break
        return gain


def _left_to_gain(model: BayesianModel, mode: Tensor, grad: Tensor) -> tuple[float, Tensor]:
    """Return what a step from ``mode`` can still gain where pieces meet, in nats, and that step
    ``(1, dim)``.
    """
    curvature = prior_precision(model, mode) / model.temperature
    if model.likelihood.has_fisher_factor:
        whole = model.dim <= LARGEST_FULL // 4
        curvature = gauss_newton_precision(model, mode, diagonal=not whole)
    if not bool(curvature.isfinite().all()):  # on its way to infinity
        return math.inf, torch.zeros_like(grad)
    try:
        gaussian = (
            Gaussian(torch.zeros_like(mode), curvature.rsqrt())
            if curvature.dim() == 1
            else Gaussian.of_precision(torch.zeros_like(mode), curvature)
        )
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise _too_stiff(curvature) from error
    offsets = gaussian.sample(
        min(2 * model.dim, _PIECES), torch.Generator(mode.device).manual_seed(0)
    )
    near = torch.cat([model.log_joint_and_grad(mode + _NEAR * offsets)[1], grad])
    root = gaussian.scale_tril
    whitened = near * root if root.dim() == 1 else near @ root
    if not bool(whitened.isfinite().all()):
        return math.inf, torch.zeros_like(grad)
    shortest = torch.from_numpy(kinks.shortest_mixture(whitened.cpu().numpy())).to(mode)
    step = root * shortest if root.dim() == 1 else root @ shortest
    return 0.5 * float(shortest.square().sum()), step.unsqueeze(0)


def _moved(model: BayesianModel, start: Tensor, mode: Tensor) -> dict[str, float]:
    """Return how far polishing has moved a network ``(dim,)``, and warn where it is another one
    now.
    """
    with torch.no_grad():
        before, after = (
            model.likelihood.mean(model.outputs(theta), model.likelihood_parameters(theta))
            for theta in (start, mode)
        )
        moved = {
            "log_joint": float(model.log_joint(mode) - model.log_joint(start)),
            "weights": float((mode - start).norm() / start.norm()),
            "predictions": float(
                (after - before).norm() / (before - before.mean(0)).norm()
            ),
        }
    if not moved["predictions"] < _FAR:
        warn(
            "the mode near init is another network: its predictions differ by "
            f"{moved['predictions']:.2g} of their spread, its weights by {moved['weights']:.2g} of "
            f"their norm, and log_joint is {moved['log_joint']:.4g} "
            "nats higher; init was trained with another prior or not to the end, so that this is "
            "no Laplace approximation at it"
        )
    return moved


def _line_search(
    model: BayesianModel, theta: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the highest of seven points along a step, with its log_joint."""
    sizes = 2.0 ** -torch.arange(7, dtype=theta.dtype, device=theta.device)
    points = theta + sizes[:, None] * step
    values = model.log_joint(points).nan_to_num(-math.inf)
    return values.max(), points[values.argmax()]


# ---------------------------------------- curvature


def _too_stiff(precision: Tensor) -> ValueError:
    return ValueError(_TOO_STIFF.format(float(precision.diagonal().max())))


def gauss_newton_precision(
    model: BayesianModel,
    theta: Tensor,
    names: Collection[str] | None = None,
    *,
    diagonal: bool = False,
    changes: Tensor | None = None,
) -> Tensor:
    """Return the Gauss-Newton matrix of -log_joint at ``theta`` ``(dim,)``, over these tensors.

    Over all if None.

    The rows of data are taken in blocks, so that memory is bounded whatever their number and
    whatever the network. With ``changes`` ``(s, k)`` of the tensors the likelihood's curvature is
    averaged over them, in the linearised network.

    Returns:
        ``(k, k)``, or its diagonal ``(k,)``.
    """
    names = model.spec.names if names is None else names
    prior = prior_precision(model, theta)[_indices(model, names)]
    total = (
        torch.zeros_like(prior)
        if diagonal
        else torch.zeros(len(prior), len(prior)).to(prior)
    )
    with torch.no_grad():
        outputs = model.outputs(theta, model.x[:1]).shape[-1]
    entries = 4 * outputs * len(prior)
    if changes is not None:
        slices = [
            model.spec.slices[name] for name in names if name not in model.spec.extras
        ]
        weights = sum(each.stop - each.start for each in slices)
        changes = changes[:, :weights]
        entries += 4 * len(changes) * (outputs + 2) ** 2
    for block in _row_blocks(model, copies=2 * (1 + outputs), entries=entries):
        # (rows, k)
        factor = (
            block.at(theta.unsqueeze(0))
            .grad_and_factor(names=names, changes=changes)[1][0]
            .detach()
        )
        if diagonal:
            total += factor.square().sum(0)
        else:
            total.addmm_(factor.T, factor)
    return (total + (prior if diagonal else prior.diag())) / model.temperature


def _row_blocks(
    model: BayesianModel, copies: int, entries: int = 0
) -> Iterator[BayesianModel]:
    """Cut the data into models of a few rows, so that what is made of one is bounded in memory.

    Their likelihoods multiply to that of all rows; the prior is in each.

    Args:
        model: the whole.
        copies: how often what one network writes for a row is held, as once for every direction of
            a derivative.
        entries: numbers that are made of each row beside these.
    """
    size, _ = at_once(len(model.x), copies * model.network.elements(model.x) + entries)
    return (
        model.subset(slice(start, start + size)) for start in range(0, len(model.x), size)
    )


def averaged_precision(
    model: BayesianModel, mode: Tensor, names: Collection[str], *, diagonal: bool = False
) -> Tensor:
    """Return the Gauss-Newton matrix averaged over N(mode, P^-1), of which it is the precision P,
    ``(k, k)``.

    By fixed points, from the matrix at the mode, over the same draws in every round.
    """
    precision = gauss_newton_precision(model, mode, names, diagonal=diagonal)
    half = torch.randn(
        _DRAWS // 2,
        len(precision),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    noise, before = torch.cat([half, -half]).to(precision), math.nan
    for _ in range(_AVERAGES):
        root, failed = (
            (precision.sqrt(), False) if diagonal else torch.linalg.cholesky_ex(precision)
        )
        if bool(failed):
            raise _too_stiff(precision)
        log_det = 2 * float((root if diagonal else root.diagonal()).log().sum())
        if abs(log_det - before) < _SETTLED * len(precision):
            break
        before = log_det
        changes = (
            noise / root
            if diagonal
            else torch.linalg.solve_triangular(root, noise, upper=False, left=False)
        )
        averaged = gauss_newton_precision(
            model, mode, names, diagonal=diagonal, changes=changes
        )
        precision = torch.lerp(precision, averaged, _SHARE)
    return precision


def _indices(model: BayesianModel, names: Collection[str]) -> Tensor:
    """Return the coordinates of some tensors, in their order."""
    spec = model.spec
    chosen = [spec.slices[name] for name in spec.names if name in names]
    where = [torch.arange(each.start, each.stop, device=model.device) for each in chosen]
    return torch.cat([torch.arange(0, device=model.device), *where])


def prior_precision(model: BayesianModel, theta: Tensor) -> Tensor:
    """Return the prior's negative second derivatives at ``theta``, ``(dim,)``, made positive.

    Where one is not clearly positive, 1 / sd^2 of a normal with the prior's interquartile range
    stands for it.
    """
    slope = torch.func.grad(model.log_prior)
    directions, spec = [torch.ones_like(theta)], model.spec
    extras = [
        i
        for name in spec.extras
        for i in range(spec.slices[name].start, spec.slices[name].stop)
    ]
    directions[0][extras] = 0.0
    directions += [
        torch.zeros_like(theta).index_fill(0, torch.tensor([i], device=theta.device), 1.0)
        for i in extras
    ]
    # Given the extras the weights are independent, so that one product with ones is the diagonal.
    products = [jvp(slope, (theta,), (direction,))[1] for direction in directions]
    curvature = -products[0]
    for i, product in zip(extras, products[1:], strict=True):
        curvature[i] = -product[i]
    spread = (1.349 / model.flat_prior.interquartile_range.to(theta.dtype)).square()
    return torch.where(curvature > 1e-3 * spread, curvature, spread)


def exact_precision(model: BayesianModel, theta: Tensor, *, diagonal: bool) -> Tensor:
    """Return the Hessian of -log_joint at ``theta`` ``(dim,)``, or its diagonal, by reverse mode
    twice.

    The rows of data are taken in blocks, so that memory is bounded whatever their number and
    whatever the network.
    """
    total = _derivatives(
        lambda at: model.flat_prior.log_prob_and_grad(at)[1], theta, diagonal
    )
    for block in _row_blocks(model, copies=_COPIES):
        total += _derivatives(block.log_likelihood_grad, theta, diagonal)
    precision = -total / model.temperature
    return precision if diagonal else 0.5 * (precision + precision.T)


def _derivatives(grad: Callable[[Tensor], Tensor], theta: Tensor, diagonal: bool) -> Tensor:
    """Return the derivative of ``grad`` at ``theta`` ``(dim,)``, or its diagonal."""
    with torch.enable_grad():
        at = theta.clone().requires_grad_()
        value = grad(at) + 0 * at  # a constant gradient has a derivative too
        # One by one: batched over the directions, convolutions take several times the memory and
        # more time.
        rows = (torch.autograd.grad(each, at, retain_graph=True)[0] for each in value)
        return torch.stack(
            [row[i] for i, row in enumerate(rows)] if diagonal else list(rows)
        )


def _last_layer(model: BayesianModel) -> tuple[str, ...]:
    """Return the last layer's tensors, and the extras."""
    spec = model.spec
    names = [name for name in spec.names if name not in spec.extras]
    last = spec.layers[-1].weight if spec.layers else names[-1]
    module = last.rpartition(".")[0]
    chosen = [name for name in names if name.rpartition(".")[0] == module]
    free = _indices(model, chosen)
    if not spec.layers:  # an unlabelled network: make sure that these tensors do come last
        theta = torch.zeros(3, model.dim, dtype=model.dtype, device=model.device)
        theta[:] = torch.linspace(-1, 1, model.dim, dtype=model.dtype, device=model.device)
        theta[1:, free] += torch.tensor(
            [[1.0], [2.0]], dtype=model.dtype, device=model.device
        )
        zero, one, two = model.outputs(theta, model.x[:8])
        if not torch.allclose(two - one, one - zero, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"structure='last_layer': the outputs are not affine in {chosen}; use "
                "another structure"
            )
    return (*chosen, *spec.extras)


def _in_dtype(posterior: Any, dtype: torch.dtype) -> Any:
    """Round the tensors of a posterior."""
    if isinstance(posterior, Gaussian):
        return Gaussian(posterior.loc.to(dtype), posterior.scale_tril.to(dtype))
    if isinstance(posterior, Conditional):
        return Conditional(
            posterior.loc.to(dtype), posterior.where, _in_dtype(posterior.free, dtype)
        )
    parts = (posterior.left, posterior.right, posterior.precision)
    return KroneckerGaussian(
        posterior.loc.to(dtype), *(tuple(each.to(dtype) for each in part) for part in parts)
    )


# ---------------------------------------- laplace-torch


def _import_laplace() -> Any:
    try:
        import laplace
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        raise ImportError(
            "structure='kronecker' needs laplace-torch: pip install bnnflow[laplace]. If it is "
            "installed, its torchvision may not fit your torch; uninstalling torchvision mends that"
        ) from error
    return laplace


class _Scaled(nn.Module):
    """Outputs times fixed numbers."""

    by: Tensor

    def __init__(self, by: Tensor) -> None:
        super().__init__()
        self.register_buffer("by", by.detach())

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs * self.by


def _kronecker(model: BayesianModel, mode: Tensor) -> KroneckerGaussian:
    """Let laplace-torch compute the Kronecker factors at the mode, and add our prior and the
    extras.

    The prior's precision is averaged over each tensor; extras have their own, diagonal block.
    """
    laplace = _import_laplace()
    regression = isinstance(model.likelihood, likelihoods.Gaussian)
    net = model.network_at(mode)
    if regression:  # in units of the noise, of which each output may have its own
        fixed = model.likelihood.scale  # type: ignore[attr-defined]
        scale = (
            model.likelihood_parameters(mode)["scale"]
            if fixed is None
            else mode.new_tensor(fixed)
        )
        net = nn.Sequential(net, _Scaled(1 / scale))
    options = {"subset_of_weights": "all", "hessian_structure": "kron"}
    fitted = laplace.Laplace(
        net, "regression" if regression else "classification", **options
    )
    data = torch.utils.data.TensorDataset(model.x, model.y)
    with isolated():  # a DataLoader draws from the global generator
        fitted.fit(torch.utils.data.DataLoader(data, batch_size=256))
    prior, spec = prior_precision(model, mode), model.spec
    names = [name for name in spec.names if name not in spec.extras]
    left, right, precision = [], [], []
    for name, vectors, values in zip(
        names, fitted.H.eigenvectors, fitted.H.eigenvalues, strict=True
    ):
        one = torch.ones(1, dtype=mode.dtype, device=mode.device)
        vectors, values = (
            ([*vectors, one[None]], [*values, one])
            if len(values) == 1
            else (vectors, values)
        )
        likelihood = values[0].clamp(min=0).outer(values[1].clamp(min=0))
        left.append(vectors[0].detach())
        right.append(vectors[1].detach())
        precision.append(
            ((likelihood + prior[spec.slices[name]].mean()) / model.temperature).detach()
        )
    if spec.extras:
        own = gauss_newton_precision(model, mode, spec.extras, diagonal=True)
        left.append(torch.eye(len(own)).to(own))
        right.append(torch.ones(1, 1).to(own))
        precision.append(own.unsqueeze(-1))
    return KroneckerGaussian(mode, tuple(left), tuple(right), tuple(precision))
