"""Losses of networks that keep statistics beside their weights, as batch normalisation does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bnnflow.weights import WeightSpec

__all__ = ["NetworkLoss"]


class NetworkLoss:
    """The loss of networks ``(..., dim)`` of one architecture, each with running statistics of its
    own.

    Weights alone do not say what a network with batch normalisation computes. The networks given
    here are evaluated with the statistics that they have, so that the ends of a path between them
    have their own losses. Any other, on the way from one to another or an average of some, gets the
    statistics of its own activations, as in Garipov et al. (2018) and Jordan et al. (2023,
    "REPAIR"). It is a `Loss` for `barrier`, `fit_curve` and `loss_plane`; networks are evaluated
    one after the other.

    Args:
        networks: modules that differ in free parameters and running statistics alone.
        loss: from outputs and ``y`` to one number.
        x: inputs, ``(n, ...)``.
        y: targets.
        statistics: rows whose activations give the statistics, best those of training where ``x``
            is none of them; by default ``x`` itself, and gradients then see how the statistics
            change with the weights.

    Attributes:
        weights: of the networks, ``(networks, dim)``.

    Raises:
        ValueError: if the networks differ in anything else, with its name, or there are fewer than
            two rows.

    Example:
        >>> from torch import nn
        >>> layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)
        >>> a, b = (torch.nn.Sequential(*copy.deepcopy(layers)) for _ in range(2))
        >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
        >>> loss = NetworkLoss([a, b], nn.functional.mse_loss, x, y)
        >>> loss(loss.weights).shape, loss(loss.weights.mean(0)).shape
        (torch.Size([2]), torch.Size([]))
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        *,
        statistics: Tensor | None = None,
    ) -> None:
        if len(networks) == 0:
            raise ValueError("networks is empty")
        self._net = copy.deepcopy(networks[0]).eval()
        self._spec = WeightSpec.unlabelled(self._net)
        self._loss, self._x, self._y, self._rows = loss, x, y, statistics
        norms = {
            name: module
            for name, module in self._net.named_modules()
            if isinstance(module, _NormBase)
        }
        tracked = {
            name: module
            for name, module in norms.items()
            if module.running_mean is not None
        }
        if tracked and min(len(x), len(x if statistics is None else statistics)) < 2:
            raise ValueError("statistics need at least two rows")
        moving = {
            f"{name}.{each}".removeprefix(".")
            for name, module in tracked.items()
            for each in _buffers(module)
        }
        self._buffers = [
            _checked(self._net, network, self._spec, moving) for network in networks
        ]
        self.weights = torch.stack(
            [self._spec.flatten(_free(network, self._spec)) for network in networks]
        )
        self._check_distinct()
        # normalises by its rows, and keeps their statistics
        self._learner = copy.deepcopy(self._net)
        for name in tracked:
            module = self._learner.get_submodule(name).train()
            module.momentum = 1.0  # type: ignore[assignment]
        self._tracks = bool(tracked)
        for module in (self._net, self._learner):
            module.requires_grad_(False)

    def __call__(self, theta: Tensor) -> Tensor:
        """Return the losses of networks ``(..., dim)``, ``(...)``.

        Raises:
            ValueError: if the last axis is not ``dim`` long.
        """
        self._spec.check(theta)
        losses = [self._one(each) for each in theta.reshape(-1, self._spec.dim)]
        return torch.stack(losses).reshape(theta.shape[:-1])

    def _check_distinct(self) -> None:
        """Refuse networks that only their statistics tell apart: weights would not say which of
        them is meant.
        """
        for number, weights in enumerate(self.weights):
            first = int((self.weights == weights).all(1).nonzero()[0])
            for name, buffer in self._buffers[number].items():
                if not torch.equal(buffer, self._buffers[first][name]):
                    raise ValueError(
                        f"networks {first} and {number} have the same weights, but {name} differs"
                    )

    def network(self, theta: Tensor) -> nn.Module:
        """Return a network ``(dim,)`` as a module, with its statistics."""
        self._spec.check(theta)
        if theta.dim() != 1:
            raise ValueError(f"theta must be ({self._spec.dim},), got {tuple(theta.shape)}")
        buffers = self._own(theta) or self._measured(theta)
        net = copy.deepcopy(self._net)
        net.load_state_dict(
            {**net.state_dict(), **self._spec.unflatten(theta.detach()), **buffers}
        )
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name in self._spec.shapes)
        return net

    def _one(self, theta: Tensor) -> Tensor:
        params, own = self._spec.unflatten(theta), self._own(theta)
        if own is None and self._tracks and self._rows is None:
            learner = {**params, **self._fresh()}
            return self._loss(
                torch.func.functional_call(self._learner, learner, (self._x,)), self._y
            )
        buffers = self._measured(theta) if own is None else own
        return self._loss(
            torch.func.functional_call(self._net, {**params, **buffers}, (self._x,)),
            self._y,
        )

    def _own(self, theta: Tensor) -> dict[str, Tensor] | None:
        """Return the statistics that came with a network."""
        found = (self.weights == theta.detach()).all(1).nonzero().flatten()
        return self._buffers[int(found[0])] if len(found) else None

    def _measured(self, theta: Tensor) -> dict[str, Tensor]:
        """Return the statistics of a network's activations."""
        buffers = self._fresh()
        rows = self._x if self._rows is None else self._rows
        with torch.no_grad():
            torch.func.functional_call(
                self._learner, {**self._spec.unflatten(theta.detach()), **buffers}, (rows,)
            )
        return buffers

    def _fresh(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self._learner.named_buffers()}


def _buffers(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_buffers(recurse=False)]


def _free(net: nn.Module, spec: WeightSpec) -> dict[str, Tensor]:
    return {
        name: each.detach() for name, each in net.named_parameters() if name in spec.shapes
    }


def _checked(
    net: nn.Module, other: nn.Module, spec: WeightSpec, moving: set[str]
) -> dict[str, Tensor]:
    """Return copies of another network's buffers, if it differs in free parameters and statistics
    alone.
    """
    ours, theirs = net.state_dict(), other.state_dict()
    shapes, others = (
        {n: tuple(t.shape) for n, t in state.items()} for state in (ours, theirs)
    )
    if shapes != others:
        name = sorted(shapes.items() ^ others.items())[0][0]
        raise ValueError(
            f"the networks are of different architectures: {name} is not the same "
            "tensor in all of them"
        )
    for name in ours.keys() - spec.shapes.keys() - moving:
        if not torch.equal(ours[name], theirs[name]):
            raise ValueError(
                f"{name} differs between the networks, and is neither a weight nor a "
                "running statistic"
            )
    return {name: buffer.clone() for name, buffer in other.named_buffers()}
