"""Weight space: named tensors as one flat vector, the label of every axis, and the symmetry group
that follows.

The layout of ``theta`` is the order of ``net.named_parameters()``, each tensor row-major, followed
by whatever a model appends (prior and likelihood parameters). Parameters with
``requires_grad=False`` are constants of the network and no part of it. Every axis of a tensor
carries the label of the hidden layer whose units it indexes, or None. Axis 0 is the side of the
units themselves (their incoming weights and biases), axis 1 the side of those who read them (their
outgoing weights). Everything else here follows from the labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bnnflow.activations import Activation
from bnnflow.arguments import checked, tracked
from bnnflow.seeding import as_generator
from bnnflow.tracing import Layer, trace
from bnnflow.types import Seed

__all__ = ["NO_SYMMETRY", "Layer", "Symmetries", "WeightSpec"]


_LARGEST = 2**27
"""Weights of a space that is read from a file: tables of its entries are built before anything else
is known.
"""


class Symmetries(NamedTuple):
    """The hidden layers (by label) whose units may be permuted, flipped in sign, rescaled, or
    shifted in phase.
    """

    permutation: frozenset[str] = frozenset()
    sign: frozenset[str] = frozenset()
    scale: frozenset[str] = frozenset()
    phase: frozenset[str] = frozenset()


NO_SYMMETRY = Symmetries()


@dataclass(frozen=True, repr=False)
class WeightSpec:
    """What every entry of a flat weight vector means.

    Attributes:
        names: tensor names in the order of the flat vector.
        shapes: shape of each tensor.
        axes: a label or None for each axis of each tensor.
        activations: the activation of each hidden layer, by label, in the order of depth; all
            functions that its units meet, where they are several.
        layers: the affine layers in order, where the network is a chain of them, all free; empty
            otherwise.
        extras: the tensors that a model appended to the network's own.
        neutral: labelled axes (tensor, axis) that permutations move, but signs, scales and phases
            leave alone: what is written before a normalisation and read by it, and the kernels of
            depthwise convolutions.
        transposed: tensors whose second axis is the side of the units that they write, and the
            first that of those that they read: tables of embeddings, kernels of transposed
            convolutions.
        unknown: why the symmetries are not known, where the network could not be labelled; empty
            where they are, be there some or none.
        unusual: `fan_in` of the tensors whose shape does not say it.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> spec = WeightSpec.of(net)
        >>> spec
        WeightSpec(dim=131, tensors=4, symmetries: h1 of 16 units (permutation, sign))
        >>> spec.axes["0.weight"], spec.axes["2.weight"]
        (('h1', None), (None, 'h1'))
    """

    names: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, tuple[str | None, ...]]
    activations: dict[str, Activation]
    layers: tuple[Layer, ...] = ()
    extras: tuple[str, ...] = ()
    scale_free_axes: frozenset[tuple[str, int]] = frozenset()
    unknown: str = ""
    transposed: frozenset[str] = frozenset()
    unusual: dict[str, float | None] = field(default_factory=dict, compare=False)

    @classmethod
    @checked
    def of(cls, net: nn.Module) -> WeightSpec:
        """Label the weights of a network.

        The forward pass is traced, so nested ``Sequential``s and classes with a ``forward`` of
        their own are understood, as long as data flow through ``Linear`` layers, embeddings,
        convolutions, transposed ones too (of one group, or depthwise), elementwise activations,
        pooling, padding, upsampling and averages over space, additions, products with numbers, and
        LayerNorm, RMSNorm, GroupNorm with one group or a group for every channel, and InstanceNorm,
        in any shape (``Flatten``, ``Unflatten``, ``view``, ``permute`` and the like) that keeps
        units apart. Inputs may be computed with before in any way that has no weights. Added layers
        share one label; what is added to inputs, and outputs, have none. Channels that are
        flattened make blocks, see `unit_axes`. A chain of ``Linear`` layers has ``layers``, too.

        The first axis of the data is taken to run over rows. A view of shape (-1, k) is taken to
        keep the rows apart.

        Units that pass a norm have signs and scales behind it only, where its own weights can take
        them up; units that meet no such weights have permutations only. Units that a constant
        tensor writes or reads have no label unless it is the same for all of them: nothing could
        undo there what is done to the rest of their weights.

        Args:
            net: any depth, one linear layer included, with or without biases.

        Raises:
            ValueError: if no parameter is free; naming the first module, operation or parameter
                that cannot be labelled: BatchNorm (whose statistics belong to units, but not to
                theta), weights that are used twice, groups of channels, attention, and all that is
                unknown.
        """
        found = trace(net)
        shapes = _shapes(net)
        every = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
        axes = {name: found.axes[name] for name in every}
        spec = cls(
            tuple(every),
            every,
            axes,
            found.activations,
            found.layers,
            (),
            found.scale_free_axes,
            "",
            found.transposed,
        )
        spec = replace(spec, unusual=_unusual_fan_ins(net))
        constants = {
            name: each.detach()
            for name, each in net.named_parameters()
            if name not in shapes
        }
        return spec._without(constants) if constants else spec

    def _without(self, constants: Mapping[str, Tensor]) -> WeightSpec:
        """Return the space without tensors that are constants, and the symmetries that these
        leave.
        """
        pinned: set[str] = set()
        activations = dict(self.activations)
        for name, value in constants.items():
            acted = {
                label
                for label, power in zip(
                    self.unit_axes(name)[1], self.scale_exponents(name), strict=True
                )
                if power
            }
            for label in set(self.axes[name]) - {None}:
                assert label is not None
                perms = generators_of_permutations(self.widths[label])
                if not all(
                    torch.equal(value, reordered(value, self.axes[name], label, perm))
                    for perm in perms
                ):
                    pinned.add(label)
                # permutations keep it, but neither signs nor scales
                elif label in acted and bool(value.any()):
                    activations[label] = Activation(f"{activations[label].name} + norm")
        kept = [name for name in self.names if name not in constants]
        axes = {
            name: tuple(None if label in pinned else label for label in self.axes[name])
            for name in kept
        }
        return replace(
            self,
            names=tuple(kept),
            shapes={name: self.shapes[name] for name in kept},
            axes=axes,
            activations={
                label: f for label, f in activations.items() if label not in pinned
            },
            layers=(),
            scale_free_axes=frozenset(
                (name, axis)
                for name, axis in self.scale_free_axes
                if name in axes and axes[name][axis]
            ),
            transposed=self.transposed.intersection(kept),
        )

    @classmethod
    @checked
    def unlabelled(
        cls, net: nn.Module, unknown: str = "its weights have no labels"
    ) -> WeightSpec:
        """Describe the weights of any network without a label.

        Args:
            net: any module.
            unknown: why its symmetries are not known; empty says that it is known to have none.
        """
        shapes = _shapes(net)
        axes: dict[str, tuple[str | None, ...]] = {
            name: (None,) * len(shape) for name, shape in shapes.items()
        }
        transposed = shapes.keys() & {
            f"{name}.weight".removeprefix(".")
            for name, module in net.named_modules()
            if isinstance(module, _TRANSPOSED)
        }
        return cls(
            tuple(shapes),
            shapes,
            axes,
            {},
            transposed=frozenset(transposed),
            unknown=unknown,
            unusual=_unusual_fan_ins(net),
        )

    @checked
    def extend(
        self,
        extras: Mapping[str, tuple[int, ...]],
        axes: Mapping[str, tuple[str | None, ...]] | None = None,
    ) -> WeightSpec:
        """Append tensors such as the parameters of a likelihood.

        Args:
            extras: their shapes, by name.
            axes: labels of those that are permuted with hidden units; signs and scales never act on
                them.
        """
        axes = axes or {}
        return replace(
            self,
            names=self.names + tuple(extras),
            shapes=self.shapes | dict(extras),
            axes=self.axes
            | {
                name: axes.get(name, (None,) * len(shape)) for name, shape in extras.items()
            },
            extras=self.extras + tuple(extras),
        )

    def parameter_axes(self, name: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
        """Return the labels of a prior's parameter: those of the tensor that its name ends in,
        where sizes agree.

        Example:
            >>> from torch import nn
            >>> net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
            >>> spec = WeightSpec.of(net)
            >>> spec.parameter_axes("local.2.weight", (1, 16))
            (None, 'h1')
            >>> spec.parameter_axes("scale.2.weight", (1,))
            (None,)
        """
        named = [tensor for tensor in self.names if name.endswith(f".{tensor}")]
        tensor = max(named, key=len, default=None)
        if tensor is None or len(shape) != len(self.shapes[tensor]):
            return (None,) * len(shape)
        sizes = zip(self.axes[tensor], shape, self.shapes[tensor], strict=True)
        return tuple(label if own == size else None for label, own, size in sizes)

    @property
    def network(self) -> WeightSpec:
        """The same space without the extras."""
        kept = [name for name in self.names if name not in self.extras]
        return replace(
            self,
            names=tuple(kept),
            shapes={name: self.shapes[name] for name in kept},
            axes={name: self.axes[name] for name in kept},
            extras=(),
        )

    def describe(self) -> dict[str, Any]:
        """Return plain values from which ``from_description`` rebuilds the spec."""
        values: dict[str, Any] = {
            "shapes": [
                [name, list(self.shapes[name]), list(self.axes[name])]
                for name in self.names
            ],
            "activations": {
                label: activation.name for label, activation in self.activations.items()
            },
            "layers": [
                [layer.weight, layer.bias, layer.activation.name] for layer in self.layers
            ],
            "extras": list(self.extras),
            "neutral": [list(each) for each in sorted(self.scale_free_axes)],
        }
        values |= {"transposed": sorted(self.transposed)} if self.transposed else {}
        return values if self._labelled else values | {"unknown": self.unknown}

    @property
    def _labelled(self) -> bool:
        return bool(self.activations or self.layers)

    @classmethod
    def from_description(cls, values: dict[str, Any]) -> WeightSpec:
        """Rebuild a spec from what ``describe`` returned.

        Raises:
            ValueError: if there is no such space, or it has more than 2^27 weights.
        """
        dim = 0
        for name, shape, axes in values["shapes"]:
            whole = all(type(size) is int and size > 0 for size in shape)
            if not isinstance(name, str) or not whole or len(shape) != len(axes):
                raise ValueError(f"no tensor {name!r} has shape {shape} and axes {axes}")
            dim += math.prod(shape)
        if dim > _LARGEST:
            raise ValueError(f"a space of {dim} weights, of at most {_LARGEST}")
        spec = cls(
            tuple(name for name, _, _ in values["shapes"]),
            {name: tuple(shape) for name, shape, _ in values["shapes"]},
            {name: tuple(axes) for name, _, axes in values["shapes"]},
            {label: Activation(name) for label, name in values["activations"].items()},
            tuple(
                Layer(weight, bias, Activation(name))
                for weight, bias, name in values["layers"]
            ),
            tuple(values["extras"]),
            frozenset((name, axis) for name, axis in values.get("neutral", ())),
            transposed=frozenset(values.get("transposed", ())),
        )
        if spec._labelled:
            return spec
        # Earlier versions did not say whether a network without labels was known to have no
        # symmetry.
        return replace(spec, unknown=values.get("unknown", "it was saved without labels"))

    # ---------------------------------------- layout

    def fan_in(self, name: str) -> float | None:
        """Return how many terms with weights of a tensor are added up in one output.

        None for what is added itself.

        An output of independent inputs of unit variance has unit variance if the weights have
        variance 1 / fan in. It is the product of all sizes but the first for linear layers and
        convolutions, where it is not counted at the edges; what the stride leaves of it for
        transposed convolutions, on average over places; one for tables of embeddings, of which a
        row is picked, and for weights that multiply one number each, as those of normalisations.
        Tensors of a caller's own modules are taken to be ``(out, in, ...)``.

        Example:
            >>> spec = WeightSpec.of(torch.nn.Conv1d(4, 8, 3))
            >>> spec.fan_in("weight"), spec.fan_in("bias")
            (12, None)
        """
        shape = self.shapes[name]
        if 0 in shape:
            return 1.0  # of no weights
        if name in self.unusual:
            return self.unusual[name]
        return math.prod(shape[1:]) if len(shape) > 1 else None

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each tensor lies in the flat vector."""
        slices, start = {}, 0
        for name in self.names:
            stop = start + math.prod(self.shapes[name])
            slices[name] = slice(start, stop)
            start = stop
        return slices

    @cached_property
    def dim(self) -> int:
        """Length of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def widths(self) -> dict[str, int]:
        """Number of units of each hidden layer, by label."""
        widths: dict[str, int] = {}
        for name in self.names:
            for label, size in zip(self.axes[name], self.shapes[name], strict=True):
                if label is not None:
                    widths[label] = min(size, widths.get(label, size))
        return widths

    @checked
    def unit_axes(self, name: str) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
        """Return the shape and the labels of a tensor whose every labelled axis runs over units
        alone.

        An axis may be a multiple of its label's width: every unit then owns a block of consecutive
        entries, as a channel does once a convolution's output is flattened. Such an axis is split
        into (units, entries of one).

        Example:
            >>> from torch import nn
            >>> net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
            >>> WeightSpec.of(net).unit_axes("2.weight")
            ((3, 16), (None, 'h1'))
        """
        self._check_name(name)
        shape: list[int] = []
        axes: list[str | None] = []
        for label, size in zip(self.axes[name], self.shapes[name], strict=True):
            width = size if label is None else self.widths[label]
            shape += [width] if size == width else [width, size // width]
            axes += [label] if size == width else [label, None]
        return tuple(shape), tuple(axes)

    @checked
    def scale_exponents(self, name: str) -> tuple[int, ...]:
        """Return the power of its unit's scale that multiplies each axis of ``unit_axes(name)``.

        It is 1 where units are written, -1 where they are read, and 0 where no scale acts; signs
        and phases alike.

        Example:
            >>> from torch import nn
            >>> net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
            >>> spec = WeightSpec.of(net)
            >>> spec.scale_exponents("0.weight"), spec.scale_exponents("2.weight")
            ((1, 0), (0, -1))
        """
        self._check_name(name)
        scale_exponents: list[int] = []
        for axis, (label, size) in enumerate(
            zip(self.axes[name], self.shapes[name], strict=True)
        ):
            still = (
                label is None or name in self.extras or (name, axis) in self.scale_free_axes
            )
            scale_exponents.append(
                0 if still else 1 if axis == self._written_axis(name) else -1
            )
            if label is not None and size != self.widths[label]:
                scale_exponents.append(0)
        return tuple(scale_exponents)

    def _check_name(self, name: str) -> None:
        if name not in self.shapes:
            raise ValueError(
                f"name must be one of the tensors {list(self.names)}, got {name!r}"
            )

    def _written_axis(self, name: str) -> int:
        return 1 if name in self.transposed else 0

    def written(self, name: str) -> int:
        """Return the axis of ``unit_axes(name)`` that is the side of the units which the tensor
        writes.

        Example:
            >>> from torch import nn
            >>> spec = WeightSpec.of(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)))
            >>> spec.written("0.weight"), spec.written("1.weight")
            (1, 0)
        """
        axis = self._written_axis(name)
        label = self.axes[name][0]
        return axis + (
            axis == 1 and label is not None and self.shapes[name][0] != self.widths[label]
        )

    @checked
    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Join named tensors ``(..., *shape)`` to ``theta`` ``(..., dim)``; leading axes broadcast.

        Raises:
            ValueError: if a tensor is missing, is left over, or has another shape.
        """
        if set(params) != set(self.names):
            raise ValueError(
                f"params must have exactly the tensors {list(self.names)}, got {sorted(params)}"
            )
        parts = []
        for name in self.names:
            shape, tensor = self.shapes[name], params[name]
            lead = tensor.shape[: tensor.dim() - len(shape)]
            if tuple(tensor.shape[len(lead) :]) != shape:
                raise ValueError(
                    f"{name} must end in shape {shape}, got {tuple(tensor.shape)}"
                )
            parts.append(tensor.reshape(*lead, math.prod(shape)))
        lead = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
        # (..., dim)
        return torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], -1)

    @checked
    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """Split ``theta`` ``(..., dim)`` into named tensors ``(..., *shape)``.

        Raises:
            ValueError: if the last axis is not ``dim`` long.
        """
        self.check(theta)
        return {
            name: theta[..., where].reshape((*theta.shape[:-1], *self.shapes[name]))
            for name, where in self.slices.items()
        }

    def check(self, theta: Tensor, name: str = "theta") -> Tensor:
        """Return weights as a tensor.

        Raise ``ValueError`` unless the last axis of ``theta``, or ``name``, fits.
        """
        theta = tracked(name, theta)
        if theta.dim() == 0 or theta.shape[-1] != self.dim:
            raise ValueError(
                f"{name} must end in an axis of length {self.dim}, got shape {tuple(theta.shape)}"
            )
        return theta

    def __repr__(self) -> str:
        """Say how large the space is, and what is known about its symmetries."""
        return f"WeightSpec(dim={self.dim}, tensors={len(self.names)}, symmetries: {self._said})"

    @property
    def _said(self) -> str:
        if self.unknown:
            return f"not known, {self.unknown}"
        kinds = self._function_symmetries._asdict().items()
        units = [
            f"{label} of {width} units "
            f"({', '.join(kind for kind, labels in kinds if label in labels)})"
            for label, width in self.widths.items()
        ]
        return "; ".join(units) or "none"

    # ---------------------------------------- the group action

    @checked
    def permute(self, theta: Tensor, perms: Mapping[str, Tensor]) -> Tensor:
        """Reorder hidden units: unit i of the result is unit ``perms[label][i]`` of ``theta``.

        Args:
            theta: ``(..., dim)``.
            perms: ``(width,)`` or ``(..., width)`` integer tensors by label; layers left out stay
                as they are.
        """
        self.check(theta)
        self._check_labels(perms)
        parts = []
        for name, where in self.slices.items():
            shape, axes = self.unit_axes(name)
            index = torch.zeros((), dtype=torch.long, device=theta.device)
            for axis, (label, size) in enumerate(zip(axes, shape, strict=True)):
                coordinate = (
                    perms[label]
                    if label is not None and label in perms
                    else torch.arange(size, device=theta.device)
                )
                trailing = (1,) * (len(shape) - axis - 1)
                along = coordinate.reshape(
                    *coordinate.shape[:-1], *(1,) * axis, size, *trailing
                )
                index = index + along * math.prod(shape[axis + 1 :])
            parts.append(
                (index + where.start).reshape(
                    *index.shape[: index.dim() - len(shape)], math.prod(shape)
                )
            )
        lead = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
        # (..., dim)
        index = torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], -1)
        shape = np.broadcast_shapes(theta.shape, index.shape)
        return theta.expand(shape).gather(-1, index.expand(shape))

    @checked
    def flip(self, theta: Tensor, signs: Mapping[str, Tensor]) -> Tensor:
        """Flip the sign of everything that enters and leaves chosen units of odd activations.

        Args:
            theta: ``(..., dim)``.
            signs: ``(width,)`` or ``(..., width)`` tensors of +1 and -1 by label.
        """
        self._check_labels(signs, "sign", self._function_symmetries.sign)
        return theta * self.factors(theta, signs)

    @checked
    def rescale(self, theta: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
        """Multiply what enters a unit by its scale and divide what leaves it, for homogeneous
        activations.

        Args:
            theta: ``(..., dim)``.
            scales: ``(width,)`` or ``(..., width)`` positive tensors by label.
        """
        self._check_labels(scales, "scale", self._function_symmetries.scale)
        if any(bool((scale <= 0).any()) for scale in scales.values()):
            raise ValueError("scales must be positive")
        return theta * self.factors(theta, scales)

    @checked
    def shift(self, theta: Tensor, phases: Mapping[str, Tensor]) -> Tensor:
        """Shift the pre-activations of sines by half turns, and flip what leaves units that move by
        an odd number.

        sin(w0 a + k pi) = (-1)^k sin(w0 a): the unit's bias moves by k pi / w0, in a residual
        network all its biases.

        Args:
            theta: ``(..., dim)``.
            phases: numbers k of half turns, ``(width,)`` or ``(..., width)`` integer tensors by
                label.
        """
        self._check_labels(phases, "phase", self._function_symmetries.phase)
        signs = {label: 1 - 2 * (turns % 2) for label, turns in phases.items()}
        moved = theta * self.factors(theta, signs, written=False)
        for label, turns in phases.items():
            half_turn = self.activations[label].half_turn
            assert half_turn is not None
            for name in self.names:
                if self.axes[name] == (label,) and name not in self.extras:
                    moved[..., self.slices[name]] += half_turn * turns.to(theta)
        return moved

    def factors(
        self, theta: Tensor, scales: Mapping[str, Tensor], *, written: bool = True
    ) -> Tensor:
        """Return the multiplier of every weight: its unit's scale, if ``written``, over those of
        the units it reads.
        """
        self.check(theta)
        parts = []
        for name in self.names:
            shape, axes = self.unit_axes(name)
            factor = torch.ones(shape, dtype=theta.dtype, device=theta.device)
            for axis, (label, power) in enumerate(
                zip(axes, self.scale_exponents(name), strict=True)
            ):
                if (
                    label is not None
                    and label in scales
                    and (power < 0 or (power and written))
                ):
                    scale = scales[label].to(theta)
                    along = scale.reshape(
                        *scale.shape[:-1],
                        *(1,) * axis,
                        shape[axis],
                        *(1,) * (len(shape) - axis - 1),
                    )
                    factor = factor * along if power > 0 else factor / along
            parts.append(
                factor.reshape(*factor.shape[: factor.dim() - len(shape)], math.prod(shape))
            )
        lead = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
        # (..., dim)
        return torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], -1)

    def _check_labels(
        self,
        elements: Mapping[str, Tensor],
        action: str = "permutation",
        allowed: frozenset[str] | None = None,
    ) -> None:
        for label, element in elements.items():
            if label not in self.widths:
                raise ValueError(
                    f"no hidden layer {label!r}; there are {sorted(self.widths)}"
                )
            if allowed is not None and label not in allowed:
                raise ValueError(
                    f"{label} has activation {self.activations[label].name}, which has no {action} "
                    "symmetry"
                )
            if element.shape[-1] != self.widths[label]:
                raise ValueError(
                    f"{action} of {label} must end in an axis of {self.widths[label]}"
                )

    @cached_property
    def _function_symmetries(self) -> Symmetries:
        """The symmetries of the network's function."""
        labels = self.activations.items()
        return Symmetries(
            frozenset(self.activations),
            frozenset(label for label, f in labels if f.odd),
            frozenset(label for label, f in labels if f.homogeneous),
            frozenset(
                label
                for label, f in labels
                if f.half_turn is not None and self._every_sine_has_a_bias(label)
            ),
        )

    def _every_sine_has_a_bias(self, label: str) -> bool:
        """Say whether all that writes units of ``label`` has a bias and goes through one and the
        same sine.
        """
        if any(self.axes[name][axis] == label for name, axis in self.scale_free_axes):
            return False
        own = [name for name in self.names if name not in self.extras]
        written = [
            name for name in own if self.axes[name][self._written_axis(name)] == label
        ]
        biases = sum(self.unit_axes(name)[1] == (label,) for name in own)
        # After one layer other odd functions may follow its sine; of several, one may go to those
        # without it.
        alike = biases == 1 or " + " not in self.activations[label].name
        return biases > 0 and len(written) == 2 * biases and alike

    def symmetries(self) -> Symmetries:
        """Return the symmetries of the network's function.

        What a prior leaves of them, `Prior.symmetries` says.

        Of a network that could not be labelled none are known, though there may be some: see
        `unknown` and `known_symmetries`.
        """
        return self._function_symmetries

    def known_symmetries(self) -> Symmetries:
        """Return `symmetries` for what cannot do without.

        Raises:
            ValueError: if the network could not be labelled, with the module or operation that is
                the reason.
        """
        if self.unknown:
            raise ValueError(
                f"the symmetries of this network are not known: {self.unknown}"
            )
        return self.symmetries()

    @checked
    def random_symmetry(
        self, theta: Tensor, seed: Seed, group: Symmetries | None = None
    ) -> Tensor:
        """Apply a random element of the group to every network in ``theta`` ``(..., dim)``.

        Permutations and signs are uniform, scales log-uniform, phases uniform between -2 and 2 half
        turns.

        Args:
            theta: networks.
            seed: of the random elements.
            group: what may be done to them; all symmetries of the network's function if None. A
                model's own are `BayesianModel.symmetries`.

        Raises:
            ValueError: if the symmetries are not known.
        """
        return self.transform(
            self.known_symmetries() if group is None else group, seed, theta
        )[0]

    def transform(
        self, group: Symmetries, seed: Seed, *thetas: Tensor
    ) -> tuple[Tensor, ...]:
        """Move tensors of networks ``(..., dim)`` by random elements of ``group``, one for each
        network.

        Networks at the same place of different tensors are moved by the same element.
        """
        device, lead = thetas[0].device, thetas[0].shape[:-1]
        generator = as_generator(seed, device)

        def uniform(label: str) -> Tensor:
            return torch.rand(*lead, self.widths[label], generator=generator, device=device)

        perms = {label: uniform(label).argsort(-1) for label in sorted(group.permutation)}
        signs = {
            label: torch.where(uniform(label) < 0.5, -1.0, 1.0)
            for label in sorted(group.sign)
        }
        scales = {
            label: (2 * uniform(label) - 1).mul(1.5).exp() for label in sorted(group.scale)
        }
        phases = {
            label: torch.randint(
                -2, 3, (*lead, self.widths[label]), generator=generator, device=device
            )
            for label in sorted(group.phase)
        }
        results = []
        for each in thetas:
            result = self.permute(each, perms) if perms else each
            result = self.flip(result, signs) if signs else result
            result = self.rescale(result, scales) if scales else result
            results.append(self.shift(result, phases) if phases else result)
        return tuple(results)

    @property
    def log_group_order(self) -> float:
        """Log of the number of permutations and sign flips that leave every function unchanged.

        Raises:
            ValueError: if the symmetries are not known.
        """
        group = self.known_symmetries()
        permutations = sum(
            math.lgamma(self.widths[label] + 1) for label in group.permutation
        )
        return permutations + sum(self.widths[label] * math.log(2) for label in group.sign)


def free_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are inferred, by name: those that require gradients.

    The others are constants.

    Raises:
        ValueError: if there is none.
    """
    free = {
        name: parameter
        for name, parameter in net.named_parameters()
        if parameter.requires_grad
    }
    if not free and next(net.parameters(), None) is not None:
        raise ValueError(
            f"every parameter of {type(net).__name__} has requires_grad=False, which makes it a "
            "constant, so there "
            "is nothing to infer: call requires_grad_(True) on the network, or on the layers to be "
            "inferred"
        )
    if not free:
        raise ValueError(f"{type(net).__name__} has no parameters to infer")
    return free


_TRANSPOSED = nn.Embedding | nn.EmbeddingBag | nn.modules.conv._ConvTransposeNd
_ELEMENTWISE = (
    nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase | nn.PReLU
)


def _unusual_fan_ins(net: nn.Module) -> dict[str, float | None]:
    """Return `WeightSpec.fan_in` of the tensors whose shape does not say it."""
    return {
        f"{prefix}.{name}".removeprefix("."): fan_in
        for prefix, module in net.named_modules()
        for name, fan_in in _own_fan_ins(module).items()
    }


def _own_fan_ins(module: nn.Module) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        terms = module.in_channels / module.groups * math.prod(module.kernel_size)
        found["weight"] = terms / math.prod(module.stride)
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag | _ELEMENTWISE):
        found["weight"] = 1.0
    if isinstance(module, nn.MultiheadAttention | _ELEMENTWISE):
        found |= {key: None for key in module._parameters if "bias" in key}
    for name, originals in _originals(module):
        first, last = (module.get_parameter(each) for each in (originals[0], originals[-1]))
        fan_in = found.get(name, math.prod(last.shape[1:]) if last.dim() > 1 else None)
        found[originals[-1]] = fan_in
        if len(originals) == 2 and fan_in is not None:
            # Norms and directions: v / |v| has a mean square of one over the number of entries
            # under a norm.
            found[originals[0]] = fan_in * first.numel() / last.numel()
    return found


def _originals(module: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Yield the tensors that torch computes from others, with the names of these: weight
    normalisation has two.
    """
    for name, parts in getattr(module, "parametrizations", {}).items():
        yield name, [f"parametrizations.{name}.{key}" for key in parts._parameters]
    for key in module._parameters:
        name = key.removesuffix("_g")
        if name != key and f"{name}_v" in module._parameters:
            yield name, [key, f"{name}_v"]


def _shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(parameter.shape) for name, parameter in free_parameters(net).items()
    }


def generators_of_permutations(n: int) -> list[Tensor]:
    """Return a transposition and a cycle, which generate all permutations of n things."""
    swap = torch.arange(n)
    swap[: min(n, 2)] = swap[: min(n, 2)].flip(0)
    return [swap, torch.arange(n).roll(1)]


def reordered(
    values: Tensor, axes: tuple[str | None, ...], label: str, perm: Tensor
) -> Tensor:
    """Reorder the units, or blocks of units, along every axis that carries ``label``."""
    for axis, own in enumerate(axes):
        if own == label:
            block = torch.arange(values.shape[axis] // len(perm))
            values = values.index_select(
                axis, (perm.unsqueeze(-1) * len(block) + block).flatten()
            )
    return values
