"""Our velocity fields from N(0, I) to a posterior, and how they are rebuilt from files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from bnnflow.arguments import Count, Share, Whole, checked, shaped
from bnnflow.compiled import is_tracked
from bnnflow.equivariant import DWSNet, GraphNet, SignedDWSNet, Wiring
from bnnflow.equivariant.network import TimeEmbedding
from bnnflow.seeding import isolated
from bnnflow.transport.amortised_velocity import AmortisedVelocity
from bnnflow.transport.divergence import chained_divergence, divergence
from bnnflow.transport.field import Field
from bnnflow.transport.geometry import TangentVelocity
from bnnflow.transport.paths import AffinePath, Coefficients
from bnnflow.transport.proximal_step import (
    GaussNewton,
    GradientSteps,
    LikelihoodScore,
    ProximalStep,
)
from bnnflow.transport.two_layer import TwoLayerVelocity
from bnnflow.transport.whitened import WhitenedPosterior
from bnnflow.types import Architecture, Parametrisation, Trace
from bnnflow.weights import NO_SYMMETRY, Symmetries, WeightSpec

__all__ = [
    "GaussianVelocity",
    "InformedVelocity",
    "ResidualVelocity",
    "ScoreVelocity",
    "WeightsVelocity",
    "rebuild",
    "restore",
]

# of a Jacobian for each draw of a block, on an accelerator and on a CPU
ELEMENTS = (
    2**27,
    2**21,
)
_LAST = 0.02  # where x1 - x is divided by 1 - t, it is by no less than this


def _symmetries(spec: WeightSpec, architecture: Architecture) -> Symmetries:
    labels = frozenset(spec.widths)
    return Symmetries(
        labels, labels if architecture == "signed" else frozenset(), frozenset()
    )


def _times(t: Tensor, x: Tensor) -> Tensor:
    return t.expand(x.shape[0]).to(x.dtype)


class _OverWeights(Field):
    """A field whose parameters depend on the number of hidden layers, on inputs and outputs, but
    not on widths.
    """

    def on(self, spec: WeightSpec) -> Field:
        """Return the field with the same parameters for weights of other hidden widths.

        Raises:
            ValueError: if the networks differ in more than widths.
        """
        description = self.describe()
        assert description is not None
        return self.lent_to(rebuild(description, spec))


@checked
class WeightsVelocity(_OverWeights):
    """A field that sees weights and time only: the source's own field plus a network over weights.

    v = rest(t) x + net(t, x); the first term is the exact field of a posterior that equals the
    source. Costs no gradient of the likelihood, whatever the size of the data. Equivariant to
    permutations of hidden units, and to their signs if the network is.

    Args:
        spec: the meaning of the weights.
        width: channels of the network.
        depth: blocks of the network.
        architecture: ``"dws"``, a `DWSNet`; ``"signed"``, a `SignedDWSNet`, which also commutes
            with signs of units, where the source keeps them; or ``"graph"``, a `GraphNet`.
        heads: of the messages between units; none in a `DWSNet` and four in a `SignedDWSNet` unless
            said otherwise.
        parametrisation: ``"velocity"``, or ``"x1"``: the network corrects E[x1 | x_t], which is
            then converted, and is trained on the error of that.
        path: the path of the pairs.
    """

    def __init__(
        self,
        spec: WeightSpec,
        width: Count = 64,
        depth: Count = 4,
        *,
        architecture: Architecture = "dws",
        heads: Whole | None = None,
        parametrisation: Parametrisation = "velocity",
        path: AffinePath | None = None,
    ) -> None:
        super().__init__()
        if parametrisation not in ("velocity", "x1"):
            raise ValueError(
                f"parametrisation must be 'velocity' or 'x1', got {parametrisation!r}"
            )
        self.spec, self.symmetries = spec, _symmetries(spec, architecture)
        self.path = path if path is not None else AffinePath()
        self.parametrisation: Parametrisation = parametrisation
        self._config = {
            "width": width,
            "depth": depth,
            "architecture": architecture,
            "heads": heads,
        }
        self.net = _network(spec, 1, width, depth, architecture, heads)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity, ``(batch, dim)``."""
        t = _times(t, x)
        c = Coefficients(*(part.unsqueeze(-1) for part in self.path.coefficients(t)))
        correction = self.net(x.unsqueeze(-1), t).squeeze(-1)
        if self.parametrisation == "x1":
            correction = c.wronskian / c.a.clamp(min=_LAST) * correction
        return c.drift * x + correction

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return what squared errors of the velocity are multiplied by in training, in the shape of
        ``t``.
        """
        if self.parametrisation == "velocity":
            return torch.ones_like(t)
        c = self.path.coefficients(t)
        return (c.a.clamp(min=_LAST) / c.wronskian).square()

    def describe(self) -> dict[str, Any]:
        """Return plain values from which the module is rebuilt."""
        rest = {"parametrisation": self.parametrisation, "path": self.path.describe()}
        return {"kind": "weights"} | self._config | rest


@checked
class ScoreVelocity(Field):
    """The pull of the data alone, without a network: nothing to learn, for any ``nn.Module``.

    With u = log posterior - log N(x; 0, I) the exact marginal field of independent pairs is v =
    drift(t) x + score_gain(t) E[grad u(x1) | x_t] (Stein's identity). The likelihood score w of a
    `ProximalStep` stands for the expectation. Exact where the posterior is Gaussian and the
    proximal step `GaussNewton`.

    Args:
        proximal_step: `GaussNewton` or `GradientSteps`.
        path: the path of the pairs.
        symmetries: those that the likelihood score is equivariant to: of the function, that the
            source keeps.
    """

    def __init__(
        self,
        proximal_step: ProximalStep | None = None,
        path: AffinePath | None = None,
        symmetries: Symmetries = NO_SYMMETRY,
    ) -> None:
        super().__init__()
        self.proximal_steps = (
            proximal_step if proximal_step is not None else GaussNewton(),
        )
        self.path = path if path is not None else AffinePath()
        self.symmetries = symmetries

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity, ``(batch, dim)``.

        ``RuntimeError`` if the field is not bound to a posterior.
        """
        c, _, (score,) = _scores(
            self.path, self.posterior, self.proximal_steps, _times(t, x), x
        )
        return c.drift * x + c.score_gain * score.w

    def closed_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity and its divergence ``(batch,)`` in float64."""

        def closed(
            t: Tensor,
            x: Tensor,
            c: Coefficients,
            known: list[tuple[LikelihoodScore, LikelihoodScore]],
        ) -> tuple[Tensor, Tensor]:
            ((score, by_x),) = known
            trace = by_x.w.diagonal(dim1=1, dim2=2).sum(-1, dtype=torch.float64)
            return c.drift * x + c.score_gain * score.w, c.drift.squeeze(-1) * x.shape[
                -1
            ] + c.score_gain.squeeze(-1) * trace

        return _with_divergence(self, closed, self.proximal_steps, t, x)

    @property
    def informed(self) -> bool:
        """True."""
        return True

    def on(self, spec: WeightSpec) -> ScoreVelocity:
        """Return the field itself, which has no weights of its own."""
        return self

    def describe(self) -> dict[str, Any]:
        """Return plain values from which the module is rebuilt."""
        plain = {"displacement": _plain(*self.proximal_steps), "path": self.path.describe()}
        return {
            "kind": "drive",
            "group": [sorted(each) for each in self.symmetries or NO_SYMMETRY],
        } | plain


@checked
class InformedVelocity(_OverWeights):
    """The likelihood-informed field: the source's own field, the pull of the data, and a learned
    correction.

    As `ScoreVelocity`, with the likelihood score w of one proximal step, or a learned mix of
    several, and a `DWSNet` that sees x, the proximal steps and the gradients and learns what is
    missing: v = drift x + score_gain c(t) w + net(t, x, s w / (1 + 0.05 / s), asinh(s^2 grad)),
    finite at t = 1. Untrained (c adds up to 1, net = 0) it is a sampler of its own. Equivariant to
    permutations of hidden units, and to their signs if the network is.

    Args:
        spec: the meaning of the weights.
        proximal_step: `GradientSteps` or `GaussNewton`, or several to mix.
        width: channels of the network.
        depth: blocks of the network.
        architecture: ``"dws"``, a `DWSNet`; ``"signed"``, a `SignedDWSNet`, which also commutes
            with signs of units, where the source keeps them; or ``"graph"``, a `GraphNet`.
        heads: of the messages between units; none in a `DWSNet` and four in a `SignedDWSNet` unless
            said otherwise.
        path: the path of the pairs.
    """

    def __init__(
        self,
        spec: WeightSpec,
        proximal_step: ProximalStep | Sequence[ProximalStep] | None = None,
        width: Count = 64,
        depth: Count = 4,
        *,
        architecture: Architecture = "dws",
        heads: Whole | None = None,
        path: AffinePath | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.symmetries = spec, _symmetries(spec, architecture)
        given = GradientSteps() if proximal_step is None else proximal_step
        self.proximal_steps = tuple(given) if isinstance(given, Sequence) else (given,)
        if not self.proximal_steps:
            raise ValueError("proximal_step must be one or several, got none")
        self.path = path if path is not None else AffinePath()
        self._config = {
            "width": width,
            "depth": depth,
            "architecture": architecture,
            "heads": heads,
        }
        count = len(self.proximal_steps)
        self.net = _network(spec, 1 + 2 * count, width, depth, architecture, heads)
        self.time = TimeEmbedding(width)
        self.trust = nn.Linear(width, count)
        nn.init.zeros_(self.trust.weight)
        nn.init.constant_(self.trust.bias, 1 / count)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity, ``(batch, dim)``.

        ``RuntimeError`` if the field is not bound to a posterior.
        """
        t = _times(t, x)
        return self.from_precomputed(t, x, *self.precompute(t, x))

    def precompute(self, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Return what of the velocity comes before anything learned: both parts of every score,
        ``(batch, dim)``.
        """
        _, _, scores = _scores(self.path, self.posterior, self.proximal_steps, t, x)
        return tuple(part for score in scores for part in score)

    def closed_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity and its divergence ``(batch,)`` in float64: only the network is
        differentiated.
        """

        def closed(
            t: Tensor,
            x: Tensor,
            c: Coefficients,
            known: list[tuple[LikelihoodScore, LikelihoodScore]],
        ) -> tuple[Tensor, Tensor]:
            parts, jacobians = (
                [part for both in known for part in both[k]] for k in (0, 1)
            )
            return chained_divergence(
                lambda x, *parts: self.from_precomputed(t, x, *parts), x, parts, jacobians
            )

        return _with_divergence(self, closed, self.proximal_steps, t, x)

    def from_precomputed(self, t: Tensor, x: Tensor, *scores: Tensor) -> Tensor:
        """Return the velocity at times ``(batch,)``, given `precompute`."""
        c, s2, _ = _given(self.path, t, x)
        trust = self.trust(self.time(t))
        features, total = [x], torch.zeros_like(x)
        for index, (w, grad) in enumerate(zip(scores[::2], scores[1::2], strict=True)):
            features += [s2 * w / (s2.sqrt() + 0.05), torch.asinh(s2 * grad)]
            total = total + trust[:, index, None] * w
        return (
            c.drift * x
            + c.score_gain * total
            + self.net(torch.stack(features, -1), t).squeeze(-1)
        )

    @property
    def informed(self) -> bool:
        """True."""
        return True

    def bind(self, posterior: WhitenedPosterior | None) -> Self:
        """Return the same field, sharing its weights, with the pull of another model, or of
        none.
        """
        if posterior is not None and posterior.dim != self.spec.dim:
            raise ValueError(
                f"the field is for {self.spec.dim} weights, the model has {posterior.dim}"
            )
        return super().bind(posterior)

    def describe(self) -> dict[str, Any]:
        """Return plain values from which the module is rebuilt."""
        plain = [_plain(each) for each in self.proximal_steps]
        return {
            "kind": "informed",
            "displacement": plain,
            "path": self.path.describe(),
        } | self._config


@checked
class GaussianVelocity(Field):
    """The closed-form field from N(0, I) to N(mean, covariance) along independent pairs.

    v = b' mean + (b b' C + a a' I) (b^2 C + a^2 I)^-1 (x - b mean), by the eigenvectors of C.

    Args:
        mean: ``(dim,)``.
        covariance: ``(dim, dim)``.
        path: the path of the pairs.
    """

    def __init__(
        self, mean: Tensor, covariance: Tensor, path: AffinePath | None = None
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.variances: Tensor
        self.vectors: Tensor
        shaped("mean", mean, None)
        variances, vectors = torch.linalg.eigh(
            shaped("covariance", covariance, len(mean), len(mean))
        )
        self.symmetries = NO_SYMMETRY
        self.path = path if path is not None else AffinePath()
        for name, value in {
            "mean": mean,
            "variances": variances,
            "vectors": vectors,
        }.items():
            self.register_buffer(name, value)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity, ``(batch, dim)``."""
        c, gain = self._gain(_times(t, x).unsqueeze(-1))
        return (
            c.db * self.mean
            + ((x - c.b * self.mean) @ self.vectors * gain) @ self.vectors.T
        )

    def closed_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity and its divergence ``(batch,)`` in float64."""
        _, gain = self._gain(_times(t, x).unsqueeze(-1).double())
        return self(t, x), gain.sum(-1)

    def _gain(self, t: Tensor) -> tuple[Coefficients, Tensor]:
        c = self.path.coefficients(t)
        along = c.b * c.db * self.variances + c.a * c.da
        return c, along / (c.b * c.b * self.variances + c.a * c.a)

    def describe(self) -> dict[str, Any]:
        """Return plain values from which the module is rebuilt."""
        return {"kind": "gaussian", "dim": len(self.mean), "path": self.path.describe()}


@checked
class ResidualVelocity(Field):
    """The closed-form field to a Gaussian fit plus a `DWSNet` that learns what is not Gaussian.

    v = v_Gaussian(t, x) + net(t, x). Worth most for unimodal targets: align the draws first. A
    Gaussian of full covariance keeps no symmetry, and neither does this field.

    Args:
        spec: the meaning of the weights.
        gaussian: the field to the fit; not trained.
        width: channels of the network.
        depth: its blocks.
    """

    def __init__(
        self,
        spec: WeightSpec,
        gaussian: GaussianVelocity,
        width: Count = 64,
        depth: Count = 4,
    ) -> None:
        super().__init__()
        self.spec, self.gaussian = spec, gaussian
        self.symmetries, self.path = NO_SYMMETRY, gaussian.path
        self._config = {"width": width, "depth": depth}
        self.net = _network(spec, 1, width, depth, "dws", 0)

    @classmethod
    @checked
    def fit(
        cls,
        spec: WeightSpec,
        x: Tensor,
        width: Count = 64,
        depth: Count = 4,
        *,
        shrinkage: Share = 1e-2,
        path: AffinePath | None = None,
    ) -> ResidualVelocity:
        """Fit the Gaussian to draws ``(n, dim)`` in the flow's coordinates.

        Args:
            spec: the meaning of the weights.
            x: the draws.
            width: channels of the network.
            depth: its blocks.
            shrinkage: share of the covariance's diagonal that is mixed in.
            path: the path of the pairs.
        """
        if len(shaped("x", x, None, spec.dim)) < 2:
            raise ValueError("x must be two draws or more")
        covariance = torch.cov(x.double().T).reshape(x.shape[-1], x.shape[-1])
        covariance = (1 - shrinkage) * covariance + shrinkage * torch.diag(
            covariance.diagonal()
        )
        gaussian = GaussianVelocity(x.double().mean(0), covariance, path).to(x.dtype)
        return cls(spec, gaussian, width, depth)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity, ``(batch, dim)``."""
        return self.gaussian(t, x) + self._rest(t, x)

    def with_divergence(
        self, t: Tensor, x: Tensor, trace: Trace = "exact", probes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity and its divergence: estimates have no error from the Gaussian
        part.
        """
        known, its_trace = self.gaussian.closed_divergence(t, x)
        rest, estimate = divergence(self._rest, t, x, trace, probes)
        return known + rest, its_trace + estimate

    def _rest(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x.unsqueeze(-1), _times(t, x)).squeeze(-1)

    def describe(self) -> dict[str, Any]:
        """Return plain values from which the module is rebuilt."""
        return {"kind": "residual", "gaussian": self.gaussian.describe()} | self._config


def rebuild(description: dict[str, Any], spec: WeightSpec) -> Field:
    """Build an untrained field from what ``describe`` returned.

    Its random parameters are to be replaced.
    """
    with isolated():
        return _rebuilt(description, spec)


def restore(
    description: dict[str, Any],
    spec: WeightSpec,
    arrays: Mapping[str, np.ndarray],
    dtype: torch.dtype,
) -> Field:
    """Build a field from what ``describe`` returned and the arrays of its state, in evaluation
    mode.

    Raises:
        ValueError: if the description is of a larger field than the arrays are of, before that is
            built.
    """
    _check_sizes(description, arrays)
    velocity = rebuild(description, spec).to(dtype).requires_grad_(False)
    velocity.load_state_dict(
        {name: torch.from_numpy(values) for name, values in arrays.items()}
    )
    return velocity.eval()


def _check_sizes(description: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ``ValueError`` unless the numbers that a field is built from are those of its arrays.

    Every block has arrays of its own, every field a square matrix of its width (and a Gaussian one
    of its dimension).
    """
    elements = sum(values.size for values in arrays.values())
    largest = {
        "depth": len(arrays),
        "width": math.isqrt(elements),
        "heads": elements,
        "dim": elements,
        "newton": elements,
    }
    if description.get("kind") == "gaussian":
        largest["dim"] = math.isqrt(elements)
    for name, most in largest.items():
        value = description.get(name)
        if value is not None and (type(value) is not int or not 0 <= value <= most):
            raise ValueError(
                f"a field of {name} {value!r} has more numbers than the {elements} of the file"
            )
    for part in ("gaussian", "base"):
        if description.get(part) is not None:
            _check_sizes(description[part], arrays)


def _rebuilt(description: dict[str, Any], spec: WeightSpec) -> Field:
    values = dict(description)
    kind = values.pop("kind")
    if "path" in values:
        values["path"] = AffinePath(**values["path"])
    if "displacement" in values:
        plain = values.pop("displacement")
        made = [
            _proximal_step(each) for each in ([plain] if isinstance(plain, dict) else plain)
        ]
        values["proximal_step"] = made[0] if len(made) == 1 else made
    if kind == "weights":
        return WeightsVelocity(spec, **values)
    if kind == "informed":
        return InformedVelocity(spec, **values)
    if kind == "drive":
        symmetries = Symmetries(*(frozenset(each) for each in values.pop("group")))
        return ScoreVelocity(**values, symmetries=symmetries)
    if kind == "gaussian":
        dim = values.pop("dim")
        return GaussianVelocity(torch.zeros(dim), torch.eye(dim), **values)
    if kind == "residual":
        gaussian = _rebuilt(values.pop("gaussian"), spec)
        return ResidualVelocity(spec, gaussian, **values)  # type: ignore[arg-type]
    if kind == "tangent":
        return TangentVelocity(spec, **values)
    if kind == "amortised":
        return AmortisedVelocity(spec, **values)
    if kind == "two_layer":
        base = values.pop("base")
        return TwoLayerVelocity(
            **values, base=None if base is None else _rebuilt(base, spec)
        )
    raise ValueError(f"unknown velocity {kind!r}")


def _network(
    spec: WeightSpec,
    features: int,
    width: int,
    depth: int,
    architecture: Architecture,
    heads: int | None,
) -> DWSNet | SignedDWSNet | GraphNet:
    if architecture == "dws":
        return DWSNet(
            spec,
            features,
            1,
            width,
            depth,
            time=True,
            wiring=Wiring(heads=0 if heads is None else heads),
        )
    if architecture == "signed":
        return SignedDWSNet(
            spec, features, 1, width, depth, time=True, heads=4 if heads is None else heads
        )
    if architecture == "graph":
        return GraphNet(spec, features, 1, width, depth, time=True)
    raise ValueError(
        f"architecture must be 'dws', 'signed' or 'graph', got {architecture!r}"
    )


def _scores(
    path: AffinePath,
    posterior: WhitenedPosterior | None,
    proximal_steps: Sequence[ProximalStep],
    t: Tensor,
    x: Tensor,
) -> tuple[Coefficients, Tensor, list[LikelihoodScore]]:
    """Return the coefficients and s^2 at each time, ``(batch, 1)``, and the likelihood score of
    every proximal step.
    """
    if posterior is None:
        raise RuntimeError("a likelihood-informed velocity must be bound to a model first")
    c, s2, mu = _given(path, t, x)
    return c, s2, [proximal_step(posterior, mu, s2) for proximal_step in proximal_steps]


def _given(path: AffinePath, t: Tensor, x: Tensor) -> tuple[Coefficients, Tensor, Tensor]:
    """Return the coefficients and s^2 at each time, ``(batch, 1)``, and mu: what x_t says of x1
    without the data.
    """
    c = Coefficients(*(part.unsqueeze(-1) for part in path.coefficients(t)))
    return c, c.a * c.a / c.q, x * c.b / c.q


def _with_divergence(
    field: ScoreVelocity | InformedVelocity,
    closed: Callable[
        [Tensor, Tensor, Coefficients, list[tuple[LikelihoodScore, LikelihoodScore]]],
        tuple[Tensor, Tensor],
    ],
    proximal_steps: Sequence[ProximalStep],
    t: Tensor,
    x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the velocity and its divergence, by automatic differentiation where there is no other
    way.

    That is where a likelihood score does not know its Jacobian, and where derivatives of the result
    are wanted.

    Args:
        field: whose.
        closed: makes both of the scores and their Jacobians by x.
        proximal_steps: of the field.
        t: a scalar or ``(batch,)``.
        x: ``(batch, dim)``.
    """
    if field.posterior is None or is_tracked(t, x, *field.parameters()):
        return divergence(lambda t, z: field(t, z), t, x)
    rows, parts = max(1, ELEMENTS[x.device.type == "cpu"] // x.shape[-1] ** 2), []
    for t_part, x_part in zip(_times(t, x).split(rows), x.split(rows), strict=True):
        c, s2, mu = _given(field.path, t_part, x_part)
        known = []
        for proximal_step in proximal_steps:
            found = proximal_step.with_jacobians(field.posterior, mu, s2)
            if found is None:
                return divergence(lambda t, z: field(t, z), t, x)
            score, by_mu = found
            known.append(
                (
                    score,
                    LikelihoodScore(
                        *(jacobian.mul_((c.b / c.q).unsqueeze(-1)) for jacobian in by_mu)
                    ),
                )
            )
        parts.append(closed(t_part, x_part, c, known))
    values, traces = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(traces)


def _plain(proximal_step: ProximalStep) -> dict[str, Any]:
    return {"kind": type(proximal_step).__name__} | vars(proximal_step)


def _proximal_step(plain: dict[str, Any]) -> ProximalStep:
    families: dict[str, Callable[..., ProximalStep]] = {
        "GradientSteps": GradientSteps,
        "GaussNewton": GaussNewton,
    }
    values = dict(plain)
    kind = values.pop("kind")
    if kind == "GradientSteps" and "memory" not in values:
        raise ValueError(
            "this flow was fitted on gradient steps without momentum, which are no "
            "more: fit it again"
        )
    return families[kind](**values)
