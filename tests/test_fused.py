"""Laws of the compiled perceptron: equal to torch, as differentiable, and never in the way where it
cannot run.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributions as td
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnnflow import BayesianModel, WeightSpec, compiled, likelihoods, priors
from bnnflow.activations import Sine
from bnnflow.model import fused
from bnnflow.model.network import ChainNetwork, ModuleNetwork

F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-5, F64: 1e-12}
ACTIVATIONS = {
    "identity": nn.Identity,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "sin": Sine,
    "sin:30": lambda: Sine(30.0),
}
# every layer would multiply rounding errors by it; smaller weights undo that
FREQUENCY = {"sin:30": 30.0}
OURS: dict[str, tuple[Any, int]] = {  # likelihood, outputs
    "gaussian": (likelihoods.Gaussian(0.3), 1),
    "two targets": (likelihoods.Gaussian(2.0), 2),
    "learned": (likelihoods.Gaussian(), 1),
    "learned two": (likelihoods.Gaussian(scale_prior=td.LogNormal(-1.0, 0.5)), 2),
    "heteroscedastic": (likelihoods.HeteroscedasticGaussian(), 2),
    "heteroscedastic two": (likelihoods.HeteroscedasticGaussian(0.1), 4),
    "categorical": (likelihoods.Categorical(), 3),
    "bernoulli": (likelihoods.Bernoulli(), 1),
    "student": (likelihoods.StudentT(), 1),
    "student two": (likelihoods.StudentT(2.5, 0.3), 2),
    "varying student": (likelihoods.HeteroscedasticStudentT(), 2),
    "varying student two": (likelihoods.HeteroscedasticStudentT(3.0, 0.1), 4),
    "poisson": (likelihoods.Poisson(), 1),
    "negative binomial": (likelihoods.NegativeBinomial(), 2),
    "dispersed": (likelihoods.NegativeBinomial(0.2), 1),
    "ordinal": (likelihoods.Ordinal(5), 1),
    "ordinal three": (likelihoods.Ordinal(3, td.HalfNormal(1.0)), 1),
}
COUNTS = ("poisson", "negative binomial", "dispersed")


@dataclass(frozen=True)
class Own(likelihoods.Gaussian):
    """A likelihood of one's own, which the compiled code does not know."""


LIKELIHOODS = OURS | {"own": (Own(), 1)}

needs_compiler = pytest.mark.skipif(
    compiled.library(F64) is None, reason="no C++ compiler, or BNNFLOW_FUSED=0"
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perceptron(
    *widths: int, activation: str = "tanh", bias: bool = True, last: str = "identity"
) -> nn.Module:
    modules: list[nn.Module] = []
    for i, (size, width) in enumerate(itertools.pairwise(widths)):
        linear = nn.utils.skip_init(nn.Linear, size, width, bias=bias)
        modules += [linear, ACTIVATIONS[activation if i < len(widths) - 2 else last]()]
    return nn.Sequential(*modules)


def model_of(
    likelihood: str = "gaussian",
    widths: tuple[int, ...] = (3, 5),
    n: int = 37,
    dtype: torch.dtype = F64,
    prior: Any = None,
    temperature: float = 1.0,
    **options: Any,
) -> BayesianModel:
    what, outputs = LIKELIHOODS[likelihood]
    g = generator(1)
    x = torch.randn(n, widths[0], generator=g, dtype=F64)
    if likelihood in COUNTS:
        y = (torch.arange(n * outputs) ** 2 % 11).reshape(n, outputs)
    elif what.kind == "classification":
        y = torch.arange(n) % (
            2 if likelihood == "bernoulli" else getattr(what, "n_classes", 3)
        )
    else:
        y = torch.randn(
            n,
            outputs // (2 if likelihood.startswith(("hetero", "varying")) else 1),
            generator=g,
            dtype=F64,
        )
    net = perceptron(*widths, outputs, **options).to(dtype)
    prior = priors.Normal(0.8, 0.1) if prior is None else prior
    return BayesianModel(net, prior, what, x, y, temperature=temperature)


def points(model: BayesianModel, *shape: int, scale: float = 0.7, seed: int = 3) -> Tensor:
    return (
        scale * torch.randn(*shape, model.dim, generator=generator(seed), dtype=F64)
    ).to(model.dtype)


def by_torch(
    model: BayesianModel, theta: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Evaluate without the compiled code: it steps aside where derivatives are tracked."""
    value, grad = model.log_joint_and_grad(theta.clone().requires_grad_(), rows)
    return value.detach(), grad.detach()


def assert_equal_to_torch(
    model: BayesianModel, theta: Tensor, rows: Tensor | None = None, slack: float = 1.0
) -> None:
    value, grad = model.log_joint_and_grad(theta, rows)
    exact_value, exact = by_torch(model.to(dtype=F64), theta.double(), rows)
    tolerance = slack * TOLERANCE[model.dtype]
    floor = 0.1 * model.y.numel()  # where the rows' scores cancel
    assert value.dtype == F64
    assert grad.dtype == model.dtype
    assert grad.shape == theta.shape
    assert (
        (grad.double() - exact).norm(dim=-1) <= tolerance * (exact.norm(dim=-1) + floor)
    ).all()
    assert (
        (value - exact_value).abs() <= tolerance * (exact_value.abs() + model.y.numel())
    ).all()


# ---------------------------------------- inputs of their own, compiled or not


@pytest.mark.parametrize("kind", ["chain", "torch", "module"])
@pytest.mark.parametrize("shape", [(2,), (3, 2)], ids=str)
def test_inputs_of_their_own(kind: str, shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Flatten(), *perceptron(torch.Size(shape).numel(), 5, 2)).to(F64)
    spec = WeightSpec.of(net)
    network = ModuleNetwork(net, spec) if kind == "module" else ChainNetwork(spec)
    g = generator()
    theta, x = (
        torch.randn(4, spec.dim, generator=g, dtype=F64),
        torch.randn(4, 7, *shape, generator=g, dtype=F64),
    )
    theta.requires_grad_(kind == "torch")
    score = torch.randn(4, 7, 2, generator=g, dtype=F64)
    outputs, pullback = network.pullback(theta, x, per_network=True)
    jacobian = network.jacobian(theta, x, per_network=True)
    for i in range(4):
        own = (theta[i : i + 1], x[i])
        expected, vjp = network.pullback(*own)
        torch.testing.assert_close(network(theta, x, per_network=True)[i], expected[0])
        torch.testing.assert_close(outputs[i], expected[0])
        torch.testing.assert_close(pullback(score)[i], vjp(score[i : i + 1])[0])
        torch.testing.assert_close(jacobian[0][i], expected[0])
        torch.testing.assert_close(jacobian[1][i], network.jacobian(*own)[1][0])


# ---------------------------------------- nothing at all


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("widths", list(itertools.product((0, 2), repeat=3)), ids=str)
def test_networks_of_nothing_equal_torch(widths: tuple[int, ...]) -> None:
    g = generator()
    for bias, rows, batch in itertools.product((True, False), range(3), range(3)):
        spec = WeightSpec.of(perceptron(*widths, bias=bias).to(F64))
        network, theta = (
            ChainNetwork(spec),
            torch.randn(batch, spec.dim, generator=g, dtype=F64),
        )
        for shape in ((rows, widths[0]), (batch, rows, widths[0])):
            x, own = torch.randn(shape, generator=g, dtype=F64), len(shape) == 3
            score = torch.randn(batch, rows, widths[-1], generator=g, dtype=F64)
            outputs, vjp = network.pullback(theta, x, per_network=own)
            expected, exact = network.pullback(
                theta.clone().requires_grad_(), x, per_network=own
            )
            torch.testing.assert_close(outputs, expected.detach())
            torch.testing.assert_close(vjp(score), exact(score).detach())
        x, y = (
            torch.randn(*shape, generator=g, dtype=F64)
            for shape in ((rows, widths[0]), (batch, rows, widths[-1]))
        )
        for some in (None, torch.arange(rows)[:0]):
            error, grad = network.squared_error(theta, x, y, some)
            expected_error, expected_grad = network.squared_error(
                theta.clone().requires_grad_(), x, y, some
            )
            torch.testing.assert_close(error, expected_error.detach())
            torch.testing.assert_close(grad, expected_grad.detach())


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(
    "widths", [(0, 1), (2, 0), (0, 3, 1), (2, 0, 1), (2, 3, 0)], ids=str
)
def test_models_of_nothing_are_refused(widths: tuple[int, ...]) -> None:
    x, y = (
        torch.randn(5, widths[0], generator=generator()),
        torch.randn(5, widths[-1], generator=generator()),
    )
    with pytest.raises(ValueError, match="has no elements"):
        BayesianModel(perceptron(*widths), priors.Normal(), likelihoods.Gaussian(1.0), x, y)


@needs_compiler
def test_no_rows_to_draw() -> None:
    for shape, size in (((3,), 0), ((0,), 4), ((0, 2), 0)):
        rows = compiled.stratified_rows(shape, size, 10, generator(), F64)
        assert rows is not None
        assert rows.shape == (*shape, size)


# ---------------------------------------- equal to torch


@pytest.mark.parametrize("excess", [-4.0, 0.0, 3.0, 7.0])
@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
def test_all_tails_of_students_law(dtype: torch.dtype, excess: float) -> None:
    model = model_of("varying student", n=200, dtype=dtype)
    theta = points(model, 3)
    theta[:, -1] = excess
    assert_equal_to_torch(model, theta)


@pytest.mark.crossed
@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equal_to_torch(activation: str, likelihood: str, dtype: torch.dtype) -> None:
    model = model_of(
        likelihood, (3, 7, 4), activation=activation, dtype=dtype, temperature=0.7
    )
    assert_equal_to_torch(
        model, points(model, 2, 3, scale=0.7 / FREQUENCY.get(activation, 1.0))
    )


@needs_compiler
@settings(max_examples=25)
@given(st.data())
def test_equal_to_torch_for_every_shape(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=4))
    activation = data.draw(st.sampled_from(sorted(ACTIVATIONS)))
    model = model_of(
        data.draw(st.sampled_from(sorted(OURS))),
        tuple(widths),
        data.draw(st.integers(6, 1000)),
        data.draw(st.sampled_from([F32, F64])),
        bias=data.draw(st.booleans()),
        activation=activation,
        last=data.draw(st.sampled_from(["identity", "tanh", "silu"])),
    )
    assert model.is_compiled
    theta = points(
        model,
        data.draw(st.integers(1, 65)),
        scale=2 / max(widths) ** 0.5 / FREQUENCY.get(activation, 1.0),
    )
    assert_equal_to_torch(model, theta, slack=3.0)  # scales of the noise are exp(outputs)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 255, 256, 257])
@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
def test_every_number_of_rows(n: int, dtype: torch.dtype) -> None:
    model = model_of("learned", n=n, dtype=dtype)
    assert_equal_to_torch(model, points(model, 3))
    assert_equal_to_torch(model, points(model))


@pytest.mark.parametrize(
    "likelihood",
    ["learned", "categorical", "student", "negative binomial", "poisson", "ordinal", "own"],
)
def test_rows_of_their_own(likelihood: str) -> None:
    model = model_of(likelihood)
    theta = points(model, 2, 3)
    for shape in [(5,), (40,), (2, 3, 5), (2, 3, 1)]:
        rows = torch.randint(len(model.x), shape, generator=generator(4))
        assert_equal_to_torch(model, theta, rows)
    own = model.log_joint_and_grad(theta, rows)
    torch.testing.assert_close(
        own, model.log_joint_and_grad(theta, rows.mT.contiguous().mT), rtol=0, atol=0
    )
    for row in (-1, len(model.x)):
        with pytest.raises(IndexError):
            model.log_joint_and_grad(theta, torch.tensor([0, row]))


@pytest.mark.parametrize(
    "prior",
    [
        priors.Laplace(0.4, 0.2),
        priors.StudentT(3.0, 0.5, -0.1),
        priors.FanIn(),
        td.Cauchy(0.0, 1.0),
        priors.Horseshoe(),
        priors.OutputScales(scale=0.7),
        priors.Horseshoe(0.3, 1.5, 5.0, local="weight", bias_scale=0.5),
        priors.Hierarchical(),
        priors.Hierarchical(td.HalfCauchy(0.7), fan_in=True),
        priors.Hierarchical(td.LogNormal(-0.3, 0.6)),
        priors.Hierarchical(td.Gamma(2.0, 1.5)),
        priors.Hierarchical(td.InverseGamma(2.0, 1.5), fan_in=True),
        priors.Hierarchical(td.Exponential(0.7)),
        priors.Hierarchical(td.Weibull(0.7, 1.2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("likelihood", ["gaussian", "learned", "learned two", "ordinal"])
def test_every_prior(likelihood: str, prior: Any) -> None:
    model = model_of(likelihood, prior=prior, temperature=2.0)
    assert_equal_to_torch(model, points(model, 3))


@needs_compiler
@pytest.mark.parametrize(
    "scale_prior",
    [td.HalfNormal(1.0), td.HalfCauchy(1.0), td.Gamma(2.0, 1.0), td.Weibull(1.0, 1.5)],
)
def test_priors_with_parameters_are_compiled_where_their_families_are(
    scale_prior: td.Distribution,
) -> None:
    model = model_of("gaussian", prior=priors.Hierarchical(scale_prior))
    fused = model.density.fused
    assert fused is not None
    assert (fused.added_prior is None) == (not isinstance(scale_prior, td.Weibull))
    theta = points(model, 4)
    theta[0, 0], theta[1, -1] = torch.nan, torch.nan  # a weight, a scale
    value, grad = model.log_joint_and_grad(theta)
    assert value.isnan().tolist() == [True, True, False, False]
    assert grad[:2].isnan().any(1).all()
    assert grad[2:].isfinite().all()


@needs_compiler
def test_strided_and_expanded_weights() -> None:
    model = model_of("learned")
    theta = points(model, 6)
    expected = model.log_joint_and_grad(theta)
    transposed = theta.T.contiguous().T
    wide = torch.zeros(6, 2 * model.dim, dtype=F64)
    wide[:, ::2] = theta
    for view in (transposed, wide[:, ::2], theta.reshape(2, 3, -1).mT.contiguous().mT):
        value, grad = model.log_joint_and_grad(view)
        assert torch.equal(value.flatten(), expected[0])
        assert torch.equal(grad.reshape(6, -1), expected[1])
    value, grad = model.log_joint_and_grad(theta[0].expand(4, -1))
    assert torch.equal(value, expected[0][:1].expand(4))
    assert torch.equal(grad, expected[1][:1].expand(4, -1))
    assert model.log_joint_and_grad(theta[:0])[1].shape == (0, model.dim)


@needs_compiler
def test_chains_do_not_depend_on_each_other_or_on_threads() -> None:
    model = model_of("learned", (3, 50, 50), n=700)
    theta = points(model, 9)
    value, grad = model.log_joint_and_grad(theta)
    alone = [model.log_joint_and_grad(row) for row in theta]
    assert torch.equal(torch.stack([v for v, _ in alone]), value)
    assert torch.equal(torch.stack([g for _, g in alone]), grad)
    try:
        torch.set_num_threads(3)
        assert fused.threads_for(9 * 700 * model.dim) > 1
        together = model.log_joint_and_grad(theta)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(together[0], value)
    assert torch.equal(together[1], grad)


def test_outputs_and_pullback() -> None:
    model = model_of("two targets", (3, 7, 4), activation="gelu", dtype=F32)
    theta, x = points(model, 5), torch.randn(40, 3, generator=generator(5))
    score = torch.randn(5, 40, 2, generator=generator(6))
    outputs, pullback = model.network.pullback(theta, x)
    expected, vjp = model.network.pullback(theta.clone().requires_grad_(), x)
    torch.testing.assert_close(outputs, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pullback(score), vjp(score).detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model.outputs(theta, x), outputs, rtol=0, atol=0)
    with pytest.raises(RuntimeError):
        model.network(theta, x[:, :2])


@needs_compiler
@pytest.mark.parametrize("likelihood", COUNTS)
def test_rates_that_overflow_are_no_finite_density(likelihood: str) -> None:
    for dtype in (F32, F64):
        model = model_of(likelihood, dtype=dtype)
        theta = points(model, 3)
        theta[1, model.spec.slices["2.bias"]] = 1000.0
        value, _ = model.log_joint_and_grad(theta)
        expected, _ = by_torch(model, theta)
        assert value.isfinite().tolist() == expected.isfinite().tolist()


@needs_compiler
def test_every_dispersion() -> None:
    """Against Poisson's law, where lgamma leaves no digit, and against torch where it leaves
    all.
    """
    model, poisson = model_of("negative binomial"), likelihoods.Poisson()
    theta = points(model, 6)
    theta[:, -1] = torch.tensor([-40.0, -20.0, -3.0, 0.0, 3.0, 6.0], dtype=F64)
    value, grad = model.log_likelihood_and_grad(theta)
    limit = poisson.log_prob(model.outputs(theta), model.y, {}).sum(-1)
    torch.testing.assert_close(value[:1], limit[:1], rtol=1e-13, atol=0)
    assert 1e-9 < float((value - limit)[1].abs()) < 1e-3
    leaf = theta.clone().requires_grad_()
    expected = model.log_likelihood(leaf)
    torch.testing.assert_close(value[2:], expected[2:].detach(), rtol=1e-11, atol=1e-11)
    (by_theta,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(grad[2:], by_theta[2:], rtol=1e-9, atol=1e-9)
    assert used(model)
    model.y[0, 0] = fused.LARGEST_COUNT + 1
    assert not used(model.subset(slice(None))), (
        "a table of logarithms would cost more than they do"
    )


# ---------------------------------------- extreme weights


@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("likelihood", [name for name in OURS if name not in COUNTS])
@pytest.mark.parametrize(
    "activation", ["tanh", "sigmoid", "relu", "silu", "gelu", "gelu_tanh"]
)
def test_large_weights_are_finite(
    activation: str, likelihood: str, dtype: torch.dtype
) -> None:
    model = model_of(likelihood, activation=activation, dtype=dtype)
    theta = points(model, 8, scale=100.0)
    theta[:, model.spec.network.dim :] = -1.0
    assert_equal_to_torch(model, theta, slack=100.0)  # residuals of 1e7 scales
    value, grad = model.log_joint_and_grad(theta)
    assert value.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.crossed
@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("likelihood", OURS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bad_weights_spoil_their_own_chain_alone(
    activation: str, likelihood: str, dtype: torch.dtype
) -> None:
    model = model_of(likelihood, activation=activation, dtype=dtype)
    theta = points(model, 5)
    good = model.log_joint_and_grad(theta)
    places = (0, 15, model.spec.network.dim - 1)
    for bad, where in itertools.product((math.nan, math.inf, -math.inf), places):
        spoiled = theta.clone()
        spoiled[2, where] = bad
        value, grad = model.log_joint_and_grad(spoiled)
        assert not value[2].isfinite()
        others = torch.arange(5) != 2
        assert torch.equal(value[others], good[0][others])
        assert torch.equal(grad[others], good[1][others])


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize(
    "activation", [name for name in ACTIVATIONS if not name.startswith("sin")]
)
def test_activations_and_slopes_over_the_whole_range(
    activation: str, dtype: torch.dtype
) -> None:
    info = torch.finfo(dtype)
    scale_exponents = (
        torch.logspace(-300, 300, 2001, dtype=F64)
        .clamp(float(info.tiny) / 1e3, float(info.max))
        .to(dtype)
    )
    a = torch.cat(
        [
            torch.linspace(-30, 30, 4001, dtype=dtype),
            scale_exponents,
            -scale_exponents,
            torch.tensor([0.0, -0.0], dtype=dtype),
        ]
    )
    if activation != "identity":
        # beyond, a * sigmoid(a) does not vanish: exp2 saturates
        a = a[a.abs() < info.max * info.eps / 8]
    a = torch.cat([a, torch.tensor([float("nan")], dtype=dtype)])[:, None]
    net = nn.Sequential(
        nn.utils.skip_init(nn.Linear, 1, 1, bias=False), ACTIVATIONS[activation]()
    ).to(dtype)
    spec = WeightSpec.of(net)
    network, theta = ChainNetwork(spec), torch.ones(len(a), 1, dtype=dtype)
    # a network for each number: the gradient by its weight is number * slope
    x = a[:, :, None]
    value, vjp = network.pullback(theta, x, per_network=True)
    got = vjp(torch.ones_like(value))
    exact = a.double().requires_grad_()
    expected = ACTIVATIONS[activation]()(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    if activation == "gelu_tanh":  # torch's own overflows in the cube
        slope = torch.where(
            exact.detach().abs() > 1e100, (exact.detach() > 0).double(), slope
        )
    tolerance = (
        100 if activation == "gelu_tanh" else 10
    ) * info.eps  # its 1 - sigmoid cancels
    size = a.double().abs().clamp(min=1.0)
    for mine, true in ((value[:, 0], expected.detach()), (got, slope * a.double())):
        assert torch.equal(mine.isnan(), true.isnan())
        assert ((mine.double() - true).abs() <= tolerance * size)[:-1].all()


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("w0", [1.0, 30.0, 0.3])
def test_sines_and_their_slopes_over_the_whole_range(w0: float, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    scale_exponents = (
        torch.logspace(-300, 300, 2001, dtype=F64)
        .clamp(float(info.tiny) / 1e3, float(info.max) / w0)
        .to(dtype)
    )
    # zeros and extremes
    quarters = (torch.arange(-400, 401, dtype=F64) * (math.pi / 4 / w0)).to(dtype)
    ranges = [
        torch.linspace(-span / w0, span / w0, 2001, dtype=dtype)
        for span in (2.0, 30.0, 1e4)
    ]
    special = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf], dtype=dtype)
    a = torch.cat([*ranges, quarters, scale_exponents, -scale_exponents, special])[:, None]
    net = nn.Sequential(nn.utils.skip_init(nn.Linear, 1, 1), Sine(w0)).to(dtype)
    network = ChainNetwork(WeightSpec.of(net))
    # a bias for each number, whose gradient is the slope
    theta = torch.cat([torch.zeros_like(a), a], 1)
    value, vjp = network.pullback(theta, torch.zeros(1, 1, dtype=dtype))
    slope = vjp(torch.ones_like(value))[:, 1:]
    angle = (a * w0).double()
    # An angle is as good as its last digit. The largest have none left, but a sine stays one.
    tolerance = 4 * info.eps * angle.abs().clamp(min=1.0)
    for mine, true in ((value[:, 0], angle.sin()), (slope / w0, angle.cos())):
        assert torch.equal(mine.isnan(), true.isnan())
        finite = true.isfinite()
        assert (mine.abs()[finite] <= 1 + 2 * info.eps).all()
        assert ((mine.double() - true).abs() <= tolerance)[finite].all()


# ---------------------------------------- random numbers


def threefry(key: int, counters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute Threefry-2x32-20 as its paper says it, for 64-bit counters."""
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    keys = [low, high, low ^ high ^ np.uint32(0x1BD11BDA)]
    a, b = (
        counters.astype(np.uint32) + low,
        (counters >> np.uint64(32)).astype(np.uint32) + high,
    )
    for r in range(20):
        turn = np.uint32([13, 15, 26, 6, 17, 29, 16, 24][r % 8])
        a = a + b
        b = (b << turn | b >> (np.uint32(32) - turn)) ^ a
        if r % 4 == 3:
            i = r // 4 + 1
            a, b = a + keys[i % 3], b + keys[(i + 1) % 3] + np.uint32(i)
    return a, b


def test_the_papers_numbers() -> None:
    known = [  # key, counter and words of Random123's known answers, low words first
        (0, 0, (0x6B200159, 0x99BA4EFE)),
        (2**64 - 1, 2**64 - 1, (0x1CB996FC, 0xBB002BE7)),
        (0x0370734413198A2E, 0x85A308D3243F6A88, (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, counter, words in known:
        a, b = threefry(key, np.array([counter], dtype=np.uint64))
        assert (int(a[0]), int(b[0])) == words


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
def test_compiled_numbers_are_those_of_threefry(dtype: torch.dtype) -> None:
    key, many = (
        int(torch.empty((), dtype=torch.int64).random_(generator=generator(8))),
        64 * 7,
    )
    rows = compiled.stratified_rows((many,), 1, 2**53, generator(8), dtype)
    assert rows is not None
    words = np.concatenate(threefry(key, np.arange(many, dtype=np.uint64)))
    # of every pair of words, the one in the upper bits
    halves = (rows.numpy() >> 21).astype(np.uint32)
    assert np.isin(halves, words).all()
    assert len(np.unique(halves)) == many
    library = compiled.library(dtype)
    assert library is not None
    out = torch.empty(1, 1, dtype=torch.int64)
    seen = []
    for key in (0, 1, 2**32, 2**62):  # every bit of the key counts
        library.bnnflow_rows(key, 1, 1, 2**53, out.data_ptr())
        seen.append(int(out))
    assert len(set(seen)) == 4


def z_scores(x: Tensor) -> dict[str, float]:
    """Return moments of what should be standard normal and independent, in units of their
    errors.
    """
    n, x = x.numel(), x.double().flatten()
    double_factorial = [1.0, 0, 1, 0, 3, 0, 15, 0, 105, 0, 945, 0, 10395]
    scores = {}
    for k in range(1, 7):
        error = math.sqrt((double_factorial[2 * k] - double_factorial[k] ** 2) / n)
        scores[f"moment {k}"] = (float(x.pow(k).mean()) - double_factorial[k]) / error
    for edge in (1e-3, 0.1, 2.0, 3.0, 4.0, 5.0):
        expected = n * math.erfc(edge / math.sqrt(2))
        scores[f"tail {edge}"] = (int((x.abs() > edge).sum()) - expected) / math.sqrt(
            expected * (1 - expected / n)
        )
        scores[f"sides {edge}"] = float(
            ((x > edge).sum() - (x < -edge).sum()) / math.sqrt(expected)
        )
    return scores


@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
def test_normal_numbers_are_normal(dtype: torch.dtype) -> None:
    x = compiled.normal_like(torch.empty(800, 5000, dtype=dtype), generator(1))
    assert x.isfinite().all()
    scores = z_scores(x)
    assert max(map(abs, scores.values())) < 4.5, scores
    assert scipy.stats.kstest(x[:100].double().flatten().numpy(), "norm").pvalue > 1e-3
    assert (
        scipy.stats.kstest(
            x[:200].double().square().sum(-1).numpy(), "chi2", args=(5000,)
        ).pvalue
        > 1e-3
    )


@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
def test_normal_numbers_are_independent(dtype: torch.dtype) -> None:
    g, like = generator(2), torch.empty(2**16, dtype=dtype)
    x = torch.stack(
        [compiled.normal_like(like, g) for _ in range(32)]
    ).double()  # (key, number)
    for series in (x, x.square() - 1, x.sign(), x.abs().log() + 0.635181422730739):
        spread = float(series.square().mean())
        spectrum = torch.fft.rfft(series, n=2 * series.shape[1])
        lags = torch.fft.irfft(spectrum.abs().square())[:, 1:2000].sum(0) / (
            spread * math.sqrt(series.numel())
        )
        assert lags.abs().max() < 5.5, "numbers of one key"
        keys = series @ series.mT / (spread * math.sqrt(series.shape[1]))
        assert (keys - keys.diagonal().diag()).abs().max() < 5, (
            "numbers of other keys, at the same place"
        )


def test_normal_numbers_of_neighbouring_keys_are_independent() -> None:
    library = compiled.library(F32)
    if library is None:
        pytest.skip("no compiler")
    keys = [*range(32), *(1 << bit for bit in range(5, 63))]
    x = torch.empty(len(keys), 2**14)
    for key, row in zip(keys, x, strict=True):
        library.bnnflow_normals(key, row.numel(), row.data_ptr())
    for series in (x, x.square() - 1):
        shared = (series @ series.mT) / (
            series.square().mean() * math.sqrt(series.shape[1])
        )
        assert (shared - shared.diagonal().diag()).abs().max() < 5


@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
def test_normal_numbers_are_determined_by_the_generator(dtype: torch.dtype) -> None:
    g = generator(3)
    for shape in ((), (0,), (1,), (3, 5), (16, 401), (127,), (128,), (129,)):
        state, like = g.get_state(), torch.zeros(shape, dtype=dtype)
        first, second = compiled.normal_like(like, g), compiled.normal_like(like, g)
        assert first.shape == shape
        assert first.dtype == dtype
        assert not first.numel() or not torch.equal(first, second)
        again = torch.Generator()
        again.set_state(state)
        assert torch.equal(compiled.normal_like(like, again), first)
        assert torch.equal(compiled.normal_like(like, again), second)


@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("own_metrics", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_langevin_step(layout: str, own_metrics: bool, dtype: torch.dtype) -> None:
    theta, grad = (torch.randn(2, 5, 401, generator=generator(), dtype=F64)).to(dtype)
    metric = torch.rand(5, 401, generator=generator(), dtype=F64).to(dtype)
    metric = metric if own_metrics else metric[0]
    if layout == "columns":
        theta = theta.mT.contiguous().mT
    expected = (
        theta
        + 0.3 * metric * grad
        + 0.7 * metric.sqrt() * compiled.normal_like(theta, generator(5))
    )
    found = compiled.langevin(theta, grad, metric, metric.sqrt(), 0.3, 0.7, generator(5))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("dim", [1, 16, 401])
def test_the_longest_gradient_and_what_is_not_finite(dim: int, dtype: torch.dtype) -> None:
    grad, value = (
        torch.randn(5, dim, generator=generator(), dtype=F64).to(dtype),
        torch.zeros(5, dtype=F64),
    )
    for root in (
        torch.full((dim,), 2.0, dtype=dtype),
        torch.full((5, dim), 2.0, dtype=dtype),
    ):
        norms = (2 * grad).norm(dim=-1)
        bound = compiled.max_norm(grad, root, value)
        assert 0.9999 * float(norms.max()) <= bound <= 1.0001 * float(norms.norm())
        for bad in (float("nan"), float("inf"), -float("inf")):
            for spoiled in (grad, value):
                changed = spoiled.clone()
                changed[3, ...] = bad
                arguments = (
                    (changed, root, value) if spoiled is grad else (grad, root, changed)
                )
                assert not math.isfinite(compiled.max_norm(*arguments))


# ---------------------------------------- derivatives


@pytest.mark.parametrize("likelihood", ["learned", "categorical", "student"])
def test_differentiable_in_every_way(likelihood: str) -> None:
    model = model_of(likelihood, (3, 4))
    theta, vector = points(model, 3), points(model, 3, seed=9)

    def grad(theta: Tensor) -> Tensor:
        return model.log_joint_and_grad(theta)[1]

    leaf = theta.clone().requires_grad_()
    first = torch.autograd.grad(model.log_joint(leaf).sum(), leaf, create_graph=True)[0]
    expected = torch.autograd.grad((first * vector).sum(), leaf)[0]
    leaf = theta.clone().requires_grad_()
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(
        torch.autograd.grad((grad(leaf) * vector).sum(), leaf)[0], expected, **close
    )
    torch.testing.assert_close(torch.func.vjp(grad, theta)[1](vector)[0], expected, **close)
    torch.testing.assert_close(
        torch.func.jvp(grad, (theta,), (vector,))[1], expected, **close
    )
    torch.testing.assert_close(torch.func.vmap(grad)(theta), grad(theta), **close)
    rowwise = torch.func.vmap(lambda t, v: torch.func.jvp(grad, (t,), (v,))[1])
    torch.testing.assert_close(rowwise(theta, vector), expected, **close)
    with torch.autograd.forward_ad.dual_level():
        dual = grad(torch.autograd.forward_ad.make_dual(theta, vector))
        torch.testing.assert_close(
            torch.autograd.forward_ad.unpack_dual(dual).tangent, expected, **close
        )
        # not a dual number: compiled
        torch.testing.assert_close(grad(theta), first.detach(), **close)
    with torch.no_grad():  # nothing is tracked here although theta asks for it
        assert not grad(leaf).requires_grad


def test_pullback_of_a_tracked_score() -> None:
    model = model_of("two targets")
    score = torch.randn(
        3, len(model.x), 2, generator=generator(), dtype=F64
    ).requires_grad_()
    outputs, pullback = model.network.pullback(points(model, 3), model.x)
    assert not outputs.requires_grad
    (by_score,) = torch.autograd.grad(pullback(score).square().sum(), score)
    assert by_score.isfinite().all()


# ---------------------------------------- where it applies


def used(model: BayesianModel) -> bool:
    return model.is_compiled


@needs_compiler
def test_the_models_that_are_compiled() -> None:
    assert used(model_of())
    assert used(model_of(dtype=F32).to(dtype=F64))
    for likelihood in OURS:
        assert used(model_of(likelihood)), likelihood
    assert not used(model_of("own")), "its network is, its likelihood is torch's"
    assert not used(model_of(widths=(3, fused.WIDEST + 1)))
    net = nn.Sequential(
        nn.utils.skip_init(nn.Linear, 3, 4), nn.Mish(), nn.utils.skip_init(nn.Linear, 4, 1)
    )
    x = torch.randn(9, 3, generator=generator())
    assert not used(BayesianModel(net, priors.Normal(), likelihoods.Gaussian(), x, x[:, 0]))
    model = model_of(dtype=F32)
    theta = points(model, 2)
    assert model.density.compiled(theta.double(), None) is None
    assert model.density.compiled(theta.requires_grad_(), None) is None
    assert not used(model.linearised(theta[0]))


def test_copies_have_densities_of_their_own() -> None:
    model = model_of("learned")
    theta = points(model, 3)
    expected = model.log_joint_and_grad(theta)
    part = model.subset(slice(7))
    assert_equal_to_torch(part, theta)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same.log_joint_and_grad(theta), expected, rtol=0, atol=0)
