"""A posterior as a Pyro model, for Pyro's samplers and guides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from bnnflow.model.priors import Prior
from bnnflow.model.priors.hyperparameters import Hyperparameter
from bnnflow.model.priors.marginals import elementwise, rebuild, unwrapped
from bnnflow.weights import WeightSpec

__all__ = ["pyro_model"]


def pyro_model(
    prior: Prior,
    hyperparameters: Sequence[Hyperparameter],
    spec: WeightSpec,
    log_likelihood: Callable[[Tensor], Tensor],
    temperature: float,
    like: Tensor,
) -> Callable[[], None]:
    """Return a Pyro model with a site for every tensor of weights and every parameter.

    Args:
        prior: of the weights.
        hyperparameters: of the prior, then of the likelihood.
        spec: the layout of ``theta``.
        log_likelihood: ``(..., dim) -> (...)``.
        temperature: of prior and likelihood.
        like: a tensor of the type and on the device of all values.
    """
    import pyro
    from pyro import poutine

    weights = spec.network
    of_prior = [each for each in hyperparameters if each.owner == "prior"]
    of_likelihood = [each for each in hyperparameters if each.owner == "likelihood"]
    fixed = {}
    for each in hyperparameters:
        checked = elementwise(each.name, each.distribution, each.shape, each.positive)
        fixed[each.site] = _site(checked, each.shape, like)
    given = {} if prior.has_parameters else prior.distributions(weights)
    independent = {
        name: _site(
            elementwise(name, each, weights.shapes[name], False), weights.shapes[name], like
        )
        for name, each in given.items()
    }

    def of_weights(values: dict[str, Tensor]) -> dict[str, Any]:
        if not of_prior:
            return independent
        leads = [
            values[each.key].shape[: values[each.key].dim() - len(each.shape)]
            for each in of_prior
        ]
        lead = np.broadcast_shapes(*leads)
        given = prior.conditional(weights, values)
        return {
            name: _site(given[name], shape, like, lead)
            for name, shape in weights.shapes.items()
        }

    def sampled() -> None:
        values = {each.key: pyro.sample(each.site, fixed[each.site]) for each in of_prior}
        sites = of_weights(values)
        params = {name: pyro.sample(name, sites[name]) for name in weights.names}
        for each in of_prior:
            params[each.name] = each.coordinate(values[each.key])
        for each in of_likelihood:
            params[each.name] = each.coordinate(pyro.sample(each.site, fixed[each.site]))
        theta = spec.flatten(params)
        for each in hyperparameters:
            if each.positive:
                # Pyro adds the log-Jacobian of the logarithm untempered, log_joint tempers it with
                # the prior.
                log_jacobian = theta[..., spec.slices[each.name]].sum(-1)
                pyro.factor(f"{each.name}.jacobian", (1 - temperature) * log_jacobian)
        pyro.factor("log_likelihood", log_likelihood(theta))

    return poutine.scale(sampled, scale=1 / temperature)


def _site(
    distribution: Distribution,
    shape: tuple[int, ...],
    like: Tensor,
    lead: tuple[int, ...] = (),
) -> Any:
    """Return the distribution of a whole tensor, ``(*lead, *shape)``, in the type and on the device
    of ``like``.
    """
    import pyro.distributions as dist

    here = rebuild(unwrapped(distribution), lambda v: v.to(like))
    return dist.Independent(here.expand(torch.Size((*lead, *shape))), len(shape))
