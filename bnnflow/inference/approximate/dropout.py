"""Monte-Carlo dropout: networks with random hidden units left out, as weight vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnnflow.arguments import integer, number, settle
from bnnflow.draws import Draws
from bnnflow.inference.start import Climb, first_points, of_divergence, of_interrupt
from bnnflow.method import Method, Run
from bnnflow.model import BayesianModel
from bnnflow.optimisers import Adam, cosine
from bnnflow.progress import progress_bar, until_interrupted
from bnnflow.weights import WeightSpec

__all__ = ["MCDropout", "dropout_factors"]


@dataclass(frozen=True)
class MCDropout(Method):
    """Train with dropout and keep it on for prediction (Gal and Ghahramani 2016).

    With theta * m the network whose dropped hidden units have their outgoing weights set to zero
    and all others divided by 1 - rate, Adam climbs E_m[log_likelihood(theta * m)] +
    log_prior(theta), and draws are theta * m for new masks m: ordinary weights, so that all that
    follows works on them. Approximates the posterior by the law of theta * m in the sense of the
    paper, a variational family whose width the rate fixes, whatever the data; nothing is left
    invariant, and there is no density. A temperature divides both terms and changes nothing here.

    Every mask is shared by all rows of the data, and each step averages over ``masks`` of them for
    each member.

    In a perceptron every hidden unit may be dropped, at ``rate``, whether or not it has
    ``nn.Dropout`` layers. Any other network, as one of convolutions, says by its own dropout layers
    where and at which rates; it is passed in ``eval()`` mode. Behind convolutions whole channels
    are dropped, as by ``nn.Dropout2d``. A layer whose units are read by other than the linear layer
    or the convolution behind it is refused by name.

    Args:
        rate: probability that a hidden unit of a perceptron is dropped.
        members: networks trained independently, each one chain of the draws; those of ``init`` are
            all trained on.
        steps: Adam steps.
        learning_rate: its first value; a cosine takes it to zero.
        masks: masks in each step.
    """

    refused = ("chains", "warmup", "checkpoint")

    rate: float = 0.1
    members: int = 4
    steps: int = 2000
    learning_rate: float = 0.01
    masks: int = 4

    def __post_init__(self) -> None:
        settle(self, number, "rate", above=0, below=1)
        settle(self, integer, "members", "steps", "masks", least=1)
        settle(self, number, "learning_rate", above=0)

    def draw(self, model: BayesianModel, run: Run) -> Draws:
        """Train the members and draw masks, 250 each unless said otherwise.

        See `bnnflow.sample`.
        """
        run.refuse(self, "members and draws")
        generator, masks = run.generator, self._masks(model)
        start = first_points(model, run.init, self.members, generator)
        climb = Climb(model)
        z = climb.coordinates(start)
        adam, members, objectives = Adam(z), len(z), []
        with (
            torch.no_grad(),
            progress_bar(self.steps, "MC dropout", run.progress, "step") as bar,
            until_interrupted() as taken,
        ):
            for step in range(1, self.steps + 1):
                factors = masks((members, self.masks), generator)
                theta, seen = climb.at(z)
                value, grad = seen(*_objective(model, theta, factors), 1.0)
                objectives.append(value)  # (members,)
                z = adam.step(z, grad, cosine(self.learning_rate, step, self.steps))
                taken.done = step
                bar.update()
        # The objective is noisy: only a fall that no mask explains is a divergence.
        theta = climb.theta(z)
        first, last = objectives[0], objectives[-1]
        lost = ~(last >= first - 1 - first.abs()) | ~theta.isfinite().all(-1)
        theta = torch.where(theta.isfinite().all(-1, keepdim=True), theta, start)
        draws = run.draws or 250
        factors = masks((members, draws), generator)
        theta = theta.unsqueeze(1) * factors  # (members, draws, dim)
        info = {"gradients_per_chain": taken.done * self.masks}
        info |= of_divergence(self, lost, self.learning_rate)
        info |= of_interrupt(self, taken, f"{self.steps} steps")
        return Draws(theta, model.log_joint(theta), info=info)

    def _masks(self, model: BayesianModel) -> _Masks:
        if model.spec.layers and model.spec.widths:
            return lambda shape, generator: dropout_factors(
                model.spec, self.rate, shape, generator, model.dtype
            )
        dropped = () if model.spec.layers else _dropped(model)
        if not dropped:
            raise ValueError(
                "MCDropout needs a perceptron with labelled hidden units, or a network with "
                "nn.Dropout layers (or nn.Dropout2d and their like) in eval() mode and before the "
                "layers whose inputs are dropped"
            )
        return lambda shape, generator: _layer_factors(model, dropped, shape, generator)


_Masks = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""``(shape, generator) -> (*shape, dim)``: multipliers of the weights."""


class _Dropped(NamedTuple):
    """A dropout layer, as what it does to the weights that read its units."""

    weight: str
    units: int
    rate: float

    def factor(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Spread multipliers of units ``(..., units)`` over the weights, ``(..., *shape)``."""
        # a flattened channel has several
        columns = kept.repeat_interleave(shape[1] // self.units, -1)
        return columns.reshape(
            *kept.shape[:-1], 1, shape[1], *[1] * (len(shape) - 2)
        ).expand(*kept.shape[:-1], *shape)


def _dropped(model: BayesianModel) -> tuple[_Dropped, ...]:
    """Find the dropout layers of a network, and the weights that read their units.

    Raises:
        ValueError: naming a layer whose effect is not that of other weights in the next layer.
    """
    net, x = (
        model.network_at(0.5 * model.sample_prior(1, 0)[0]).requires_grad_(False),
        model.x[:4],
    )
    modules, names = (
        dict(net.named_modules()),
        {id(weight): name for name, weight in net.named_parameters()},
    )
    order: list[tuple[str, tuple[int, ...]]] = []

    def note(name: str, module: nn.Module, inputs: Any, out: Tensor) -> None:
        order.append((name, tuple(out.shape)))

    for name, module in modules.items():
        if isinstance(module, (nn.modules.dropout._DropoutNd, *_READERS)):
            module.register_forward_hook(functools.partial(note, name))
    net(x)
    plain = list(order)
    found = []
    for i, (name, shape) in enumerate(plain):
        layer = modules[name]
        if not isinstance(layer, nn.modules.dropout._DropoutNd) or layer.p == 0:
            continue
        reader = next(
            (
                modules[other]
                for other, _ in plain[i + 1 :]
                if isinstance(modules[other], _READERS)
            ),
            None,
        )
        weight = "" if reader is None else names.get(id(reader.weight), "")
        each = _Dropped(weight, shape[1], float(layer.p))
        # which puts other numbers than zeros
        alpha = isinstance(layer, nn.AlphaDropout | nn.FeatureAlphaDropout)
        if (
            alpha
            or reader is None
            or weight not in model.spec.names
            or not _moves(net, x, layer, reader, each)
        ):
            raise ValueError(
                f"MCDropout cannot write dropout module {name!r} as weights: its units must be "
                "read by the linear "
                "layer or the convolution behind it, and by nothing else"
            )
        found.append(each)
    return tuple(found)


_READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _moves(
    net: nn.Module, x: Tensor, layer: nn.Module, reader: nn.Module, dropped: _Dropped
) -> bool:
    """Say whether a mask over a dropout layer's units has the effect of the same mask over its
    reader's weights.
    """
    weight = reader.weight
    assert isinstance(weight, Tensor)
    if dropped.rate == 1 or weight.shape[1] % dropped.units:
        return False
    kept = (torch.arange(dropped.units, device=x.device) % 2).to(weight) / (
        1 - dropped.rate
    )

    def mask(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        return out * kept.reshape(-1, *[1] * (out.dim() - 2))

    hook = layer.register_forward_hook(mask)
    masked = net(x)
    hook.remove()
    before = weight.clone()
    weight.mul_(dropped.factor(kept, tuple(weight.shape)))
    moved = net(x)
    weight.copy_(before)
    return torch.allclose(masked, moved, rtol=1e-3, atol=1e-4 * float(masked.abs().max()))


def _layer_factors(
    model: BayesianModel,
    dropped: tuple[_Dropped, ...],
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> Tensor:
    """Draw masks over the units of dropout layers as multipliers of the weights,
    ``(*shape, dim)``.
    """
    factors = torch.ones(*shape, model.dim, dtype=model.dtype, device=generator.device)
    for each in dropped:
        drawn = torch.rand(*shape, each.units, generator=generator, device=generator.device)
        kept = (drawn >= each.rate).to(model.dtype) / (1 - each.rate)
        factors[..., model.spec.slices[each.weight]] *= each.factor(
            kept, model.spec.shapes[each.weight]
        ).flatten(len(shape))
    return factors


def dropout_factors(
    spec: WeightSpec,
    rate: float,
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Tensor:
    """Draw masks over hidden units as multipliers of the weights, ``(*shape, dim)``.

    The weights that read a unit are multiplied by 0 with probability ``rate``, else by 1 / (1 -
    rate).
    """
    device = generator.device
    kept = {
        label: (torch.rand(*shape, width, generator=generator, device=device) >= rate).to(
            dtype
        )
        / (1 - rate)
        for label, width in sorted(spec.widths.items())
    }
    parts = []
    for name in spec.names:
        factor = torch.ones(*shape, *spec.shapes[name], dtype=dtype, device=device)
        reads = spec.axes[name][1:2]
        if reads and reads[0] is not None:
            factor = factor * kept[reads[0]].unsqueeze(-2)  # (*shape, out, in)
        parts.append(factor.flatten(len(shape)))
    return torch.cat(parts, -1)


def _objective(
    model: BayesianModel, theta: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log prior plus the log likelihood in the mean over multipliers
    ``(members, masks, dim)``, of ``theta`` ``(members, dim)``, and its gradient.
    """
    prior, prior_grad = model.flat_prior.log_prob_and_grad(theta)
    value, grad = model.log_likelihood_and_grad(theta.unsqueeze(1) * factors)
    return value.mean(1) + prior, (grad * factors).mean(1) + prior_grad
