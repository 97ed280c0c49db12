"""The Bayesian model average: predictions as a mixture over draws, streamed so that memory does not
grow with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnnflow.arguments import Count, Fraction, checked, finite, tensor
from bnnflow.calibration import Calibration
from bnnflow.draws import Draws, as_theta, counted_alike, evenly
from bnnflow.model import BayesianModel
from bnnflow.model.likelihood import Likelihood, real_targets
from bnnflow.model.likelihoods.classes import Categorical
from bnnflow.model.likelihoods.transformed import Transformed
from bnnflow.seeding import as_generator
from bnnflow.types import Seed

__all__ = ["Calibrated", "Prediction", "predict"]

_ELEMENTS = 2**21  # of the widest activation of a chunk: 8 MB in float32
_KEPT = 2**23  # outputs of a network, at most, that are kept: 32 MB in float32
_SECTIONS = 16  # grid points of one pass of the quantile search
_SHOWN = 5  # rows, in a notebook
TINY = 1e-300  # a probability, whose logarithm is finite
_TOLERANCE = 1e-3  # width of a quantile's last bracket, in predictive standard deviations


@checked
def predict(
    model: BayesianModel,
    draws: Draws | Tensor | tuple[Tensor, Tensor | None],
    x: Tensor | np.ndarray | None = None,
    *,
    chunk_size: Count | None = None,
) -> Prediction:
    """Average a model's predictions over draws of its weights.

    The predictive distribution is p(y | x) = sum_s w_s p(y | x, theta_s): the full mixture over
    draws, never a Gaussian with its moments. Where draws have a ``calibration``, class
    probabilities are turned by it.

    Args:
        model: the model whose weights were drawn.
        draws: draws, weights ``(..., dim)``, or a pair of weights and log weights, which need not
            be normalised.
        x: inputs, ``(n, ...)`` as in training; the training inputs if None.
        chunk_size: draws that are evaluated at once; chosen to keep a chunk's activations near 8 MB
            if None. It changes speed and memory, not the result.

    Returns:
        A prediction that evaluates the network when it is asked for something.

    Raises:
        ValueError: for inputs or weights of the wrong shape, NaN or infinite values, or no draws.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> from bnnflow.model import likelihoods
        >>> prior = torch.distributions.Normal(0.0, 1.0)
        >>> model = BayesianModel(net, prior, likelihoods.Gaussian(0.1), x, x.sin())
        >>> prediction = predict(model, model.sample_prior(100, seed=0), x)
        >>> prediction.mean.shape, prediction.quantile([0.05, 0.95]).shape
        (torch.Size([20]), torch.Size([2, 20]))
    """
    theta, log_weights = as_theta(draws)
    model.spec.check(theta, "draws")
    model.check_draws(draws)
    x = model.inputs(x)
    if len(theta) == 0:
        raise ValueError("there are no draws to average over")
    broken = int((~theta.isfinite().all(-1)).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(theta)} draws have NaN or infinite weights; leave them out"
        )
    theta, log_weights = _normalise(theta, log_weights)
    if chunk_size is None:
        chunk_size = max(
            1, _ELEMENTS // (len(x) * max(model.spec.widths.values(), default=64))
        )
    parts = model, theta, log_weights.to(model.device), x, chunk_size
    calibration = draws.calibration if isinstance(draws, Draws) else None
    return Prediction(*parts) if calibration is None else Calibrated(*parts, calibration)


def _normalise(theta: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the draws of positive weight and their log weights, float64, which sum to one."""
    if log_weights is None:
        return theta, torch.full((len(theta),), -math.log(len(theta)), dtype=torch.float64)
    log_weights = log_weights.double()
    kept = log_weights > -math.inf
    if not bool(kept.all()):
        theta, log_weights = theta[kept.to(theta.device)], log_weights[kept]
    return theta, log_weights - log_weights.logsumexp(0)


class Chunk(NamedTuple):
    """The outputs of some draws of one model."""

    likelihood: Likelihood
    outputs: Tensor  # (chunk, n, out), float64
    parameters: dict[str, Tensor]  # (chunk, *shape), float64
    log_weights: Tensor  # (chunk,), float64


class ByDraw(NamedTuple):
    """What each draw of the weights says on its own."""

    mean: Tensor  # (draws, n, targets) or (draws, n, classes)
    sample: Tensor | None  # (draws, n, targets) or labels (draws, n)
    log_prob: Tensor | None  # (draws, n)


class _Moments(NamedTuple):
    mean: Tensor  # (n, targets) or (n, classes)
    between: Tensor  # variance over draws of what a draw predicts, same shape
    # mean over draws of the noise variance (n, targets), or of the entropy (n,)
    within: Tensor | None


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """A predictive distribution at ``n`` inputs, made by `predict`.

    Everything is float64. With a single regression target its axis is dropped: ``mean`` is
    ``(n,)``, and ``(n, targets)`` otherwise. Each quantity is computed when asked for, in one pass
    over the draws or a few; the moments are kept.

    Attributes:
        model: the model.
        theta: ``(draws, dim)``, those of positive weight.
        log_weights: ``(draws,)``, normalised.
        x: inputs.
        chunk_size: draws evaluated at once.
        outputs: ``(draws, n, out)`` of the network, where they are kept (`evaluated`).
    """

    model: BayesianModel
    theta: Tensor
    log_weights: Tensor
    x: Tensor
    chunk_size: Count
    outputs: Tensor | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        """Return the number of inputs."""
        return len(self.x)

    def __repr__(self) -> str:
        """Say what is predicted in one line."""
        return f"Prediction(n={len(self)}, draws={len(self.theta)}, kind={self.kind!r})"

    def _repr_html_(self) -> str:
        """Show the first rows in a notebook."""
        first = self.subset(torch.arange(min(_SHOWN, len(self))))
        if self.kind == "classification":
            heads = [f"P({label})" for label in range(first.probs.shape[1])]
            columns = first.probs
        else:
            named = {"mean": first.mean}
            if first._has_variance:
                named["sd"] = first.sd
            parts = {name: each.reshape(len(first), -1) for name, each in named.items()}
            heads = [
                f"{name} {target}" if part.shape[1] > 1 else name
                for name, part in parts.items()
                for target in range(part.shape[1])
            ]
            columns = torch.cat(list(parts.values()), 1)
        top = "".join(f"<th>{head}</th>" for head in ["row", *heads])
        body = "".join(
            f"<tr><th>{row}</th>"
            + "".join(f"<td>{each:.4g}</td>" for each in values)
            + "</tr>"
            for row, values in enumerate(columns.tolist())
        )
        return f"<p>{self!r}</p><table><tr>{top}</tr>{body}</table>"

    def subset(self, rows: Tensor) -> Prediction:
        """Return the prediction of some rows, numbers ``(k,)``."""
        rows = rows.to(self.x.device)
        kept = None if self.outputs is None else self.outputs[:, rows]
        return replace(self, x=self.x[rows], outputs=kept)

    def select(self, draws: Tensor) -> Prediction:
        """Return the prediction by some of the draws, numbers ``(k,)``, which count alike."""
        weights = self.log_weights
        kept = None if self.outputs is None else self.outputs[draws.to(self.outputs.device)]
        return replace(
            self,
            theta=self.theta[draws.to(self.theta.device)],
            log_weights=weights.new_full((len(draws),), -math.log(len(draws))),
            outputs=kept,
        )

    @checked
    def thinned(self, most: Count) -> Prediction:
        """Return the prediction by at most so many draws that count alike: evenly spaced, or, where
        weights differ, chosen by them.
        """
        weights = self.log_weights
        if bool((weights != weights[0]).any()):
            return self.select(counted_alike(weights, min(most, len(weights))))
        return self if len(weights) <= most else self.select(evenly(len(weights), most))

    def evaluated(self) -> Prediction:
        """Return the prediction with the outputs of its network, which is then evaluated once
        whatever is asked for; without, where they would take more than 32 MB.
        """
        chunks = self.theta.detach().split(self.chunk_size)
        outputs: list[Tensor] = []
        for theta in chunks:
            with torch.no_grad():
                outputs.append(
                    self._evaluate(theta.to(self.model.device, self.model.dtype))
                )
            if len(self.theta) * outputs[0][0].numel() > _KEPT:
                return self
        return replace(self, outputs=torch.cat(outputs))

    @property
    def kind(self) -> str:
        """``"regression"`` or ``"classification"``."""
        return self.model.likelihood.kind

    @property
    def discrete(self) -> bool:
        """Whether the targets are counts, so that the cdf is a step function."""
        return self.model.likelihood.discrete

    @property
    def has_intervals(self) -> bool:
        """Whether there are quantiles: the likelihood has a ``cdf`` and a ``variance``."""
        return self.model.likelihood.has_cdf and self._has_variance

    # ---------------------------------------- moments

    @property
    def mean(self) -> Tensor:
        """Mean of y: ``(n,)`` or ``(n, targets)``.

        For classes their probabilities, ``(n, classes)``.
        """
        return self._squeeze(self._moments.mean)

    @property
    def probs(self) -> Tensor:
        """Class probabilities, ``(n, classes)``.

        Raises:
            ValueError: for regression.
        """
        self._require("classification", "probs")
        return self._moments.mean

    @property
    def sd(self) -> Tensor:
        """Standard deviation, in the shape of ``mean``.

        For regression that of y: the root of ``epistemic ** 2 + aleatoric ** 2``. For classes that
        of their probabilities over draws.
        """
        if self.kind == "classification":
            return self._moments.between.sqrt()
        return self._squeeze((self._moments.between + self._within("sd")).sqrt())

    @property
    def epistemic(self) -> Tensor:
        """What more data would remove.

        For regression the standard deviation over draws of the mean, in the shape of ``mean``; for
        classes the mutual information of label and weights, ``(n,)``, in nats.
        """
        if self.kind == "classification":
            entropy = torch.special.entr(self._moments.mean).sum(-1)
            return (entropy - self._within("epistemic")).clamp(min=0)
        return self._squeeze(self._moments.between.sqrt())

    @property
    def aleatoric(self) -> Tensor:
        """What more data would leave.

        For regression the root mean square of the noise, in the shape of ``mean``; for classes the
        expected entropy of the label given the weights, ``(n,)``, in nats.
        """
        within = self._within("aleatoric")
        return within if self.kind == "classification" else self._squeeze(within.sqrt())

    @cached_property
    def _moments(self) -> _Moments:
        """One pass; sums are of offsets from the first draw, so that large means cost no digits."""
        shift: Tensor | None = None
        first, second, inner = torch.zeros(()), torch.zeros(()), None
        for chunk in self._chunks(self.theta):
            weights = chunk.log_weights.exp()
            # (chunk, n, targets)
            mean = chunk.likelihood.mean(chunk.outputs, chunk.parameters)
            # a mean that overflows is no origin
            shift = mean[0].nan_to_num(posinf=0.0) if shift is None else shift
            offset = mean - shift
            first = first.to(offset) + torch.tensordot(weights, offset, 1)
            second = second.to(offset) + torch.tensordot(weights, offset.square(), 1)
            spread = self._spread(chunk, mean)
            if spread is not None:
                inner = torch.tensordot(weights, spread, 1) + (
                    0 if inner is None else inner
                )
        assert shift is not None
        between = torch.where(first.isinf(), math.inf, second - first.square())
        return _Moments(shift + first, between.clamp(min=0), inner)

    def _spread(self, chunk: Chunk, mean: Tensor) -> Tensor | None:
        """Return the noise variance of every draw, ``(chunk, n, targets)``, or its entropy,
        ``(chunk, n)``.
        """
        if self.kind == "classification":
            return torch.special.entr(mean).sum(-1)
        if not self._has_variance:
            return None
        return chunk.likelihood.variance(chunk.outputs, chunk.parameters)

    @property
    def _has_variance(self) -> bool:
        return self.model.likelihood.has_variance

    def _within(self, what: str) -> Tensor:
        if self._moments.within is None:
            raise ValueError(
                f"{what} needs the likelihood to have a method variance(outputs, parameters)"
            )
        return self._moments.within

    # ---------------------------------------- the mixture

    @checked
    def log_prob(self, y: Tensor | np.ndarray) -> Tensor:
        """Return the log density of each row under the mixture, ``(n,)``; joint over targets.

        Args:
            y: targets, ``(n,)`` or ``(n, targets)``, or labels.

        Raises:
            ValueError: if y does not fit.
        """
        y = self._targets(y)
        total = torch.full(
            (len(self),), -math.inf, dtype=torch.float64, device=self.model.device
        )
        for chunk in self._chunks(self.theta):
            terms = (
                chunk.likelihood.log_prob(chunk.outputs, y, chunk.parameters)
                + chunk.log_weights[:, None]
            )
            total = torch.logaddexp(total, terms.logsumexp(0))  # (n,)
        return total

    @checked
    def cdf(self, y: Tensor | np.ndarray) -> Tensor:
        """Return P(target <= y) of each row under the mixture, noise included, in the shape of
        ``mean``.

        Args:
            y: ``(n,)`` or ``(n, targets)``, any numbers.

        Raises:
            ValueError: for classes, if y does not fit, or if the likelihood has no ``cdf``.
        """
        self._require("regression", "cdf")
        y = real_targets(finite("y", tensor("y", y)), self._moments.mean.shape[-1])
        self._check_rows(y)
        return self._squeeze(self._cdf(y.to(self.model.device, torch.float64)[None])[0])

    @checked
    def quantile(self, q: float | Sequence[float] | Tensor) -> Tensor:
        """Return quantiles of the predictive mixture, noise included.

        The mixture's cdf is inverted. Cantelli's inequality brackets the quantile by mean and
        standard deviation; three or four passes over a grid of 16 points narrow the bracket to 1e-3
        standard deviations or less, and the cdf is interpolated linearly in it. The error is thus
        below 1e-3 standard deviations whatever the mixture, and below 1e-5 where it is smooth on
        that scale. For counts the quantile is exact: the least whole number at which the cdf
        reaches the level.

        Args:
            q: a level in (0, 1), or several.

        Returns:
            The shape of ``mean``, with a leading axis for the levels if ``q`` has one. With several
            targets, the quantiles of each target's marginal distribution.

        Raises:
            ValueError: for classes, levels outside (0, 1), or a likelihood without ``cdf`` and
                ``variance``.
        """
        self._require("regression", "quantile")
        levels = torch.as_tensor(q, dtype=torch.float64, device=self.model.device)
        if (
            levels.dim() > 1
            or levels.numel() == 0
            or not bool(((levels > 0) & (levels < 1)).all())
        ):
            raise ValueError(f"q must lie strictly between 0 and 1, got {q}")
        # (levels, n) or (levels, n, targets)
        found = self._squeeze(self._inverted(levels.reshape(-1, 1, 1)))
        return found if levels.dim() else found[0]

    @checked
    def interval(self, level: Fraction) -> tuple[Tensor, Tensor]:
        """Return the ends of the central interval that holds ``level`` of the probability, as
        `quantile` does.

        For counts it holds at least as much, both ends included.
        """
        low, high = self.quantile([(1 - level) / 2, (1 + level) / 2])
        return low, high

    @checked
    def sample(self, n: Count, seed: Seed) -> Tensor:
        """Draw from the predictive mixture, noise included: ``(n, *mean.shape)``, or labels
        ``(n, rows)``.

        All rows of one sample share a draw of the weights, so that samples are coherent functions
        plus noise.

        Args:
            n: number of samples.
            seed: an int or a generator.

        Raises:
            ValueError: if n is not positive, or the likelihood has no ``sample``.
        """
        generator = as_generator(seed, self.model.device)
        index = torch.multinomial(
            self.log_weights.exp(), n, replacement=True, generator=generator
        )
        return self._sampled(index, generator)

    def _sampled(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Draw targets of the draws ``index`` of the weights."""
        chunks = list(self._chunks(self.theta, index))
        # (n, rows, out): no larger than the result
        outputs = torch.cat([chunk.outputs for chunk in chunks])
        parameters = {
            name: torch.cat([chunk.parameters[name] for chunk in chunks])
            for name in chunks[0].parameters
        }
        chunk = Chunk(chunks[0].likelihood, outputs, parameters, self.log_weights[index])
        return self._squeeze(self._replicated(chunk, generator))

    def _replicated(self, chunk: Chunk, generator: torch.Generator) -> Tensor:
        """Draw y of every draw of the weights, ``(draws, n, targets)``, or labels
        ``(draws, n)``.
        """
        if self.kind == "regression":
            return chunk.likelihood.sample(chunk.outputs, chunk.parameters, generator)
        probs = chunk.likelihood.mean(chunk.outputs, chunk.parameters)
        labels = torch.multinomial(probs.flatten(0, 1), 1, generator=generator)
        return labels.reshape(probs.shape[:2])

    def functions(self) -> Iterator[Tensor]:
        """Yield what each draw predicts on its own, ``(chunk, n, targets)`` or
        ``(chunk, n, classes)``, in order.
        """
        for chunk in self._chunks(self.theta):
            yield chunk.likelihood.mean(chunk.outputs, chunk.parameters)

    def by_draw(
        self, y: Tensor | np.ndarray | None, generator: torch.Generator
    ) -> Iterator[ByDraw]:
        """Yield for each draw what it predicts, targets drawn from that, and the log density of y,
        in order.

        There are no drawn targets where the likelihood has no ``sample``, and no log density
        without y.
        """
        y = None if y is None else self._targets(y)
        for chunk in self._chunks(self.theta):
            likelihood, outputs, parameters, _ = chunk
            yield ByDraw(
                likelihood.mean(outputs, parameters),
                self._replicated(chunk, generator) if likelihood.can_draw else None,
                None if y is None else likelihood.log_prob(outputs, y, parameters),
            )

    @checked
    def targets(self, y: Tensor | np.ndarray) -> Tensor:
        """Return y checked against the inputs: float64 in the shape of ``mean``, or labels
        ``(n,)``.

        Raises:
            ValueError: if it has another number of rows or targets, NaN values, or labels out of
                range.
        """
        y = self._targets(y)
        return y if self.kind == "classification" else self._squeeze(y)

    @checked
    def transforms(self, y: Tensor, seed: Seed) -> Tensor:
        """Return probability integral transforms of several sets of targets, ``(k, *mean.shape)``
        in and out: the mixture's cdf, for counts uniform between those before and after the jump.
        """
        self._require("regression", "transforms")
        y = y.reshape(len(y), *self._moments.mean.shape)
        after = self._cdf(y)
        if self.discrete:
            share = torch.rand(
                after.shape,
                generator=as_generator(seed, after.device),
                dtype=after.dtype,
                device=after.device,
            )
            after = torch.lerp(self._cdf(y - 1), after, share)
        return self._squeeze(after)

    # ---------------------------------------- passes over the draws

    def _chunks(self, theta: Tensor, index: Tensor | None = None) -> Iterator[Chunk]:
        """Yield the outputs of ``theta``, or of its rows ``index``, ``chunk_size`` draws at a
        time.
        """
        index = torch.arange(len(theta)) if index is None else index
        kept = self.outputs
        for rows in index.split(self.chunk_size):
            chosen = theta[rows.to(theta.device)].detach()
            chosen = chosen.to(self.model.device, self.model.dtype)
            with torch.no_grad():
                outputs = (
                    self._evaluate(chosen) if kept is None else kept[rows.to(kept.device)]
                )
                parameters = self.model.likelihood_parameters(chosen.double())
            log_weights = self.log_weights[rows.to(self.log_weights.device)]
            yield Chunk(self.model.likelihood, outputs.double(), parameters, log_weights)

    def _evaluate(self, theta: Tensor) -> Tensor:
        """Return the outputs of the network, ``(k, n, out)``; x was looked at when the prediction
        was made.
        """
        return self.model.density.outputs(theta, self.model.features(self.x))

    def _cdf(self, y: Tensor) -> Tensor:
        """Return the mixture's cdf at several values for every row and target, ``(k, n, targets)``
        in and out.
        """
        total = torch.zeros_like(y)
        for chunk in self._chunks(self.theta):
            weights = chunk.log_weights.exp()
            each = chunk.likelihood.cdfs(chunk.outputs, y, chunk.parameters)
            for values, sums in zip(each, total, strict=True):
                sums += torch.tensordot(weights, values, 1)
        return total

    def _inverted(self, levels: Tensor) -> Tensor:
        """Return the quantiles of ``levels`` ``(k, 1, 1)``, found in the units of the base where
        targets are transformed: a logarithm has moments where the target may have none.
        """
        likelihood = self.model.likelihood
        if isinstance(likelihood, Transformed):
            base = replace(self, model=self.model.untransformed())
            return likelihood.forward(base._inverted(levels))
        return self._invert_counts(levels) if self.discrete else self._invert(levels)

    def _invert(self, levels: Tensor) -> Tensor:
        """Return the quantiles of ``levels`` ``(k, 1, 1)`` for every row and target,
        ``(k, n, targets)``.
        """
        odds = (levels / (1 - levels)).sqrt()
        mean, sd = (
            self._moments.mean,
            (self._moments.between + self._within("quantile")).sqrt(),
        )
        ends = torch.stack([mean - sd / odds, mean + sd * odds])  # (2, k, n, targets)
        # A level gets the passes that its own bracket needs, so that no other level changes its
        # result. (k, 1, 1)
        passes = (((odds + 1 / odds) / _TOLERANCE).log() / math.log(_SECTIONS + 1)).ceil()
        return self._narrowed(ends, levels, passes)

    def _narrowed(self, ends: Tensor, levels: Tensor, passes: Tensor) -> Tensor:
        """Return the quantiles of ``levels`` that lie between ``ends`` ``(2, k, n, targets)``,
        after so many ``passes`` for each, ``(k, 1, 1)``.
        """
        # the cdf at the ends, or bounds
        values = torch.stack([torch.zeros_like(ends[0]), torch.ones_like(ends[0])])
        steps = torch.linspace(
            0, 1, _SECTIONS + 2, dtype=torch.float64, device=ends.device
        )[1:-1].reshape(-1, 1, 1, 1)
        for done in range(int(passes.max())):
            grid = ends[:1] + (ends[1:] - ends[:1]) * steps  # (sections, k, n, targets)
            inside = self._cdf(grid.flatten(0, 1)).reshape(grid.shape)
            below = (inside < levels).sum(0, keepdim=True)  # (1, k, n, targets)
            around = torch.cat([below, below + 1])
            open_ = done < passes
            narrower = torch.cat([ends[:1], grid, ends[1:]]).gather(0, around)
            ends, values = (
                torch.where(open_, narrower, ends),
                torch.where(
                    open_,
                    torch.cat([values[:1], inside, values[1:]]).gather(0, around),
                    values,
                ),
            )
        rise = values[1] - values[0]
        fraction = torch.where(rise > 0, (levels - values[0]) / rise, 0.5).clamp(0, 1)
        return ends[0] + (ends[1] - ends[0]) * fraction

    def _invert_counts(self, levels: Tensor) -> Tensor:
        """Return the least whole numbers whose cdf reaches ``levels`` ``(k, 1, 1)``,
        ``(k, n, targets)``.
        """
        odds = (levels / (1 - levels)).sqrt()
        mean, sd = (
            self._moments.mean,
            (self._moments.between + self._within("quantile")).sqrt(),
        )
        # Cantelli's bracket: the cdf is below the level at `low`, or low is -1, and reaches it at
        # `high`.
        low = (mean - sd / odds).floor().sub(1).clamp(min=-1)
        high = (mean + sd * odds).ceil()  # (k, n, targets)
        return self._narrowed_counts(low, high, levels)

    def _narrowed_counts(self, low: Tensor, high: Tensor, levels: Tensor) -> Tensor:
        """Return the least whole numbers above ``low`` whose cdf reaches ``levels``; that at
        ``high`` does.
        """
        while bool((high - low > 1).any()):
            middle = ((low + high) / 2).floor()
            reached = self._cdf(middle) >= levels
            low, high = (
                torch.where(reached, low, middle),
                torch.where(reached, middle, high),
            )
        return high

    # ---------------------------------------- checks and shapes

    def _targets(self, y: Tensor | np.ndarray) -> Tensor:
        """Return y as the likelihood takes it: float64 ``(n, targets)``, or labels ``(n,)``."""
        y = self.model.targets(y)
        self._check_rows(y)
        if not y.is_floating_point():
            return y
        finite("y", y.to(self.model.dtype))  # no target beyond the range of the outputs
        return y.double()

    def _check_rows(self, y: Tensor) -> None:
        if len(y) != len(self):
            raise ValueError(f"y has {len(y)} rows, the prediction {len(self)}")

    def _require(self, kind: str, what: str) -> None:
        if self.kind != kind:
            raise ValueError(
                f"{what} is defined for {kind}; this is a prediction for {self.kind}"
            )

    def _squeeze(self, values: Tensor) -> Tensor:
        """Drop the axis of a single regression target."""
        return (
            values.squeeze(-1)
            if self.kind == "regression" and values.shape[-1] == 1
            else values
        )


@dataclass(frozen=True, eq=False, repr=False)
class Calibrated(Prediction):
    """A prediction of classes whose probabilities a `Calibration` has made surer, or less sure.

    It has the whole interface of a `Prediction`. What each draw says is moved along: of a class
    that loses probability every draw hands on the same share, to classes that win it in proportion
    to what they win. So the mean over draws is the calibrated probability.

    Attributes:
        calibration: the powers.
    """

    calibration: Calibration

    @cached_property
    def _moved(self) -> Callable[[Tensor], Tensor]:
        """How the probabilities of a draw ``(..., n, classes)`` become others."""
        parts = self.model, self.theta, self.log_weights, self.x, self.chunk_size
        plain = Prediction(*parts, outputs=self.outputs)
        before = plain.probs.clamp(min=TINY)
        after = self.calibration(before.log()).exp()
        kept = (after / before).clamp(max=1)
        won = (after - before).clamp(min=0)
        shares = won / won.sum(-1, keepdim=True).clamp(min=TINY)

        def moved(probs: Tensor) -> Tensor:
            lost = (probs * (1 - kept)).sum(-1, keepdim=True)
            return probs * kept + lost * shares

        return moved

    def _chunks(self, theta: Tensor, index: Tensor | None = None) -> Iterator[Chunk]:
        for chunk in super()._chunks(theta, index):
            probs = self._moved(chunk.likelihood.mean(chunk.outputs, chunk.parameters))
            outputs = probs.clamp(min=TINY).log()
            yield chunk._replace(likelihood=Categorical(), outputs=outputs, parameters={})
