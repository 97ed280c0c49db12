"""What a model is made of, checked before any work starts: modules, parameters and data."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnnflow.arguments import columns_of, finite, tensor
from bnnflow.model.likelihood import Likelihood
from bnnflow.model.log_joint import LogJoint
from bnnflow.model.priors.marginals import validated
from bnnflow.model.probe import check_outputs, probe_fisher_factor, probe_likelihood
from bnnflow.seeding import isolated
from bnnflow.weights import free_parameters

__all__ = [
    "accepted",
    "check_alike",
    "check_columns",
    "check_informative",
    "check_likelihood",
    "check_network",
    "checked_data",
    "copied",
    "new_inputs",
    "new_targets",
    "of_torch",
    "outputs_of",
    "placed",
]


def check_network(net: nn.Module) -> nn.Parameter:
    """Return the first of the parameters to be inferred.

    Raises:
        ValueError: for layers that mix rows or are random, and for parameters that cannot be
            inferred.
    """
    _check_modules(net)
    parameter = next(iter(free_parameters(net).values()))
    _check_parameters(net)
    _check_gradients(net)
    return parameter


def accepted(net: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return training inputs in the type that a network takes, and its number of outputs."""
    whole = not (x.is_floating_point() or x.dtype == torch.bool)
    try:
        outputs = outputs_of(net, x.to(dtype))
    except ValueError:
        if not whole:
            raise
        x = x if x.dtype == torch.int32 else x.long()  # the two that torch takes as indices
        return x, outputs_of(net, x)
    return placed("x", x if x.is_floating_point() else x.double(), x.device, dtype), outputs


def outputs_of(net: nn.Module, x: Tensor) -> int:
    """Run rows through a network and return its number of outputs."""
    # any index may be beyond the table of an embedding
    rows = x[:2] if x.is_floating_point() else x
    zeros = {name: torch.zeros_like(value) for name, value in free_parameters(net).items()}
    try:
        with torch.no_grad(), isolated():
            outputs = torch.func.functional_call(net, zeros, (rows.clone(),))
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit net: {error}"
        ) from error
    return check_outputs(outputs, len(rows)).shape[-1]


def check_columns(name: str, x: Any, training: tuple[str, ...]) -> None:
    """Raise ``ValueError`` if new inputs are a frame whose columns are not those of training."""
    columns = columns_of(x)
    if columns and training and columns != training:
        said = (", ".join(map(repr, names)) for names in (training, columns))
        raise ValueError(
            "{} must have the columns of training, {}, got {}".format(name, *said)
        )


def new_inputs(name: str, x: Tensor | np.ndarray, training: Tensor) -> Tensor:
    """Return new inputs as a tensor of the type and on the device of those of training."""
    x = tensor(name, x, device=training.device)
    if not training.is_floating_point() and (
        x.is_floating_point() or x.dtype == torch.bool
    ):
        raise ValueError(f"{name} must hold integers as in training, got {x.dtype}")
    x = x.to(training.dtype)
    if x.dim() == 0 or x.shape[1:] != training.shape[1:]:
        raise ValueError(
            f"{name} must be (n, {', '.join(map(str, training.shape[1:]))}) as in training, got "
            f"{tuple(x.shape)}"
        )
    if len(x) == 0:
        raise ValueError(f"{name} has no rows")
    return finite(name, x)


def new_targets(
    name: str, y: Tensor | np.ndarray, likelihood: Likelihood, n_outputs: int
) -> Tensor:
    """Return new targets as a tensor that the likelihood has validated."""
    y = tensor(name, y)
    if y.dim() == 0 or len(y) == 0:
        raise ValueError(f"{name} has no rows")
    y = finite(name, y)
    try:
        return likelihood.validate(y, n_outputs)
    except ValueError as error:
        raise ValueError(str(error) if name == "y" else f"{name}: {error}") from None


def check_alike(net: nn.Module, own: nn.Module, inferred: Collection[str]) -> None:
    """Raise ``ValueError`` unless a network has the shapes of a model's own, and its constants.

    Args:
        net: a trained network.
        own: the model's.
        inferred: names of the parameters whose values may differ.
    """
    given = dict(net.named_parameters())
    for name, parameter in own.named_parameters():
        if name not in given or given[name].shape != parameter.shape:
            raise ValueError(
                f"net does not fit the model: {name} must be {tuple(parameter.shape)}"
            )
    theirs = given | dict(net.named_buffers())
    for name, constant in (*own.named_parameters(), *own.named_buffers()):
        if name in inferred or name.endswith("num_batches_tracked"):
            continue
        if name not in theirs or not torch.equal(
            theirs[name].detach().to(constant), constant
        ):
            raise ValueError(
                f"{name} is a constant of the model (a parameter with requires_grad=False, or a "
                "buffer), but "
                "differs in the network; make the model from the network that has the right one"
            )


def check_likelihood(density: LogJoint) -> None:
    """Let a likelihood see all targets once, with torch's checks, and probe it if it is a caller's
    own.
    """
    likelihood, y = density.likelihood, density.y
    theta = torch.zeros(1, density.dim, dtype=density.dtype, device=density.device)
    parameters = density.parameters(theta)
    with torch.no_grad(), isolated():
        outputs = density.network(theta, density.x[:1]).expand(-1, len(y), -1)
        try:
            with validated():
                likelihood.log_prob(outputs, y, parameters)
        except ValueError as error:
            if "support" in str(error):
                raise ValueError(f"y does not fit {likelihood.name}: {error}") from error
        except RuntimeError:  # what is wrong is said below
            pass
    if not type(likelihood.given).__module__.startswith("bnnflow."):
        shapes = {name: tuple(each.shape[1:]) for name, each in parameters.items()}
        probe_likelihood(density.log_prob, density.score, y[:4], density.n_outputs, shapes)
        if likelihood.has_fisher_factor:
            probe_fisher_factor(likelihood, density.n_outputs, shapes)


def placed(name: str, data: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Move data; integers stay integers, other numbers are rounded to ``dtype`` if they can be told
    apart in it.
    """
    if data.is_floating_point():
        _check_rounding(name, data, dtype)
        data = data.to(dtype)
        finite(name, data)
    return data.to(device)


def of_torch(module: nn.Module) -> bool:
    """Say whether a module is one of torch's own."""
    return type(module).__module__.startswith("torch.nn.modules.")


def _check_modules(net: nn.Module) -> None:
    for name, module in net.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._NormBase):
            per_row = (
                isinstance(module, nn.modules.instancenorm._InstanceNorm)
                and not module.track_running_stats
            )
            constant = (
                module.track_running_stats
                and module.running_mean is not None
                and not module.training
            )
            if not (per_row or constant):
                raise ValueError(
                    f"module {name!r} ({kind}) makes a row's output depend on the other rows, so "
                    "there is no "
                    "likelihood of single rows; use LayerNorm or GroupNorm, or call net.eval() on "
                    "a network with running statistics, which are then constants"
                )
        chance = (
            module.dropout
            if isinstance(module, nn.MultiheadAttention)
            else getattr(module, "p", 0)
        )
        random = (
            isinstance(module, nn.modules.dropout._DropoutNd | nn.MultiheadAttention)
            and module.training
        )
        if random and chance > 0:
            raise ValueError(
                f"module {name!r} ({kind}) is random in training mode; call net.eval() or remove it"
            )


def _check_gradients(net: nn.Module) -> None:
    """Refuse modules of torch whose weights cannot be exchanged, or whose gradient is not the
    outputs' derivative.
    """
    for name, module in net.named_modules():
        kind = f"module {name!r} ({type(module).__name__})"
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            raise ValueError(
                f"{kind} is recurrent, and torch's code for it takes one set of weights only; "
                "write its cell with "
                "Linear layers, in a loop over time, or, if its weights are constants, give its "
                "outputs as x"
            )
        if (
            not isinstance(module, nn.Embedding | nn.EmbeddingBag)
            or not module.weight.requires_grad
        ):
            continue
        if module.padding_idx is not None:
            raise ValueError(
                f"{kind} has padding_idx={module.padding_idx}: that row would be inferred, but "
                "torch gives it no "
                "gradient; make the embedding without it and mask what is padded, or make its "
                "weight a constant by requires_grad_(False)"
            )
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(module, option):
                raise ValueError(
                    f"{kind} has {option}={getattr(module, option)}, which changes its weights or "
                    "its gradient "
                    "behind the back of the inference; make it without"
                )


def copied(net: nn.Module) -> nn.Module:
    """Return a copy, so that the caller's network may change later."""
    try:
        return copy.deepcopy(net)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"net cannot be copied: {error}. Pruning and the old weight_norm keep computed weights "
            "as attributes: take "
            "torch.nn.utils.prune.remove, and torch.nn.utils.parametrizations"
        ) from error


def _check_parameters(net: nn.Module) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
        raise ValueError(
            "net is compiled by torch.jit, which keeps its own weights: give the module that it "
            "was made of"
        )
    kinds = {parameter.dtype: name for name, parameter in free_parameters(net).items()}
    if len(kinds) > 1 or not all(kind.is_floating_point for kind in kinds):
        said = ", ".join(f"{name!r} of {kind}" for kind, name in kinds.items())
        raise ValueError(f"net must have parameters of one floating-point type, got {said}")
    for name, parameter in net.named_parameters():
        if parameter.numel() == 0:
            raise ValueError(
                f"net: {name!r} has no elements, {tuple(parameter.shape)}: a layer without inputs "
                "or units"
            )


def checked_data(x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Return copies, so that both may change later."""
    x, y = (tensor(name, values).clone() for name, values in (("x", x), ("y", y)))
    if x.dim() < 2:
        raise ValueError(f"x must be (n, ...) with at least two axes, got {tuple(x.shape)}")
    if len(x) == 0:
        raise ValueError("x has no rows")
    if y.dim() == 0 or len(x) != len(y):
        raise ValueError(
            f"y must have a value for each of the {len(x)} rows of x, got shape {tuple(y.shape)}"
        )
    finite("x", x)
    finite("y", y)
    return x, y


def _check_rounding(name: str, values: Tensor, dtype: torch.dtype) -> None:
    """Raise where rounding to ``dtype`` would blur what tells rows apart: large numbers that vary
    by little.
    """
    if values.dtype == dtype or not bool(values.to(dtype).isfinite().all()):
        return
    columns = values.reshape(len(values), -1).double()
    error = torch.stack(
        [(part.to(dtype).double() - part).abs().amax(0) for part in columns.split(4096)]
    ).amax(0)
    size = columns.abs().amax(0)
    spread = columns.std(0, correction=0)
    # the second for data of mean 0 in sixteen bits
    share = max(1e-3, 16 * torch.finfo(dtype).eps)
    # A column that varies in the last digits of float64 alone is a constant.
    lost = ((error > share * spread) & (spread > 1e-14 * size)).nonzero().flatten()
    if len(lost):
        column = int(lost[0])
        raise ValueError(
            f"{name} cannot be told apart in {dtype}: column {column} varies by "
            f"{spread[column]:.3g} around values up to {size[column]:.3g}, which rounding changes "
            f"by up to {error[column]:.3g}; standardise it, or make the "
            "network one of float64 by net.double()"
        )


def check_informative(y: Tensor) -> None:
    """Raise unless the training targets vary."""
    columns = y.reshape(len(y), -1)
    constant = (columns == columns[:1]).all(0).nonzero().flatten()
    if len(y) > 1 and len(constant):
        column = int(constant[0])
        what = f"holds only the value {columns[0, column].item():g}" + (
            f" in column {column}" if y.dim() > 1 else ""
        )
        raise ValueError(
            f"y {what}: there is nothing to learn from a constant target or a single class"
        )
