"""The first-order expansion of a network in its weights, with the interface of a network."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from bnnflow.forward_mode import jvp
from bnnflow.model.network import ChainNetwork, ModuleNetwork, Pullback, at_once

__all__ = ["LinearisedNetwork"]


class LinearisedNetwork:
    """outputs(theta, x) = f(x; anchor) + J(x) (theta - anchor), J the Jacobian of ``network`` at
    ``anchor``.

    For inputs ``(n, ...)`` that all networks share the Jacobian is formed once and kept for the
    next call with the same tensor, if it is of moderate size. Otherwise, and with ``per_network``
    for inputs ``(batch, n, ...)``, outputs are a forward-mode derivative and the pullback is the
    network's own at the anchor.

    Args:
        network: what is expanded.
        anchor: ``(dim,)``.
    """

    def __init__(self, network: ChainNetwork | ModuleNetwork, anchor: Tensor) -> None:
        self._network = network
        self._anchor = anchor
        # inputs, their version, outputs, Jacobian
        self._kept: tuple[Tensor, int, Tensor, Tensor] | None = None

    def __call__(self, theta: Tensor, x: Tensor, *, per_network: bool = False) -> Tensor:
        """Return the outputs, ``(batch, n, out)``; affine in ``theta``."""
        if not per_network and (kept := self._expansion(x)):
            outputs, jacobian = kept
            change = theta[:, : jacobian.shape[-1]] - self._anchor[: jacobian.shape[-1]]
            return outputs + (change @ jacobian.flatten(0, 1).mT).unflatten(
                -1, outputs.shape
            )
        # forward-mode differentiation wants memory of its own
        anchors = self._anchor.repeat(len(theta), 1)
        value, change, *_ = jvp(
            lambda weights: self._network(weights, x, per_network=per_network),
            (anchors,),
            (theta - anchors,),
        )
        return value + change

    def pullback(
        self, theta: Tensor, x: Tensor, *, per_network: bool = False, reuse: bool = False
    ) -> tuple[Tensor, Pullback]:
        """Return the outputs and the function that carries a gradient by them back to the
        weights.
        """
        outputs = self(theta, x, per_network=per_network)
        if not per_network and (kept := self._expansion(x)):
            rows = kept[1].flatten(0, 1)  # (n * out, network dim)
            return outputs, lambda grad_outputs: grad_outputs.flatten(1) @ rows
        anchors = self._anchor.expand_as(theta)
        return outputs, self._network.pullback(
            anchors, x, per_network=per_network, reuse=reuse
        )[1]

    def jacobian(
        self,
        theta: Tensor,
        x: Tensor,
        *,
        per_network: bool = False,
        names: Collection[str] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the outputs and their derivative by the weights, ``(batch, n, out, dim)``, the
        same everywhere.
        """
        anchors = self._anchor.expand_as(theta if per_network else theta[:1])
        _, jacobian = self._network.jacobian(
            anchors, x, per_network=per_network, names=names
        )
        return self(theta, x, per_network=per_network), jacobian.expand(
            len(theta), *jacobian.shape[1:]
        )

    def elements(self, x: Tensor) -> int:
        """Return how many numbers one network writes for one row of ``x`` ``(n, ...)``."""
        return self._network.elements(x)

    def at_once(self, x: Tensor, n: int) -> tuple[int, int]:
        """Return how many of ``n`` rows, and networks, fit in a moderate amount of memory.

        The Jacobian of that many rows does, so that it is formed once for all networks.
        """
        with torch.no_grad():
            out = self._network(self._anchor.unsqueeze(0), x[:1]).shape[-1]
        rows = at_once(n, out * len(self._anchor))[0]
        return rows, at_once(rows, 2 * out)[1]

    def _expansion(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return f(x; anchor) ``(n, out)`` and J ``(n, out, network dim)``.

        None where J is large or x not constant.
        """
        kept = self._kept  # once: another thread may put another in its place
        if kept is None or kept[0] is not x or kept[1] != x._version:
            self._kept = None
            wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)  # type: ignore[attr-defined]
            if (
                wrapped
                or x.requires_grad
                or x.is_inference()
                or torch.is_inference_mode_enabled()
            ):
                return None
            with torch.no_grad():
                one = self._network(self._anchor.unsqueeze(0), x[:1])
                if at_once(len(x), one.shape[-1] * len(self._anchor))[0] < len(x):
                    return None
                outputs, jacobian = self._network.jacobian(self._anchor.unsqueeze(0), x)
            self._kept = kept = (x, x._version, outputs[0], jacobian[0])
        return kept[2:]
