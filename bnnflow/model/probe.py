"""One look at a module, before it is trusted: is it what a likelihood of independent rows takes it
for?

A model needs a network whose outputs are a function of weights and inputs alone, row by row, and
whose backward pass is the derivative of its forward pass. Random weights and a few rows of data
tell: in double precision the derivative along a random direction has ten digits, which a kink that
happens to lie in between cannot change for all of three points.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from bnnflow.identity import Identity
from bnnflow.model.likelihood import Likelihood
from bnnflow.seeding import isolated
from bnnflow.weights import free_parameters

__all__ = ["check_outputs", "probe", "probe_fisher_factor", "probe_likelihood"]

_ROWS = 4
_MANY = 64  # rows, as a network may treat few in another way
_POINTS = 3
_CANNOT = (NotImplementedError, RuntimeError, TypeError, IndexError)
_DRAWS = 2000  # of targets, over which products of scores are averaged
# times longer is the step of a tensor that matters little than that of the one that matters most
_FARTHEST = 100.0


class _Precision(NamedTuple):
    dtype: torch.dtype
    same: float  # relative difference of outputs that should be the same
    step: float
    slope: float  # relative difference of slopes that should be the same


_DOUBLE = _Precision(torch.float64, 1e-9, 1e-6, 1e-2)
_SINGLE = _Precision(torch.float32, 1e-4, 1e-3, 0.1)


def check_outputs(outputs: Any, rows: int) -> Tensor:
    """Return outputs as ``(rows, out)``, or raise ``ValueError`` if they are something else."""
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"the network must return one tensor, got {type(outputs).__name__}"
        )
    result = outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs
    if result.dim() != 2 or len(result) != rows:
        raise ValueError(
            f"the network must map (n, ...) to (n, out), got {tuple(outputs.shape)} for {rows} rows"
        )
    return result


def probe(net: nn.Module, x: Tensor) -> frozenset[str]:
    """See that a network is a function of its inputs and weights, keeps rows apart, and has the
    slope that it claims.

    Returns:
        The attributes of modules that the forward pass writes, ``"net.0.last"``; they are no part
        of what it computes.

    Raises:
        ValueError: naming the module, or the parameter, that makes it something else.
    """
    generator = torch.Generator().manual_seed(0)
    with isolated(generator):
        found = _made(net, x)
        written = found.check_state()
        found.check_rows()
        found.check_slopes()
    return written


LogProb = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
Score = Callable[[Tensor, Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


def probe_likelihood(
    log_prob: LogProb,
    score: Score,
    y: Tensor,
    n_outputs: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """See that a likelihood is a density of single rows, changes nothing, and has the slope that it
    claims.

    Args:
        log_prob: outputs ``(networks, n, out)``, targets and parameters ``(networks, *shape)`` to
            ``(networks, n)``.
        score: the same to its gradient by outputs and logarithms of parameters.
        y: a few targets.
        n_outputs: of the network.
        shapes: of the parameters.

    Raises:
        ValueError: that says what it is not.
    """
    with isolated(torch.Generator().manual_seed(0)), torch.no_grad():
        points = [_Point.random(y, n_outputs, shapes) for _ in range(_POINTS)]
        _check_density(log_prob, points[0])
        if 2 * sum(not point.agrees(log_prob, score) for point in points) > _POINTS:
            raise ValueError(
                "the likelihood's score, or what differentiation makes of its log_prob, is not the "
                "gradient of its log_prob by the outputs and the logarithms of its parameters: a "
                "score that belongs to another log_prob, as that of a class which this one is "
                "derived from, or a detach"
            )


def probe_fisher_factor(
    likelihood: Likelihood, n_outputs: int, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """See that the Fisher information that a likelihood claims is that of the scores of its own
    draws.

    Or their mean curvature, which is another one where rows have weights. Where targets cannot be
    drawn nothing is said.

    Args:
        likelihood: with a ``fisher_factor``.
        n_outputs: of the network.
        shapes: of its parameters.

    Raises:
        ValueError: if it is off, in most of some random places, by a fifth of it and by eight
            standard errors.
    """
    generator = torch.Generator().manual_seed(0)
    with isolated(generator), torch.no_grad(), contextlib.suppress(*_CANNOT):
        if (
            2
            * sum(_is_off(likelihood, n_outputs, shapes, generator) for _ in range(_POINTS))
            > _POINTS
        ):
            raise ValueError(
                f"the fisher_factor of {likelihood.name} is not the one of its log_prob: R R^T "
                "must be the mean of the "
                "products of scores over targets drawn from it, and that of learned parameters is "
                "by their logarithms"
            )


def _is_off(
    likelihood: Likelihood,
    n_outputs: int,
    shapes: Mapping[str, tuple[int, ...]],
    generator: torch.Generator,
) -> bool:
    like = torch.zeros((), dtype=torch.float64)
    outputs = _normal(like.expand(1, 1, n_outputs))
    parameters = {
        name: _normal(like.expand(1, *shape)).exp() for name, shape in shapes.items()
    }
    many = outputs.expand(_DRAWS, -1, -1)
    values = {
        name: value.expand(_DRAWS, *value.shape[1:]) for name, value in parameters.items()
    }
    factor, information = likelihood.fisher_factor(outputs, parameters)
    if likelihood.kind == "classification":
        shares = likelihood.mean(outputs, parameters)[0, 0]
        y = torch.multinomial(
            shares, _DRAWS, replacement=True, generator=generator
        ).unsqueeze(-1)
    elif likelihood.has_sample:
        y = likelihood.sample(many, values, generator)
    else:
        raise NotImplementedError
    by_outputs, by_name = likelihood.score(many, y, values)
    scores = [by_outputs[:, 0]]
    claimed = factor[0, 0] @ factor[0, 0].mT
    if all(information[name].numel() == by_name[name][0].numel() for name in by_name):
        scores += [each.flatten(1) for each in by_name.values()]
        own = [information[name].flatten() for name in by_name]
        claimed = torch.block_diag(claimed, *map(torch.diag, own))
    drawn = torch.cat(scores, 1)
    if not _differ(drawn.unsqueeze(-1) * drawn.unsqueeze(-2), claimed):
        return False
    step = _SINGLE.step * torch.eye(n_outputs, dtype=torch.float64)
    ahead, behind = (
        torch.stack(
            [likelihood.score(many + sign * each, y, values)[0][:, 0] for each in step], -1
        )
        for sign in (1, -1)
    )
    return _differ((behind - ahead) / (2 * _SINGLE.step), claimed[:n_outputs, :n_outputs])


def _differ(drawn: Tensor, claimed: Tensor) -> bool:
    """Say whether the mean of matrices ``(draws, size, size)`` is another one."""
    mean = drawn.mean(0)
    apart, error = (mean - claimed).abs(), drawn.std(0) / len(drawn) ** 0.5
    size = torch.maximum(mean.abs().amax(), claimed.abs().amax())
    return bool(((apart > 8 * error) & (apart > 0.2 * size)).any())


class _Point(NamedTuple):
    """Where a likelihood is evaluated: for two networks."""

    outputs: Tensor
    y: Tensor
    parameters: dict[str, Tensor]

    @classmethod
    def random(
        cls, y: Tensor, n_outputs: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> _Point:
        y = y.double() if y.is_floating_point() else y
        like = torch.zeros((), dtype=torch.float64, device=y.device)
        outputs = _normal(like.expand(2, len(y), n_outputs))
        return cls(
            outputs,
            y,
            {name: _normal(like.expand(2, *shape)).exp() for name, shape in shapes.items()},
        )

    def moved(self, step: float, along: Tensor, by_name: dict[str, Tensor]) -> _Point:
        parameters = {
            name: value * (step * by_name[name]).exp()
            for name, value in self.parameters.items()
        }
        return _Point(self.outputs + step * along, self.y, parameters)

    def agrees(self, log_prob: LogProb, score: Score) -> bool:
        """Say whether the slope along a random direction is the one that the score claims."""
        try:
            by_outputs, by_name = score(*self)
        except RuntimeError as error:
            raise ValueError(
                f"the likelihood's log_prob cannot be differentiated: {error}"
            ) from error
        along = _normal(self.outputs)
        directions = {name: _normal(value) for name, value in self.parameters.items()}
        ahead, behind = (
            log_prob(*self.moved(sign * _DOUBLE.step, along, directions))
            for sign in (1, -1)
        )
        if ahead.dtype != torch.float64 or not bool((ahead - behind).isfinite().all()):
            return True  # rounded, or outside of the support: nothing can be said
        measured = (ahead - behind).sum(1) / (2 * _DOUBLE.step)
        claimed = (by_outputs * along).sum((1, 2))
        for name, direction in directions.items():
            claimed = claimed + (by_name[name] * direction).flatten(1).sum(1)
        rounding = 100 * torch.finfo(torch.float64).eps * ahead.abs().sum(1) / _DOUBLE.step
        most = _DOUBLE.slope * torch.maximum(measured.abs(), claimed.abs()) + rounding
        return bool(((measured - claimed).abs() <= most).all())


def _check_density(log_prob: LogProb, point: _Point) -> None:
    outputs, y, parameters = point
    given = (
        outputs.clone(),
        y.clone(),
        {name: value.clone() for name, value in parameters.items()},
    )
    drawn = torch.get_rng_state()
    try:
        values = log_prob(*given)
    except RuntimeError as error:
        raise ValueError(
            f"the likelihood's log_prob cannot take outputs {tuple(outputs.shape)} with y "
            f"{tuple(y.shape)}: {error}; "
            "what belongs to single rows goes into columns of y"
        ) from error
    if not isinstance(values, Tensor) or values.shape != outputs.shape[:-1]:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            "the likelihood's log_prob must give a number for every row, "
            f"{tuple(outputs.shape[:-1])} for outputs {tuple(outputs.shape)}, got {shape}"
        )
    if bool(values.isnan().all()):
        raise ValueError("the likelihood's log_prob is NaN for all rows")
    same = all(map(torch.equal, given[:2], (outputs, y)))
    if not same or not all(
        torch.equal(given[2][name], value) for name, value in parameters.items()
    ):
        raise ValueError(
            "the likelihood's log_prob writes to its arguments; work on copies"
        )
    again = log_prob(outputs, y, parameters)
    if not torch.equal(drawn, torch.get_rng_state()) or not torch.equal(
        values.nan_to_num(), again.nan_to_num()
    ):
        raise ValueError(
            "the likelihood's log_prob is random: the same outputs must give the same density"
        )
    for i in range(len(y)):
        alone = log_prob(outputs[:, i : i + 1], y[i : i + 1], parameters)
        if not torch.allclose(
            alone,
            values[:, i : i + 1],
            rtol=_SINGLE.same,
            atol=_SINGLE.same,
            equal_nan=True,
        ):
            raise ValueError(
                "the likelihood's log_prob makes the density of a row depend on the other rows; "
                "leave averages over rows, and weights that depend on their number, out"
            )


def _made(net: nn.Module, x: Tensor) -> _Probe:
    """Return a probe of double precision, of single where a number type is written into the
    network's code.
    """
    with contextlib.suppress(RuntimeError):
        found = _Probe(net, x, _DOUBLE)
        if found.outputs.dtype == torch.float64:
            return found
    return _Probe(net, x, _SINGLE)


class _Probe:
    """A copy of the network with random weights, and rows to evaluate it at.

    ``net`` may come to hold what its forward pass keeps; ``fresh`` is never called.
    """

    def __init__(self, net: nn.Module, x: Tensor, precision: _Precision) -> None:
        self.precision = precision
        self.fresh = copy.deepcopy(net).to(precision.dtype)
        self.net = copy.deepcopy(self.fresh)
        rows = x[torch.linspace(0, len(x) - 1, _ROWS).long().unique().to(x.device)]
        if rows.is_floating_point():
            rows = rows.to(precision.dtype)
            rows = torch.cat(
                [
                    rows,
                    rows[:1] + _normal(rows[:1].expand(_ROWS - len(rows), *rows.shape[1:])),
                ]
            )
        self.rows = rows
        others = torch.arange(_MANY - len(rows), device=x.device) % len(x)
        self.many = torch.cat([rows, x[others].to(rows.dtype)])
        self.names = list(free_parameters(net))
        self.params = self.random()
        with torch.no_grad():
            self.outputs = self.evaluate(self.params, rows)

    def random(self) -> dict[str, Tensor]:
        """Return random weights of the size that keeps signals as they are."""
        own = dict(self.net.named_parameters())
        return {name: _normal(own[name]) / _fan_in(own[name]) ** 0.5 for name in self.names}

    def evaluate(
        self, params: dict[str, Tensor], rows: Tensor, net: nn.Module | None = None
    ) -> Tensor:
        """Return the outputs of a copy of the rows, by another copy of the network if one is
        given.
        """
        return check_outputs(
            torch.func.functional_call(net or self.net, params, (rows.clone(),)), len(rows)
        )

    def same(self, first: Tensor, second: Tensor) -> bool:
        """Say whether two tensors are the same up to rounding."""
        size = first.abs().amax().nan_to_num() if first.numel() else 0.0
        return torch.allclose(
            first, second, rtol=0, atol=float(self.precision.same * size), equal_nan=True
        )

    # ---------------------------------------- state and chance

    @torch.no_grad()
    def check_state(self) -> frozenset[str]:
        """See that an evaluation writes to nothing that counts, and that a second one gives the
        same.
        """
        self.params = self.random()
        counts = {**self.params, **dict(self.net.named_buffers())}
        before = {name: tensor.clone() for name, tensor in counts.items()}
        attributes, rows, drawn = (
            _attributes(self.fresh),
            self.rows.clone(),
            torch.get_rng_state(),
        )
        with _Recorder(self.net) as first:
            self.outputs = check_outputs(
                torch.func.functional_call(self.net, self.params, (rows,)), len(rows)
            )
        counts = {**self.params, **dict(self.net.named_buffers())}
        changed = [
            name for name, tensor in before.items() if not torch.equal(tensor, counts[name])
        ]
        if changed:
            raise ValueError(
                f"{changed[0]!r} is written by the forward pass of the network, which "
                "must leave it alone"
            )
        if not torch.equal(rows, self.rows):
            writers = [record.name for record in first if record.overwrites]
            raise ValueError(
                f"{self.said(writers)} writes to the inputs, which belong to the "
                "data; work on a copy"
            )
        random = not torch.equal(drawn, torch.get_rng_state())
        with _Recorder(self.net) as second:
            again = self.evaluate(self.params, self.rows)
        if random or not self.same(self.outputs, again):
            guilty = self.guilty(first, second, self.same)
            raise ValueError(
                f"{self.said(guilty)} is random, or depends on how often it was called: the same "
                "weights and inputs "
                "must give the same outputs; call net.eval(), or remove it"
            )
        return frozenset(
            path
            for path, digest in _attributes(self.net).items()
            if attributes.get(path) != digest
        )

    @staticmethod
    def guilty(
        first: list[_Record], second: list[_Record], same: Callable[[Tensor, Tensor], bool]
    ) -> list[str]:
        """Return the modules that made something else of the same."""
        pairs = list(zip(first, second, strict=False))
        return [
            a.name
            for a, b in pairs
            if _alike(a.given, b.given, same) and not _alike(a.made, b.made, same)
        ]

    # ---------------------------------------- rows

    @torch.no_grad()
    def check_rows(self) -> None:
        """See that every row's outputs are those that it has alone."""
        for i, row in enumerate(self.rows.split(1)):
            try:
                alone = self.evaluate(self.params, row)
            except (RuntimeError, IndexError) as error:
                raise ValueError(
                    f"the network cannot take one row, {tuple(row.shape)}: {error}"
                ) from error
            if alone.shape != self.outputs[:1].shape or not self.same(
                self.outputs[i : i + 1], alone
            ):
                self.refuse_mixing(self.rows, i, row)
        if not self.same(
            self.evaluate(self.params, self.many)[: len(self.rows)], self.outputs
        ):
            self.refuse_mixing(self.many, 0, self.rows)
        self.check_memory(self.rows[-1:])

    def check_memory(self, row: Tensor) -> None:
        """See that a row's outputs are the same whatever the network was called with before."""
        first = copy.deepcopy(self.fresh)
        if self.same(
            self.evaluate(self.params, row), self.evaluate(self.params, row, first)
        ):
            return
        guilty = self.guilty(
            self.recorded(row), self.recorded(row, copy.deepcopy(self.fresh)), self.same
        )
        raise ValueError(
            f"{self.said(guilty)} keeps something of the inputs or weights that it is first called "
            "with, which decides "
            "all later outputs; call the network on the data that this is meant to come from "
            "before the model is made, or remove it"
        )

    def refuse_mixing(self, rows: Tensor, first: int, fewer: Tensor) -> NoReturn:
        """Raise, naming the module that makes something else of ``fewer`` of the rows, which begin
        at ``first``.
        """

        def same_part(together: Tensor, apart: Tensor) -> bool:
            if (len(together), len(apart)) != (len(rows), len(fewer)) or together.shape[
                1:
            ] != apart.shape[1:]:
                return True  # these have no axis of rows
            return self.same(together[first : first + len(fewer)], apart)

        guilty = self.guilty(self.recorded(rows), self.recorded(fewer), same_part)
        raise ValueError(
            f"{self.said(guilty)} makes a row's output depend on the other rows, so there is no "
            "likelihood of "
            "single rows; the first axis of x runs over rows (attention wants batch_first=True)"
        )

    def recorded(self, rows: Tensor, net: nn.Module | None = None) -> list[_Record]:
        """Evaluate the network, or a copy of it, and return what its modules did."""
        with _Recorder(net or self.net) as records:
            self.evaluate(self.params, rows, net)
        return records

    def said(self, names: list[str]) -> str:
        """Name the first module of those found, or the network's own forward."""
        name = names[0] if names else ""
        kind = type(self.net.get_submodule(name)).__name__
        return (
            f"module {name!r} ({kind})" if name else f"the forward of the network ({kind})"
        )

    # ---------------------------------------- slopes

    def check_slopes(self) -> None:
        """See that the backward pass finds the slope of the forward pass."""
        if 2 * sum(not self.agrees(*self.point()) for _ in range(_POINTS)) < _POINTS:
            return
        params, weights, gradients, along = self.point()
        guilty = [
            name
            for name, each in along.items()
            if not self.agrees(params, weights, gradients, {name: each})
        ]
        where = f"the gradient by {guilty[0]!r}" if guilty else "the gradient"
        raise ValueError(
            f"{where} is not the derivative of the outputs: the backward pass of the network (a "
            "Function or a hook of "
            "its own, a detach, a table that is not differentiated everywhere) belongs to another "
            "function than its forward pass; what is no part of the inference takes "
            "requires_grad_(False)"
        )

    def point(
        self,
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return weights, weights of the outputs, the gradient there, and directions in which all
        tensors count.
        """
        params = {name: value.requires_grad_() for name, value in self.random().items()}
        weights = _normal(self.outputs)
        gradients = self.gradients(params, weights)
        largest = max(float(gradient.norm()) for gradient in gradients.values())
        along = {}
        for name, gradient in gradients.items():
            size = max(float(gradient.norm()), largest / _FARTHEST)
            farther = largest / size if size else 1.0
            along[name] = _normal(gradient) * (farther / gradient.numel() ** 0.5)
        return params, weights, gradients, along

    def gradients(self, params: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
        """Return the gradient of the weighted outputs that the backward pass gives."""
        with torch.enable_grad():
            total = (self.evaluate(params, self.rows) * weights).sum()
            if not total.requires_grad:
                raise ValueError(
                    "the outputs of the network have no derivative by its free parameters"
                )
            _check_leaves(total, params.values())
            found = torch.autograd.grad(
                total, list(params.values()), allow_unused=True, materialize_grads=True
            )
        return dict(zip(params, found, strict=True))

    @torch.no_grad()
    def agrees(
        self,
        params: dict[str, Tensor],
        weights: Tensor,
        gradients: dict[str, Tensor],
        along: dict[str, Tensor],
    ) -> bool:
        """Say whether the slope along some directions is the one that gradients claim."""
        step = self.precision.step

        def value(sign: float) -> Tensor:
            moved = params | {
                name: params[name] + sign * step * each for name, each in along.items()
            }
            return (self.evaluate(moved, self.rows) * weights).sum()

        ahead, behind = value(1.0), value(-1.0)
        measured = float(ahead - behind) / (2 * step)
        claimed = sum(
            float((gradients[name] * direction).sum()) for name, direction in along.items()
        )
        rounding = torch.finfo(self.precision.dtype).eps * float(ahead.abs()) / step
        return (
            abs(measured - claimed)
            <= self.precision.slope * max(abs(measured), abs(claimed)) + 100 * rounding
        )


class _Record(NamedTuple):
    """What one call of a module was given and made."""

    name: str
    given: Tensor | None
    made: Tensor | None
    overwrites: bool  # its first argument


class _Recorder:
    """Record the calls of all modules, in the order in which they end."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._hooks: list[Any] = []

    def __enter__(self) -> list[_Record]:
        records: list[_Record] = []
        starts: list[tuple[Tensor | None, int]] = []

        def begin(module: nn.Module, arguments: Any) -> None:
            first = next((each for each in arguments if isinstance(each, Tensor)), None)
            starts.append(
                (
                    None if first is None else first.clone(),
                    0 if first is None else first._version,
                )
            )

        def end(name: str, module: nn.Module, arguments: Any, made: Any) -> None:
            given, version = starts.pop()
            first = next((each for each in arguments if isinstance(each, Tensor)), None)
            tensor = next((each for each in _flat(made) if isinstance(each, Tensor)), None)
            overwrites = first is not None and first._version != version
            records.append(
                _Record(name, given, None if tensor is None else tensor.clone(), overwrites)
            )

        for name, module in self._net.named_modules():
            self._hooks.append(module.register_forward_pre_hook(begin))
            self._hooks.append(module.register_forward_hook(partial(end, name)))
        return records

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()


def _check_leaves(value: Tensor, known: Collection[Tensor]) -> None:
    """Refuse a value that depends on tensors with gradients that are none of those known."""
    ours = {id(each) for each in known}
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ours:
            raise ValueError(
                f"the network uses a tensor {tuple(leaf.shape)} that requires gradients but is "
                "none of its parameters, "
                "so it would be left out of the inference: put layers into an nn.ModuleList or "
                "nn.ModuleDict in place of a list or dict, and do not replace forward by a "
                "function that holds another network; what is meant as a constant takes "
                "requires_grad_(False)"
            )
        waiting += [following for following, _ in node.next_functions]


def _fan_in(weight: Tensor) -> int:
    """Return how many numbers belong to each entry of the first axis, one at least."""
    return max(1, weight.shape[1:].numel())


def _normal(like: Tensor) -> Tensor:
    """Return normal numbers from the CPU's generator, wherever they are used."""
    return torch.randn(like.shape, dtype=like.dtype).to(like.device)


def _flat(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, tuple | list) else (values,)


def _alike(
    first: Tensor | None, second: Tensor | None, same: Callable[[Tensor, Tensor], bool]
) -> bool:
    return first is None or second is None or same(first, second)


def _attributes(net: nn.Module) -> dict[str, str]:
    """Return what the plain attributes of all modules are, by path."""
    hidden = set(vars(nn.Module()))
    return {
        ".".join(["net", *filter(None, [name]), key]): Identity().add(value, key).digest
        for name, module in net.named_modules()
        for key, value in vars(module).items()
        if key not in hidden
    }
