"""Laws of the Bayesian model: densities against closed forms, gradients against autograd, and clear
refusals.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as pyro_dist
import pytest
import torch
import torch.distributions as td
import torch.nn.functional as F
from pyro import condition, plate, poutine
from scipy import integrate, stats
from torch import Tensor, nn

from bnnflow import BayesianModel, WeightSpec, likelihoods, priors
from bnnflow.activations import Activation, Sine
from bnnflow.model.network import ChainNetwork, ModuleNetwork
from bnnflow.model.priors import FlatPrior

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module], dtype: torch.dtype = F64) -> nn.Module:
    """Build a network from a seed, without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().to(dtype)


class Applied(nn.Module):
    """An activation without a module of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor) -> Tensor:
        return self.function(a)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "sin:3": lambda: Sine(3.0),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "elu": lambda: nn.ELU(0.7),
    "celu": lambda: nn.CELU(0.7),
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "softplus": lambda: nn.Softplus(1.5),
    "softsign": nn.Softsign,
    "tanhshrink": nn.Tanhshrink,
    "hardswish": nn.Hardswish,
    "sin": lambda: Applied(torch.sin),
}


@dataclass(frozen=True)
class Poisson:
    """y ~ Poisson(exp(output)): what a user writes, without ``score``."""

    kind: str = "regression"
    parameters = {}  # noqa: RUF012 - ten lines are ten lines

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        return y.reshape(len(y), n_outputs)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return td.Poisson(outputs.exp()).log_prob(y).sum(-1)

    def mean(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return outputs.exp()


@dataclass(frozen=True)
class StudentNoise:
    """A user's likelihood with two learned parameters, without ``score``."""

    kind: str = "regression"

    @property
    def parameters(self) -> dict[str, td.Distribution]:
        return {"scale": td.LogNormal(0.0, 1.0), "df": td.Gamma(2.0, 0.5)}

    def validate(self, y: Tensor, n_outputs: int) -> Tensor:
        return y.reshape(len(y), n_outputs)

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        scale, df = (parameters[name].unsqueeze(-2) for name in ("scale", "df"))
        return td.StudentT(df, outputs, scale).log_prob(y).sum(-1)

    def mean(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return outputs


def _counts(g: torch.Generator, n: int, targets: int = 1) -> Tensor:
    return torch.randint(6, (n, targets), generator=g).to(F64)


def _reals(g: torch.Generator, n: int, targets: int = 1) -> Tensor:
    return torch.randn(n, targets, generator=g, dtype=F64)


# likelihood, outputs, y
LIKELIHOODS: dict[str, tuple[Any, int, Callable[[torch.Generator, int], Tensor]]] = {
    "gaussian": (likelihoods.Gaussian(0.3), 1, _reals),
    "gaussian two targets": (likelihoods.Gaussian(0.3), 2, lambda g, n: _reals(g, n, 2)),
    "gaussian learned": (likelihoods.Gaussian(), 1, _reals),
    "gaussian learned two targets": (
        likelihoods.Gaussian(scale_prior=td.LogNormal(-1.0, 0.5)),
        2,
        lambda g, n: _reals(g, n, 2),
    ),
    "heteroscedastic": (likelihoods.HeteroscedasticGaussian(0.05), 2, _reals),
    "heteroscedastic two targets": (
        likelihoods.HeteroscedasticGaussian(),
        4,
        lambda g, n: _reals(g, n, 2),
    ),
    "categorical": (
        likelihoods.Categorical(),
        3,
        lambda g, n: torch.randint(3, (n,), generator=g),
    ),
    "bernoulli": (
        likelihoods.Bernoulli(),
        1,
        lambda g, n: torch.randint(2, (n,), generator=g),
    ),
    "poisson": (Poisson(), 1, _counts),
    "student": (StudentNoise(), 1, _reals),
}
OURS = [name for name in LIKELIHOODS if name not in ("poisson", "student")]


def perceptron(
    outputs: int, activation: str = "tanh", widths: tuple[int, ...] = (4, 3)
) -> nn.Module:
    def make() -> nn.Module:
        modules: list[nn.Module] = []
        size = 2
        for width in widths:
            modules += [nn.Linear(size, width), ACTIVATIONS[activation]()]
            size = width
        return nn.Sequential(*modules, nn.Linear(size, outputs, bias=activation != "relu"))

    return built(make)


def model_of(
    likelihood: str = "gaussian",
    activation: str = "tanh",
    *,
    dtype: torch.dtype = F64,
    prior: Any = None,
    net: nn.Module | None = None,
    x: Tensor | None = None,
    **options: Any,
) -> BayesianModel:
    what, outputs, targets = LIKELIHOODS[likelihood]
    net = net if net is not None else perceptron(outputs, activation)
    x = torch.randn(9, 2, generator=generator(1), dtype=F64) if x is None else x
    y = targets(generator(2), len(x))
    prior = priors.Normal(0.8) if prior is None else prior
    return BayesianModel(net.to(dtype), prior, what, x.to(dtype), y, **options)


def points(model: BayesianModel, *shape: int, seed: int = 3) -> Tensor:
    return 0.7 * torch.randn(*shape, model.dim, generator=generator(seed), dtype=F64).to(
        model.dtype
    )


# ---------------------------------------- outputs

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {}


def module(*shape: int) -> Callable:
    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        MODULES[make.__name__] = (make, shape)
        return make

    return register


@module(1, 6, 6)
def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
        nn.SiLU(),
        nn.Linear(3, 1),
    )


@module(3)
def residual() -> nn.Module:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.b(torch.tanh(self.a(x))))

    return Residual()


@module(3)
def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))


@module(3)
def one_axis() -> nn.Module:
    class Squeezed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze(-1)

    return Squeezed(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


@module(5, 3)
def attention() -> nn.Module:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(3, 6), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out(torch.softmax(q @ k.mT, -1) @ v).mean(-2)

    return Attention()


def module_model(name: str) -> BayesianModel:
    make, shape = MODULES[name]
    return model_of(
        "gaussian learned",
        net=built(make),
        x=torch.randn(6, *shape, generator=generator(1), dtype=F64),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-12)], ids=["f32", "f64"]
)
def test_fast_path_is_the_module_mapped(
    activation: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = model_of("gaussian two targets", activation, dtype=dtype)
    assert model.spec.layers, "this should take the fast path"
    theta = points(model, 2, 3)
    mapped = ModuleNetwork(model.net, model.spec)(theta.flatten(0, 1), model.x).reshape(
        2, 3, 9, 2
    )
    torch.testing.assert_close(model.outputs(theta), mapped, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ["tanh", "sin:3", "relu"])
def test_hidden_activations_are_those_of_the_module(activation: str) -> None:
    net = built(lambda: perceptron(2, activation))
    spec = WeightSpec.of(net)
    x, theta = (
        torch.randn(6, 2, generator=generator(), dtype=F64),
        spec.flatten(dict(net.named_parameters())).detach(),
    )
    found = ChainNetwork(spec).hidden(torch.stack([theta, -theta]), x)
    assert list(found) == list(spec.activations)
    h, layers = x, iter(found.values())
    for linear, function in zip(net[:-1:2], net[1::2], strict=True):
        h = function(linear(h))
        value = next(layers)
        assert value.shape == (2, h.shape[1], 6)
        torch.testing.assert_close(value[0], h.detach().mT)


@pytest.mark.parametrize("name", MODULES)
def test_any_module_is_evaluated(name: str) -> None:
    model = module_model(name)
    assert not model.spec.layers
    theta = points(model, 3)
    for row, outputs in zip(theta, model.outputs(theta), strict=True):
        expected = model.network_at(row)(model.x).reshape(6, 1)
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    assert model.log_joint(theta).isfinite().all()


def test_image_inputs_are_flattened() -> None:
    net = built(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 1))
    )
    model = model_of(net=net, x=torch.randn(5, 2, 4, generator=generator(), dtype=F64))
    theta = points(model)
    torch.testing.assert_close(model.outputs(theta), model.network_at(theta)(model.x))


def test_outputs_at_other_inputs() -> None:
    model = model_of()
    x, theta = torch.randn(4, 2, generator=generator(5)), points(model, 3)
    torch.testing.assert_close(
        model.outputs(theta, x.numpy()), model.outputs(theta, x.double())
    )
    assert model.outputs(theta, x).shape == (3, 4, 1)


def test_networks_go_there_and_back() -> None:
    model = model_of("gaussian learned")
    net = perceptron(1)
    theta = model.theta_of(net)
    assert torch.equal(theta[:-1], torch.nn.utils.parameters_to_vector(net.parameters()))
    assert theta[-1] == pytest.approx(math.log(0.1))
    torch.testing.assert_close(model.network_at(theta)(model.x), net(model.x))
    assert all(
        parameter.requires_grad for parameter in model.network_at(theta).parameters()
    )
    with pytest.raises(ValueError, match=r"0\.weight must be \(4, 2\)"):
        model.theta_of(built(lambda: nn.Sequential(nn.Linear(3, 4))))


def test_the_callers_network_and_arrays_stay_their_own() -> None:
    net, x, y = perceptron(1), np.random.default_rng(0).normal(size=(9, 2)), np.arange(9.0)
    model = BayesianModel(net, priors.Normal(), likelihoods.Gaussian(1.0), x, y)
    theta = points(model, 2)
    value = model.log_joint(theta)
    x += 1
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 1
    assert torch.equal(model.log_joint(theta), value)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_read_only_and_strided_arrays() -> None:
    x = np.random.default_rng(0).normal(size=(9, 2))[::-1]
    x.flags.writeable = False
    model = BayesianModel(
        perceptron(1), priors.Normal(), likelihoods.Gaussian(1.0), x, x[:, 0]
    )
    assert torch.equal(model.x, torch.tensor(x.copy()))


# ---------------------------------------- gradients


def autograd(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(function(theta).sum(), theta)[0]


@pytest.mark.crossed
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_autograd(activation: str, likelihood: str) -> None:
    model = model_of(likelihood, activation)
    theta = points(model, 2, 2)
    expected = autograd(model.log_likelihood, theta)
    value, grad = model.log_likelihood_and_grad(theta)
    scale = expected.abs().max()
    assert (grad - expected).abs().max() <= 1e-12 * scale
    assert torch.equal(model.log_likelihood_grad(theta), grad)
    torch.testing.assert_close(value, model.log_likelihood(theta), rtol=1e-12, atol=1e-12)

    single = model.to(dtype=torch.float32)
    assert (
        single.log_likelihood_grad(theta.float()) - expected
    ).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize(
    "prior", [priors.Normal(0.5, 0.1), priors.Laplace(0.4), priors.StudentT(3.0)], ids=str
)
@pytest.mark.parametrize("likelihood", ["gaussian learned", "student", "categorical"])
def test_log_joint_and_grad(likelihood: str, prior: Any) -> None:
    model = model_of(likelihood, prior=prior, temperature=0.7)
    theta = points(model, 3)
    value, grad = model.log_joint_and_grad(theta)
    torch.testing.assert_close(value, model.log_joint(theta), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        grad, autograd(model.log_joint, theta), rtol=1e-10, atol=1e-10
    )
    assert value.dtype == F64


@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_any_module(name: str) -> None:
    model = module_model(name)
    theta = points(model, 2)
    with torch.no_grad():  # as the samplers call it
        value, grad = model.log_joint_and_grad(theta)
    torch.testing.assert_close(value, model.log_joint(theta))
    torch.testing.assert_close(
        grad, autograd(model.log_joint, theta), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("source", ["tanh", "silu", "conv"])
def test_gradient_is_differentiable_again(source: str, likelihood: str) -> None:
    if source == "conv":
        make, shape = MODULES["conv"]
        outputs = LIKELIHOODS[likelihood][1]
        net = built(lambda: nn.Sequential(*list(make())[:-1], nn.Linear(3, outputs)))
        model = model_of(
            likelihood, net=net, x=torch.randn(6, *shape, generator=generator(1), dtype=F64)
        )
    else:
        model = model_of(likelihood, source)
    theta, vector = points(model, 2), points(model, 2, seed=7)

    leaf = theta.clone().requires_grad_()
    gradient = torch.autograd.grad(
        model.log_likelihood(leaf).sum(), leaf, create_graph=True
    )[0]
    # a Hessian is symmetric: VJP and JVP agree
    expected = torch.autograd.grad((gradient * vector).sum(), leaf)[0]

    leaf = theta.clone().requires_grad_()
    vjp = torch.autograd.grad((model.log_likelihood_grad(leaf) * vector).sum(), leaf)[0]
    torch.testing.assert_close(vjp, expected, rtol=1e-9, atol=1e-9)
    functional = torch.func.vjp(model.log_likelihood_grad, theta)[1](vector)[0]
    torch.testing.assert_close(functional, expected, rtol=1e-9, atol=1e-9)
    jvp = torch.func.jvp(model.log_likelihood_grad, (theta,), (vector,))[1]
    torch.testing.assert_close(jvp, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_derivatives(name: str) -> None:
    f = model_of("gaussian", name).spec.activations["h1"]
    a = torch.linspace(-4, 4, 81, dtype=F64) + 0.011  # off the kinks
    expected = autograd(f, a)
    torch.testing.assert_close(f.derivative(a, f(a)), expected, rtol=1e-12, atol=1e-14)
    if f.odd:
        torch.testing.assert_close(f(-a), -f(a), rtol=1e-13, atol=1e-15)
    else:
        assert not torch.allclose(f(-a), -f(a))
    assert torch.allclose(f(2.5 * a), 2.5 * f(a), rtol=1e-13) == f.homogeneous


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation 'cube'"):
        Activation("cube")


# ---------------------------------------- likelihoods


def oracle(name: str, outputs: Tensor, scale: Tensor) -> td.Distribution:
    """Return torch's distribution of a row of y, ``scale`` being ``(..., 1)``."""
    likelihood = LIKELIHOODS[name][0]
    if name.startswith("gaussian"):
        fixed = likelihood.scale
        return td.Independent(
            td.Normal(outputs, scale.unsqueeze(-1) if fixed is None else fixed), 1
        )
    if name.startswith("heteroscedastic"):
        mean, raw = outputs.chunk(2, -1)
        return td.Independent(td.Normal(mean, F.softplus(raw) + likelihood.min_scale), 1)
    return (
        td.Categorical(logits=outputs)
        if name == "categorical"
        else td.Bernoulli(logits=outputs.squeeze(-1))
    )


def rows(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    likelihood, n_outputs, targets = LIKELIHOODS[name]
    outputs = 2 * torch.randn(3, 9, n_outputs, generator=generator(4), dtype=F64)
    y = likelihood.validate(targets(generator(5), 9), n_outputs)
    scale = torch.rand(3, 1, generator=generator(6), dtype=F64) + 0.2
    return outputs, y, dict.fromkeys(likelihood.parameters, scale)


@pytest.mark.parametrize("name", OURS)
def test_log_prob_is_torchs_with_every_constant(name: str) -> None:
    outputs, y, parameters = rows(name)
    distribution = oracle(
        name, outputs, parameters.get("scale", torch.ones(3, 1, dtype=F64))
    )
    expected = distribution.log_prob(y.to(F64) if name == "bernoulli" else y)
    log_prob = LIKELIHOODS[name][0].log_prob(outputs, y, parameters)
    assert log_prob.shape == (3, 9)
    torch.testing.assert_close(log_prob, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OURS)
def test_score_is_the_gradient(name: str) -> None:
    outputs, y, parameters = rows(name)
    likelihood = LIKELIHOODS[name][0]
    logs = {key: value.log().requires_grad_() for key, value in parameters.items()}
    outputs.requires_grad_()
    total = likelihood.log_prob(
        outputs, y, {key: log.exp() for key, log in logs.items()}
    ).sum()
    expected = torch.autograd.grad(total, [outputs, *logs.values()])
    by_outputs, by_parameters = likelihood.score(outputs, y, parameters)
    assert list(by_parameters) == list(likelihood.parameters)
    for found, wanted in zip([by_outputs, *by_parameters.values()], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OURS)
def test_fisher_factor_is_the_covariance_of_the_score(name: str) -> None:
    outputs, _, parameters = rows(name)
    likelihood = LIKELIHOODS[name][0]
    factor, information = likelihood.fisher_factor(outputs, parameters)
    if likelihood.kind == "classification":  # exact: a sum over the labels
        probs = likelihood.mean(outputs)  # (3, 9, classes)
        expected = torch.zeros(*outputs.shape, outputs.shape[-1], dtype=F64)
        for label in range(probs.shape[-1]):
            score = likelihood.score(outputs, torch.full((9,), label), parameters)[0]
            expected += (
                probs[..., label, None, None] * score.unsqueeze(-1) * score.unsqueeze(-2)
            )
    else:  # exact: Gauss-Hermite quadrature of a quartic, one target after the other
        nodes, weights = (
            torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(6)
        )
        mean, sd = likelihood.mean(outputs), likelihood.variance(outputs, parameters).sqrt()
        expected = torch.zeros(*outputs.shape, outputs.shape[-1], dtype=F64)
        for zs in torch.cartesian_prod(*[torch.arange(6)] * mean.shape[-1]).reshape(
            -1, mean.shape[-1]
        ):
            score, _ = likelihood.score(outputs, mean + sd * nodes[zs], parameters)
            weight = (weights[zs] / math.sqrt(2 * math.pi)).prod()
            expected += weight * score.unsqueeze(-1) * score.unsqueeze(-2)
        if information:  # the scores of independent rows and targets add: 2 for each
            torch.testing.assert_close(
                information["scale"],
                torch.full((3, 1), 2.0 * 9 * mean.shape[-1], dtype=F64),
            )
    torch.testing.assert_close(factor @ factor.mT, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", OURS)
def test_gauss_newton_is_the_fisher_matrix(name: str) -> None:
    model = model_of(name, temperature=1.3)
    theta = points(model, 2)
    grad, factor = model.at(theta).grad_and_factor()
    torch.testing.assert_close(
        grad, model.log_likelihood_grad(theta), rtol=1e-10, atol=1e-10
    )
    size, likelihood = model.spec.network.dim, model.likelihood
    for row, a in zip(theta, factor, strict=True):
        # (n, out, network dim)
        jacobian = torch.func.jacrev(model.outputs)(row)[..., :size]
        fisher = torch.func.hessian(
            lambda o, row=row: _expected_minus(likelihood, o, model, row)
        )
        outputs = model.outputs(row)
        expected = torch.zeros(model.dim, model.dim, dtype=F64)
        flat = jacobian.reshape(-1, size)
        expected[:size, :size] = (
            flat.T @ fisher(outputs).reshape(len(flat), len(flat)) @ flat
        )
        for i in range(size, model.dim):
            expected[i, i] = 2.0 * model.y.numel()
        torch.testing.assert_close(a.T @ a, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [None, torch.tensor([4, 1, 4])])
@pytest.mark.parametrize("name", OURS)
def test_gauss_newton_products_are_those_of_the_matrix(
    name: str, rows: Tensor | None
) -> None:
    model = model_of(name, temperature=1.3)
    theta = points(model, 3)
    grad, factor = model.at(theta, rows).grad_and_factor()
    torch.testing.assert_close(
        grad, model.log_likelihood_grad(theta, rows), rtol=1e-9, atol=1e-9
    )
    same, product = model.at(theta, rows).grad_and_product()
    v = points(model, 3).flip(0)
    torch.testing.assert_close(same, grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        product(v), torch.einsum("brd,bre,be->bd", factor, factor, v), rtol=1e-9, atol=1e-9
    )


def _expected_minus(
    likelihood: Any, outputs: Tensor, model: BayesianModel, theta: Tensor
) -> Tensor:
    """Return KL(p(y | fixed outputs) || p(y | outputs)) summed over rows: its Hessian at equality
    is Fisher's.
    """
    parameters = {
        name: value.unsqueeze(0)
        for name, value in model.likelihood_parameters(theta).items()
    }
    name = next(key for key, (each, *_) in LIKELIHOODS.items() if each is likelihood)
    scale = parameters.get("scale", torch.ones(1, 1, dtype=F64))
    fixed = oracle(name, model.outputs(theta).unsqueeze(0), scale)
    return td.kl_divergence(fixed, oracle(name, outputs.unsqueeze(0), scale)).sum()


def test_gauss_newton_of_any_module() -> None:
    model = module_model("conv")
    theta = points(model, 2)
    grad, factor = model.at(theta).grad_and_factor()
    torch.testing.assert_close(grad, model.log_likelihood_grad(theta), rtol=1e-9, atol=1e-9)
    assert factor.shape == (2, 6 + 1, model.dim)
    with pytest.raises(ValueError, match="Poisson has no fisher_factor"):
        model_of("poisson").at(theta[:, :31]).grad_and_factor()


@pytest.mark.parametrize("name", OURS)
def test_predictive_moments_are_torchs(name: str) -> None:
    outputs, y, parameters = rows(name)
    likelihood = LIKELIHOODS[name][0]
    distribution = oracle(
        name, outputs, parameters.get("scale", torch.ones(3, 1, dtype=F64))
    )
    if likelihood.kind == "classification":
        probs = distribution.probs
        probs = torch.stack([1 - probs, probs], -1) if name == "bernoulli" else probs
        torch.testing.assert_close(likelihood.mean(outputs), probs)
        return
    torch.testing.assert_close(likelihood.mean(outputs), distribution.mean)
    torch.testing.assert_close(
        likelihood.variance(outputs, parameters), distribution.variance
    )
    torch.testing.assert_close(
        likelihood.cdf(outputs, y, parameters), distribution.base_dist.cdf(y)
    )


def test_a_users_likelihood_needs_no_score() -> None:
    model = model_of("poisson")
    theta = points(model, 3)
    expected = td.Poisson(model.outputs(theta).exp()).log_prob(model.y).sum((-1, -2))
    torch.testing.assert_close(model.log_likelihood(theta), expected)


# ---------------------------------------- priors

EVERY_PRIOR: dict[str, tuple[Any, Any]] = {  # prior, scipy's law of one weight
    "normal": (priors.Normal(0.7, 0.2), stats.norm(0.2, 0.7)),
    "laplace": (priors.Laplace(0.7, -0.1), stats.laplace(-0.1, 0.7)),
    "student-t": (priors.StudentT(3.0, 0.5, 0.1), stats.t(3.0, 0.1, 0.5)),
    "cauchy": (td.Cauchy(0.0, 0.3), stats.cauchy(0.0, 0.3)),
    "pyro": (pyro_dist.Normal(0.1, 2.0), stats.norm(0.1, 2.0)),
    "pyro events": (
        {
            "0.weight": pyro_dist.Normal(torch.full((3, 2), 0.5), 2.0).to_event(2),
            "0.bias": td.Normal(0.5, 2.0),
        },
        stats.norm(0.5, 2.0),
    ),
}
SCALE_PRIORS: dict[str, tuple[td.Distribution, Any]] = {
    "half-normal": (td.HalfNormal(0.5), stats.halfnorm(scale=0.5)),
    "half-cauchy": (td.HalfCauchy(0.5), stats.halfcauchy(scale=0.5)),
    "log-normal": (td.LogNormal(-1.0, 0.5), stats.lognorm(0.5, scale=math.exp(-1))),
    "gamma": (td.Gamma(2.0, 3.0), stats.gamma(2.0, scale=1 / 3)),
    "inverse gamma": (td.InverseGamma(3.0, 2.0), stats.invgamma(3.0, scale=2.0)),
    "exponential": (td.Exponential(2.0), stats.expon(scale=0.5)),
}


def linear(
    prior: Any = None, scale_prior: td.Distribution | None = None, **options: Any
) -> BayesianModel:
    likelihood = (
        likelihoods.Gaussian(0.5)
        if scale_prior is None
        else likelihoods.Gaussian(scale_prior=scale_prior)
    )
    net = nn.Sequential(built(lambda: nn.Linear(2, 3)))
    x = torch.randn(9, 2, generator=generator(1), dtype=F64)
    prior = priors.Normal() if prior is None else prior
    return BayesianModel(net, prior, likelihood, x, _reals(generator(2), 9, 3), **options)


@pytest.mark.parametrize("name", EVERY_PRIOR)
def test_prior_density_and_samples(name: str) -> None:
    prior, law = EVERY_PRIOR[name]
    model = linear(prior)
    theta = points(model, 4)
    expected = law.logpdf(theta.numpy()).sum(-1)
    np.testing.assert_allclose(model.log_prior(theta).numpy(), expected, rtol=1e-7)
    draws = model.sample_prior(4000, seed=1)
    assert draws.shape == (4000, 9)
    for column in draws.T:
        assert stats.kstest(column.numpy(), law.cdf).pvalue > 1e-4


@pytest.mark.parametrize("name", SCALE_PRIORS)
def test_learned_scale_carries_its_jacobian(name: str) -> None:
    prior, law = SCALE_PRIORS[name]
    model = linear(scale_prior=prior)
    theta = torch.zeros(1, model.dim, dtype=F64)
    rest = stats.norm.logpdf(np.zeros(9)).sum()

    def density(log_scale: float) -> float:
        theta[0, -1] = log_scale
        return math.exp(float(model.log_prior(theta)) - rest)

    assert integrate.quad(density, -40, 40, limit=400, points=[-5, 0, 5])[
        0
    ] == pytest.approx(1, abs=1e-6)
    draws = model.sample_prior(4000, seed=2)[:, -1].exp()
    assert stats.kstest(draws.numpy(), law.cdf).pvalue > 1e-4


def test_fan_in_keeps_the_size_of_functions() -> None:
    spec = WeightSpec.of(perceptron(1, widths=(64,)))
    scales = {
        name: float(d.scale)
        for name, d in priors.FanIn(1.5, 0.3).distributions(spec).items()
    }
    assert scales == pytest.approx(
        {"0.weight": 1.5 / math.sqrt(2), "0.bias": 0.3, "2.weight": 1.5 / 8, "2.bias": 0.3}
    )


@pytest.mark.parametrize(
    "prior", [priors.Normal(), priors.StudentT(), priors.Laplace()], ids=str
)
def test_sample_prior_depends_on_the_seed_alone(prior: Any) -> None:
    model, state = linear(prior, td.HalfNormal(1.0)), torch.get_rng_state()
    assert torch.equal(model.sample_prior(5, 7), model.sample_prior(5, 7))
    assert not torch.equal(model.sample_prior(5, 7), model.sample_prior(5, 8))
    g = generator(7)
    first = model.sample_prior(5, g)
    assert torch.equal(first, model.sample_prior(5, 7))
    assert not torch.equal(first, model.sample_prior(5, g))  # a generator advances
    assert torch.equal(torch.get_rng_state(), state)


def test_temperature_divides_prior_and_likelihood() -> None:
    cold, plain = (
        model_of("gaussian learned", temperature=0.25),
        model_of("gaussian learned"),
    )
    theta = points(plain, 3)
    torch.testing.assert_close(cold.log_joint(theta), 4 * plain.log_joint(theta))
    torch.testing.assert_close(cold.log_prior(theta), plain.log_prior(theta))
    torch.testing.assert_close(cold.log_likelihood(theta), plain.log_likelihood(theta))
    torch.testing.assert_close(
        cold.log_joint_and_grad(theta)[1], 4 * plain.log_joint_and_grad(theta)[1]
    )


COORDINATES = {
    "normal": (priors.Normal(0.7, 0.2), None),
    "fan-in": (priors.FanIn(), None),
    "laplace": (priors.Laplace(0.7, -0.1), None),
    "cauchy": (td.Cauchy(0.0, 0.3), None),
    "learned half-normal": (priors.Normal(), td.HalfNormal(0.5)),
    "learned log-normal": (priors.Laplace(), td.LogNormal(-1.0, 0.5)),
}


@pytest.mark.parametrize("name", COORDINATES)
def test_normal_coordinates(name: str) -> None:
    model = linear(*COORDINATES[name])
    prior = model.flat_prior
    prior.require_coordinates()
    z = 1.5 * torch.randn(50, model.dim, generator=generator(), dtype=F64)
    theta = prior.from_normal(z)
    torch.testing.assert_close(prior.to_normal(theta), z, rtol=1e-7, atol=1e-7)
    slope = autograd(prior.from_normal, z)
    assert (slope > 0).all()
    torch.testing.assert_close(
        prior.jvp(z, torch.ones_like(z)), slope, rtol=1e-7, atol=1e-9
    )
    torch.testing.assert_close(
        prior.log_jacobian(theta), -slope.log().sum(-1), rtol=1e-7, atol=1e-7
    )
    # The prior is N(0, I) there.
    standard = td.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(
        prior.log_prob(theta), standard + prior.log_jacobian(theta), rtol=1e-7, atol=1e-7
    )


def test_normal_coordinates_of_far_tails() -> None:
    prior = linear(priors.Laplace(1.0)).flat_prior
    z = torch.linspace(-6, 6, 25, dtype=F64).unsqueeze(-1).expand(-1, 9)
    torch.testing.assert_close(
        prior.to_normal(prior.from_normal(z)), z, rtol=1e-5, atol=1e-7
    )
    single = prior.to("cpu", torch.float32)
    torch.testing.assert_close(
        single.from_normal(z.float()), prior.from_normal(z).float(), rtol=1e-5, atol=1e-5
    )
    assert prior.to_normal(torch.full((1, 9), 500.0, dtype=F64)).isfinite().all()


@pytest.mark.parametrize(
    "prior", [priors.StudentT(), td.Gumbel(0.0, 1.0)], ids=["StudentT", "Gumbel"]
)
def test_every_prior_has_normal_coordinates(prior: Any) -> None:
    flat_prior = linear(prior).flat_prior
    flat_prior.require_coordinates()
    theta = flat_prior.sample(4000, 0)
    assert (
        min(
            stats.kstest(column.numpy(), "norm").pvalue
            for column in flat_prior.to_normal(theta).T
        )
        > 1e-4
    )


@pytest.mark.parametrize("prior", [*EVERY_PRIOR.values()], ids=[*EVERY_PRIOR])
def test_prior_description_round_trip(prior: Any) -> None:
    model = linear(prior[0], td.LogNormal(-1.0, 0.5))
    rebuilt = FlatPrior.from_description(model.flat_prior.describe(), F64)
    theta = points(model, 3)
    assert torch.equal(rebuilt.log_prob(theta), model.log_prior(theta))
    assert torch.equal(rebuilt.sample(2, 0), model.sample_prior(2, 0))


# ---------------------------------------- other views


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(
    "likelihood", ["gaussian", "gaussian learned", "categorical", "student", "poisson"]
)
def test_pyro_sees_the_same_density(likelihood: str, temperature: float) -> None:
    model = model_of(likelihood, prior=priors.Laplace(0.5), temperature=temperature)
    for theta in points(model, 3):
        trace = poutine.trace(condition(model.to_pyro(), _sites(model, theta))).get_trace()
        # Pyro's density is over positive parameters; theirs logarithms add the log-Jacobian.
        log_jacobian = theta[model.spec.network.dim :].sum()
        torch.testing.assert_close(
            trace.log_prob_sum() + log_jacobian, model.log_joint(theta)
        )


def test_pyro_sees_the_same_density_under_a_plate() -> None:
    model = model_of("gaussian learned")
    theta = points(model, 5)

    def batched() -> None:
        with plate("particles", 5, dim=-1):
            model.to_pyro()()

    trace = poutine.trace(condition(batched, _sites(model, theta))).get_trace()
    trace.compute_log_prob()
    total = sum(
        site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"
    )
    torch.testing.assert_close(total + theta[:, -1], model.log_joint(theta))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_pyro_keeps_the_models_precision(dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        trace = poutine.trace(
            model_of("gaussian learned", dtype=dtype).to_pyro()
        ).get_trace()
    sampled = [
        site["value"]
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site["is_observed"]
    ]
    assert {value.dtype for value in sampled} == {dtype}


def _sites(model: BayesianModel, theta: Tensor) -> dict[str, Tensor]:
    params = model.spec.unflatten(theta)
    return {
        name.replace("likelihood.log_", "likelihood."): value.exp()
        if name in model.spec.extras
        else value
        for name, value in params.items()
    }


def test_to_another_precision() -> None:
    model = model_of("gaussian learned", prior=priors.Laplace(0.4))
    single = model.to(dtype=torch.float32)
    theta = points(model, 3)
    assert (single.dtype, model.dtype) == (torch.float32, F64)
    assert single.outputs(theta.float()).dtype == torch.float32
    torch.testing.assert_close(
        single.log_joint(theta.float()), model.log_joint(theta), rtol=1e-5, atol=1e-4
    )
    assert single.sample_prior(4, 0).dtype == torch.float32
    conv = module_model("conv").to(dtype=torch.float32)
    assert conv.log_joint(torch.zeros(2, conv.dim)).isfinite().all()


def test_fingerprint_tells_models_apart() -> None:
    x, y = torch.randn(9, 2, generator=generator(1), dtype=F64), _reals(generator(2), 9)

    def fingerprint(
        net: nn.Module | None = None,
        prior: Any = None,
        likelihood: Any = None,
        x=x,
        y=y,
        **options,
    ) -> str:
        net = perceptron(1) if net is None else net
        likelihood = likelihoods.Gaussian(0.3) if likelihood is None else likelihood
        return BayesianModel(
            net, prior or priors.Normal(), likelihood, x, y, **options
        ).fingerprint()

    def strided(stride: int) -> nn.Module:
        return built(
            lambda: nn.Sequential(
                nn.Conv1d(1, 2, 1, stride=stride), nn.AdaptiveAvgPool1d(1), nn.Flatten()
            )
        )

    two = {"y": _reals(generator(2), 9, 2), "x": x.unsqueeze(1)}
    variants = [
        fingerprint(),
        fingerprint(x=x + 1),
        fingerprint(y=y + 1),
        fingerprint(x=x[:-1], y=y[:-1]),
        fingerprint(perceptron(1, "sigmoid")),
        fingerprint(perceptron(1, "leaky_relu")),
        fingerprint(perceptron(1, widths=(5, 3))),
        fingerprint(prior=priors.Normal(2.0)),
        fingerprint(prior=priors.Laplace(1.0)),
        fingerprint(prior=priors.FanIn()),
        fingerprint(likelihood=likelihoods.Gaussian(0.4)),
        fingerprint(likelihood=likelihoods.Gaussian()),
        fingerprint(likelihood=likelihoods.Gaussian(scale_prior=td.HalfNormal(2.0))),
        fingerprint(likelihood=likelihoods.Gaussian(scale_prior=td.HalfCauchy(1.0))),
        fingerprint(perceptron(2), likelihood=likelihoods.HeteroscedasticGaussian(1e-3)),
        fingerprint(perceptron(2), likelihood=likelihoods.HeteroscedasticGaussian(1e-2)),
        fingerprint(temperature=0.5),
        fingerprint(strided(1), **two),
        fingerprint(strided(2), **two),
    ]
    assert len(set(variants)) == len(variants)
    assert fingerprint() == variants[0]
    single = model_of(dtype=torch.float32)
    assert single.to(dtype=F64).fingerprint() == single.fingerprint()


def test_batches_of_every_shape_agree() -> None:
    model = model_of("gaussian learned")
    theta = points(model, 2, 3)
    expected = torch.stack([model.log_joint(row) for row in theta.flatten(0, 1)]).reshape(
        2, 3
    )
    torch.testing.assert_close(model.log_joint(theta), expected)
    assert model.outputs(theta).shape == (2, 3, 9, 1)
    assert model.pointwise_log_likelihood(theta).shape == (2, 3, 9)
    torch.testing.assert_close(
        model.pointwise_log_likelihood(theta).sum(-1), model.log_likelihood(theta)
    )
    x, y = model.x[:4], model.y[:4]
    torch.testing.assert_close(
        model.pointwise_log_likelihood(theta, x, y),
        model.pointwise_log_likelihood(theta)[..., :4],
    )


# ---------------------------------------- mini-batches


def with_module(name: str, likelihood: str, **options: Any) -> BayesianModel:
    """A perceptron for ``""``, else a registered module, whose targets fit its one output."""
    if not name:
        return model_of(likelihood, **options)
    make, shape = MODULES[name]
    return model_of(
        likelihood,
        net=built(make),
        x=torch.randn(7, *shape, generator=generator(1), dtype=F64),
        **options,
    )


@pytest.mark.parametrize(
    "source", ["", "conv", "attention"], ids=["perceptron", "conv", "attention"]
)
@pytest.mark.parametrize("likelihood", ["gaussian learned", "student", "bernoulli"])
def test_all_batches_of_one_row_average_to_the_gradient(
    likelihood: str, source: str
) -> None:
    model = with_module(source, likelihood, temperature=0.7, prior=priors.Laplace(0.5))
    theta, n = points(model, 3), len(model.x)
    pairs = [model.log_joint_and_grad(theta, torch.tensor([row])) for row in range(n)]
    value, grad = model.log_joint_and_grad(theta)
    torch.testing.assert_close(
        torch.stack([v for v, _ in pairs]).mean(0), value, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        torch.stack([g for _, g in pairs]).mean(0), grad, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    "source", ["", "conv", "layer_norm"], ids=["perceptron", "conv", "layer norm"]
)
@pytest.mark.parametrize(
    "likelihood", ["gaussian learned", "student", "bernoulli", "poisson"]
)
def test_every_chain_has_a_batch_of_its_own(likelihood: str, source: str) -> None:
    model = with_module(source, likelihood, temperature=0.7)
    theta = points(model, 3)
    rows = torch.randint(len(model.x), (3, 4), generator=generator(5))
    value, grad = model.log_joint_and_grad(theta, rows)
    for i in range(3):
        alone_value, alone_grad = model.log_joint_and_grad(theta[i : i + 1], rows[i])
        torch.testing.assert_close(value[i : i + 1], alone_value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad[i : i + 1], alone_grad, rtol=1e-9, atol=1e-10)

    def by_hand(theta: Tensor) -> Tensor:
        every = model.pointwise_log_likelihood(theta)
        scaled = every.gather(-1, rows).sum(-1) * len(model.x) / 4
        return (model.log_prior(theta) + scaled) / model.temperature

    torch.testing.assert_close(value, by_hand(theta), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, autograd(by_hand, theta), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        model.log_likelihood_grad(theta, rows),
        model.log_likelihood_and_grad(theta, rows)[1],
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize(
    "likelihood", ["gaussian learned", "gaussian learned two targets", "categorical"]
)
def test_all_rows_are_the_full_gradient(likelihood: str) -> None:
    model = model_of(likelihood)
    theta = points(model, 2, 2)
    expected = model.log_joint_and_grad(theta)
    everything = torch.arange(len(model.x))
    for rows in (everything, everything.expand(2, 2, -1)):
        for found, wanted in zip(
            model.log_joint_and_grad(theta, rows), expected, strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    # A stratified batch of everything is everything, in order.
    for found, wanted in zip(
        model.minibatch_log_joint_and_grad(theta, generator(), 9), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    single = model.to(dtype=torch.float32)
    value, grad = single.minibatch_log_joint_and_grad(theta.float(), generator(), 9)
    assert (value.dtype, grad.dtype) == (F64, torch.float32)
    torch.testing.assert_close(grad.double(), expected[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7, 9])
def test_every_row_is_equally_likely(batch_size: int) -> None:
    rows = model_of().random_rows((30_000,), generator(1), batch_size)
    assert rows.shape == (30_000, batch_size)
    assert (rows.diff(dim=-1) >= 0).all()
    counts = torch.bincount(rows.flatten(), minlength=9).double()
    expected = 30_000 * batch_size / 9
    assert ((counts - expected).abs() <= 5 * math.sqrt(expected)).all()


def test_stratified_batches_vary_less_than_with_replacement() -> None:
    model = model_of("gaussian learned")
    theta = points(model, 1)
    many = theta.expand(4000, -1)
    with_replacement = torch.randint(9, (4000, 4), generator=generator(2))
    grads = [
        model.log_joint_and_grad(many, rows)[1]
        for rows in (model.random_rows((4000,), generator(1), 4), with_replacement)
    ]
    full = model.log_joint_and_grad(theta)[1][0]
    for grad in grads:
        assert (
            (grad.mean(0) - full).abs() < 5 * grad.std(0) / math.sqrt(4000) + 1e-9
        ).all()
    assert grads[0].var(0).sum() < grads[1].var(0).sum()


def test_batches_depend_on_the_generator_alone() -> None:
    model = model_of()
    theta = points(model, 3)
    g = generator(4)
    first, second = (model.minibatch_log_joint_and_grad(theta, g, 2)[1] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, model.minibatch_log_joint_and_grad(theta, generator(4), 2)[1])
    rows = model.random_rows((3,), generator(4), 2)
    assert not (rows == rows[0]).all()
    assert torch.equal(first, model.log_joint_and_grad(theta, rows)[1])
    assert model.minibatch_log_joint_and_grad(theta[0], generator(4), 2)[1].shape == (
        model.dim,
    )


@pytest.mark.parametrize("batch_size", [0, -1, 10])
def test_bad_batch_sizes(batch_size: int) -> None:
    model = model_of()
    with pytest.raises(
        ValueError,
        match=f"batch_size must be between 1 and the 9 rows of data, got {batch_size}",
    ):
        model.minibatch_log_joint_and_grad(points(model, 2), generator(), batch_size)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0.0, 1.0]), "rows must be int64"),
        (torch.zeros(0, dtype=torch.long), "rows must be int64"),
        (torch.tensor(3), "rows must be int64"),
        (torch.zeros(3, 4, dtype=torch.long), r"rows \(3, 4\) do not fit theta"),
    ],
)
def test_bad_rows(rows: Tensor, message: str) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=message):
        model.log_joint_and_grad(points(model, 2), rows)


# ---------------------------------------- linearised

SOURCES = ["", "conv", "residual", "layer_norm"]


@pytest.mark.parametrize("source", SOURCES)
def test_linearised_outputs_are_the_tangent(source: str) -> None:
    model = with_module(source, "gaussian learned")
    anchor, direction = points(model), points(model, seed=8)
    linear = model.linearised(anchor)
    torch.testing.assert_close(linear.outputs(anchor), model.outputs(anchor))
    size = model.spec.network.dim
    jacobian = torch.func.jacrev(model.outputs)(anchor)[..., :size]
    expected = model.outputs(anchor) + jacobian @ direction[:size]
    torch.testing.assert_close(
        linear.outputs(anchor + direction), expected, rtol=1e-9, atol=1e-9
    )
    # The remainder is of second order: ten times closer, a hundred times smaller.
    far, near = (
        (
            linear.outputs(anchor + step * direction)
            - model.outputs(anchor + step * direction)
        ).norm()
        for step in (1e-2, 1e-3)
    )
    assert 80 < far / near < 125
    # Affine in theta, whatever the distance.
    a, b = points(model, 2, seed=9)
    middle = 0.5 * (linear.outputs(a) + linear.outputs(b))
    torch.testing.assert_close(linear.outputs(0.5 * (a + b)), middle, rtol=1e-9, atol=1e-9)


def test_a_linear_network_is_its_own_expansion() -> None:
    model = linear(scale_prior=td.HalfNormal(1.0))
    other, theta = model.linearised(points(model)), points(model, 4)
    torch.testing.assert_close(other.outputs(theta), model.outputs(theta))
    torch.testing.assert_close(other.log_joint(theta), model.log_joint(theta))
    torch.testing.assert_close(
        other.log_joint_and_grad(theta)[1], model.log_joint_and_grad(theta)[1]
    )


@pytest.mark.parametrize("likelihood", ["gaussian learned", "student", "bernoulli"])
@pytest.mark.parametrize("source", SOURCES)
def test_linearised_gradients_are_those_of_autograd(source: str, likelihood: str) -> None:
    model = with_module(source, likelihood, temperature=0.7)
    model = model.linearised(points(model, seed=11))
    theta = points(model, 3)
    with torch.no_grad():  # as the samplers call it
        value, grad = model.log_joint_and_grad(theta)
    torch.testing.assert_close(value, model.log_joint(theta), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, autograd(model.log_joint, theta), rtol=1e-9, atol=1e-9)
    rows = torch.randint(len(model.x), (3, 4), generator=generator(5))
    grad = model.log_joint_and_grad(theta, rows)[1]
    for i in range(3):
        torch.testing.assert_close(
            grad[i], model.log_joint_and_grad(theta[i], rows[i])[1], rtol=1e-9, atol=1e-9
        )
    vector = points(model, 3, seed=7)
    leaf = theta.clone().requires_grad_()
    gradient = torch.autograd.grad(
        model.log_likelihood(leaf).sum(), leaf, create_graph=True
    )[0]
    expected = torch.autograd.grad((gradient * vector).sum(), leaf)[0]
    jvp = torch.func.jvp(model.log_likelihood_grad, (theta,), (vector,))[1]
    torch.testing.assert_close(jvp, expected, rtol=1e-9, atol=1e-9)


def test_a_kept_jacobian_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gaussian learned")
    kept, fresh = (model.linearised(points(model, seed=11)) for _ in range(2))
    theta = points(model, 3)
    x = torch.randn(4, 2, generator=generator(5), dtype=F64)
    first = (
        kept.outputs(theta, x),
        kept.log_joint_and_grad(theta),
        kept.outputs(theta, x),
        kept.outputs(theta, x + 1),
    )
    x += 1  # the same tensor with other values
    first += (kept.outputs(theta, x),)
    with torch.inference_mode():
        first += (kept.outputs(theta, x),)
    monkeypatch.setattr("bnnflow.model.network.LARGEST_BLOCK", 0)
    second = fresh.outputs(theta, x - 1), fresh.log_joint_and_grad(theta)
    second += (fresh.outputs(theta, x - 1), *(fresh.outputs(theta, x) for _ in range(3)))
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)
    by_x = torch.func.jacrev(lambda each: kept.network(theta, each))(x)
    torch.testing.assert_close(
        by_x, torch.func.jacrev(lambda each: fresh.network(theta, each))(x)
    )
    assert by_x.abs().max() > 0


def test_linearised_gauss_newton_is_the_networks_at_the_anchor() -> None:
    model = model_of("gaussian learned")
    anchor = points(model)
    linear_model = model.linearised(anchor)
    # Fisher's information of a Gaussian does not depend on the mean: the same factor for the same
    # noise everywhere.
    theta = points(model, 2)
    theta[:, -1] = anchor[-1]
    factor = linear_model.at(theta).grad_and_factor()[1]
    expected = model.at(anchor.expand(2, -1)).grad_and_factor()[1]
    torch.testing.assert_close(factor, expected)


def test_a_linearised_model_is_a_model() -> None:
    model = model_of("gaussian learned")
    anchor, theta = points(model, seed=11), points(model, 3)
    other = model.linearised(anchor)
    assert other.linearised(theta[0]) is other
    assert (other.dim, other.dtype, len(other.x)) == (model.dim, model.dtype, len(model.x))
    assert not any(other.spec.symmetries())  # the tangent has none of them
    torch.testing.assert_close(other.log_prior(theta), model.log_prior(theta))
    prints = {
        model.fingerprint(),
        other.fingerprint(),
        model.linearised(theta[0]).fingerprint(),
    }
    assert len(prints) == 3
    assert other.fingerprint() == model.linearised(anchor).fingerprint()
    single = other.to(dtype=torch.float32)
    torch.testing.assert_close(
        single.outputs(theta.float()).double(), other.outputs(theta), rtol=1e-4, atol=1e-4
    )
    trace = poutine.trace(condition(other.to_pyro(), _sites(other, theta[0]))).get_trace()
    torch.testing.assert_close(
        trace.log_prob_sum() + theta[0, -1], other.log_joint(theta[0])
    )
    # and the first model is what it was
    assert model.outputs(theta).shape == other.outputs(theta).shape
    assert not torch.allclose(model.outputs(theta), other.outputs(theta))
    with pytest.raises(ValueError, match="not a network with other weights"):
        other.network_at(theta[0])
    with pytest.raises(ValueError, match=r"theta must be \(32,\), got \(3, 32\)"):
        model.linearised(theta)
    with pytest.raises(ValueError, match="axis of length 32"):
        model.linearised(theta[0, :-1])


# ---------------------------------------- any network


class Residual(nn.Module):
    """Two residual blocks with batch normalisation, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh())
            for _ in range(2)
        )
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((-1, -2)))


def _trained_statistics() -> nn.Module:
    net = Residual()
    for _ in range(3):
        net(torch.randn(20, 2, 4, 4, generator=generator(9)) * 2 + 1)
    return net.eval()


def _embedding() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)
    )


def _check_gradients(model: BayesianModel) -> None:
    theta = points(model, 3)
    with torch.no_grad():
        value, grad = model.log_joint_and_grad(theta)
    torch.testing.assert_close(value, model.log_joint(theta))
    torch.testing.assert_close(grad, autograd(model.log_joint, theta), rtol=1e-9, atol=1e-9)
    rows = torch.randint(len(model.x), (3, 2), generator=generator(1))
    batch = model.log_joint_and_grad(theta, rows)[1]
    for i in range(3):
        torch.testing.assert_close(
            batch[i], model.log_joint_and_grad(theta[i], rows[i])[1], rtol=1e-9, atol=1e-9
        )
    for row, outputs in zip(theta, model.outputs(theta), strict=True):
        torch.testing.assert_close(outputs, model.network_at(row)(model.x))


def test_batch_norm_in_eval_mode_is_a_constant_affine_map() -> None:
    net = built(_trained_statistics)
    x = torch.randn(6, 2, 4, 4, generator=generator(1), dtype=F64)
    model = model_of("gaussian learned", net=net, x=x)
    _check_gradients(model)
    theta = points(model, 2)
    # rows are independent
    torch.testing.assert_close(model.outputs(theta, x[:2]), model.outputs(theta)[:, :2])
    single = model.to(dtype=torch.float32)
    assert {buffer.dtype for buffer in single.net.buffers()} == {torch.float32, torch.int64}
    torch.testing.assert_close(
        single.outputs(theta.float()).double(), model.outputs(theta), rtol=1e-4, atol=1e-4
    )
    with torch.no_grad():
        net.blocks[0][1].running_mean += 1
    assert model_of("gaussian learned", net=net, x=x).fingerprint() != model.fingerprint()
    with pytest.raises(
        ValueError,
        match=r"'blocks.0.1' \(BatchNorm2d\).* use LayerNorm or GroupNorm, or call net.eval",
    ):
        model_of("gaussian learned", net=net.train(), x=x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_embeddings_take_integers(dtype: torch.dtype) -> None:
    net, x = built(_embedding), torch.randint(5, (8, 2), generator=generator(1)).to(dtype)
    y = _reals(generator(2), 8)
    model = BayesianModel(net, priors.Normal(), likelihoods.Gaussian(), x, y)
    assert (model.x.dtype, model.dtype) == (dtype, F64)
    _check_gradients(model)
    theta = points(model, 2)
    torch.testing.assert_close(
        model.outputs(theta, x[:3].numpy()), model.outputs(theta)[:, :3]
    )
    single = model.to(dtype=torch.float32)
    assert (single.x.dtype, single.dtype, single.y.dtype) == (
        dtype,
        torch.float32,
        torch.float32,
    )
    assert single.log_joint(theta.float()).isfinite().all()
    with pytest.raises(ValueError, match="does not fit net"):
        BayesianModel(net, priors.Normal(), likelihoods.Gaussian(), x + 1, y)
    with pytest.raises(ValueError, match="does not fit net"):
        model.outputs(theta, x + 5)
    with pytest.raises(ValueError, match="x must hold integers as in training"):
        model.outputs(theta, x.double())


def test_integers_become_numbers_where_the_network_wants_them() -> None:
    x = torch.arange(12).reshape(6, 2)
    model = BayesianModel(built(_dense), priors.Normal(), likelihoods.Gaussian(1.0), x, Y)
    assert model.x.dtype == F64
    assert torch.equal(model.x, x.double())


@pytest.mark.parametrize(
    "norm",
    [lambda: nn.GroupNorm(2, 4), lambda: nn.InstanceNorm1d(4)],
    ids=["group", "instance"],
)
def test_norms_within_a_row(norm: Callable[[], nn.Module]) -> None:
    net = built(
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 2), norm(), nn.SiLU(), nn.Flatten(), nn.Linear(8, 1)
        )
    )
    _check_gradients(
        model_of(
            "gaussian learned",
            net=net,
            x=torch.randn(6, 2, 3, generator=generator(1), dtype=F64),
        )
    )


# ---------------------------------------- refusals

X = torch.randn(6, 2, generator=generator(), dtype=torch.float32)
Y = torch.arange(6.0)
BAD_X, BAD_Y, HUGE_X = X.clone(), Y.clone(), X.double()
BAD_X[2, 1], BAD_X[4, 0], BAD_Y[3], HUGE_X[1, 0] = math.nan, math.inf, math.nan, 1e300


def _dense(outputs: int = 1, *inside: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), *inside, nn.Linear(3, outputs))


STANDARD = td.Normal(0.0, 1.0)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "NaN and inf in x": ({"x": BAD_X}, "x has NaN or infinite values in 2 of 6 rows: 2, 4"),
    "NaN in y": ({"y": BAD_Y}, "y has NaN or infinite values in 1 of 6 rows: 3"),
    "overflow of float32": (
        {"x": HUGE_X},
        "x has NaN or infinite values in 1 of 6 rows: 1",
    ),
    "lengths": ({"y": Y[:5]}, "each of the 6 rows of x, got shape \\(5,\\)"),
    "scalar y": ({"y": torch.tensor(1.0)}, "y must have a value"),
    "1-d x": (
        {"x": X[:, 0]},
        r"x must be \(n, \.\.\.\) with at least two axes, got \(6,\)",
    ),
    "empty": ({"x": X[:0], "y": Y[:0]}, "x has no rows"),
    "features": ({"x": torch.ones(6, 5)}, r"x of shape \(6, 5\)"),
    "targets": (
        {"y": torch.randn(6, 2, generator=generator())},
        r"\(n, 1\) for this network, got \(6, 2\)",
    ),
    "constant target": ({"y": torch.full((6,), 2.0)}, "y holds only the value 2"),
    "constant column": (
        {"net": lambda: _dense(2), "y": torch.stack([Y, torch.ones(6)], 1)},
        "only the value 1 in column 1",
    ),
    "one class": (
        {"like": likelihoods.Categorical(), "net": lambda: _dense(3), "y": Y * 0 + 1},
        "a single class",
    ),
    "label too large": (
        {"like": likelihoods.Categorical(), "net": lambda: _dense(3), "y": Y.long()},
        "label 3 in row 3.* 0 to 2",
    ),
    "negative label": (
        {"like": likelihoods.Bernoulli(), "y": Y.long() % 3 - 1},
        "label -1 in row 0.* 0 to 1",
    ),
    "fraction of a label": (
        {"like": likelihoods.Bernoulli(), "y": Y / 2},
        "label 0.5 in row 1",
    ),
    "one-hot labels": (
        {
            "like": likelihoods.Categorical(),
            "net": lambda: _dense(3),
            "y": torch.eye(6)[:, :3],
        },
        r"must be class labels \(n,\)",
    ),
    "one logit": (
        {"like": likelihoods.Categorical(), "y": Y % 2},
        "an output for every class",
    ),
    "Bernoulli of two": (
        {"like": likelihoods.Bernoulli(), "net": lambda: _dense(2), "y": Y % 2},
        "one output, got 2",
    ),
    "odd outputs": (
        {"like": likelihoods.HeteroscedasticGaussian(), "net": lambda: _dense(3)},
        "2 outputs a target .* got 3",
    ),
    "batch norm": ({"net": lambda: _dense(1, nn.BatchNorm1d(3))}, r"'1' \(BatchNorm1d\)"),
    "batch norm in eval without statistics": (
        {"net": lambda: _dense(1, nn.BatchNorm1d(3, track_running_stats=False)).eval()},
        r"'1' \(BatchNorm1d\).* use LayerNorm or GroupNorm, or call net.eval\(\)",
    ),
    "instance norm that gathers statistics": (
        {"net": lambda: _dense(1, nn.InstanceNorm1d(3, track_running_stats=True))},
        r"'1' \(InstanceNorm1d\)",
    ),
    "dropout": (
        {"net": lambda: _dense(1, nn.Dropout(0.5))},
        r"'1' \(Dropout\) is random in training mode",
    ),
    "random forward": ({"net": lambda: _dense(1, Applied(F.dropout))}, "random"),
    "no parameters": ({"net": nn.Tanh}, "Tanh has no parameters"),
    "mixes rows": (
        {"net": lambda: nn.Sequential(_dense(), nn.Flatten(0), nn.Unflatten(0, (1, 2)))},
        "must map",
    ),
    "two tensors": (
        {"net": lambda: nn.Sequential(_dense(), Applied(lambda a: (a, a)))},
        "one tensor, got tuple",
    ),
    "positive support": (
        {"prior": td.HalfNormal(1.0)},
        "'0.weight' must have the real line as support, HalfNormal",
    ),
    "integers": ({"prior": td.Poisson(1.0)}, "'0.weight' must have the real line"),
    "prior shape": (
        {"prior": {"0.bias": td.Normal(torch.zeros(4), 1.0)}},
        "no distribution for",
    ),
    "prior does not fit": (
        {"prior": priors.PerTensor({"0.bias": td.Normal(torch.zeros(4), 1.0)}, STANDARD)},
        r"'0.bias' has shape \(4,\), the tensor \(3,\)",
    ),
    "prior too deep": (
        {
            "prior": priors.PerTensor(
                {"0.bias": td.Normal(torch.zeros(2, 3), 1.0)}, STANDARD
            )
        },
        r"'0.bias' has shape",
    ),
    "prior of no tensor": (
        {"prior": priors.PerTensor({"9.bias": STANDARD}, STANDARD)},
        "9.bias",
    ),
    "multivariate": (
        {
            "prior": priors.PerTensor(
                {"0.bias": td.MultivariateNormal(torch.zeros(3), torch.eye(3))}, STANDARD
            )
        },
        "'0.bias': MultivariateNormal is not elementwise",
    ),
    "mixture": (
        {
            "prior": td.MixtureSameFamily(
                td.Categorical(torch.ones(2)), td.Normal(torch.zeros(2), torch.ones(2))
            )
        },
        "MixtureSameFamily is not a family",
    ),
    "transformed": (
        {"prior": td.TransformedDistribution(STANDARD, td.AffineTransform(0.0, 2.0))},
        "TransformedDistribution is not a family",
    ),
    "no prior": ({"prior": 1.0}, "prior must be a Prior"),
    "scale on the real line": (
        {"like": likelihoods.Gaussian(scale_prior=STANDARD)},
        "'likelihood.log_scale' must have positive support",
    ),
    "bounded scale": (
        {"like": likelihoods.Gaussian(scale_prior=td.Uniform(0.0, 1.0))},
        "'likelihood.log_scale' must have positive support",
    ),
    "cold": ({"temperature": 0.0}, "temperature must be positive"),
    "negative temperature": ({"temperature": -1.0}, "temperature must be positive"),
    "no temperature": ({"temperature": math.nan}, "temperature must be positive"),
    "infinitely hot": ({"temperature": math.inf}, "temperature must be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_a_reason(name: str) -> None:
    given, message = REFUSED[name]
    net = built(given.get("net", _dense), torch.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        BayesianModel(
            net, given.get("prior", priors.Normal()), given.get("like", likelihoods.Gaussian(1.0)),
            given.get("x", X), given.get("y", Y), temperature=given.get("temperature", 1.0),
        )  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_noise_must_be_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be positive"):
        likelihoods.Gaussian(scale)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(3, 5), None, r"x must be \(n, 2\) as in training, got \(3, 5\)"),
        (torch.ones(3), None, r"x must be \(n, 2\)"),
        (torch.ones(0, 2), None, "x has no rows"),
        (torch.full((3, 2), math.nan), None, "NaN or infinite values in 3 of 3 rows"),
        (torch.ones(1, 2), None, "each of the 1 rows of x, got 9"),
        (None, torch.ones(1), "each of the 9 rows of x, got 1"),
        (None, torch.full((9,), math.nan), "y has NaN"),
        (None, torch.ones(9, 2), r"got \(9, 2\)"),
    ],
    ids=["features", "1-d", "empty", "NaN", "rows of x", "rows of y", "NaN y", "targets"],
)
def test_bad_input_at_prediction(x: Tensor | None, y: Tensor | None, message: str) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=message):
        model.pointwise_log_likelihood(points(model, 2), x, y)


@pytest.mark.parametrize(
    "view",
    ["outputs", "log_prior", "log_joint", "log_joint_and_grad", "log_likelihood_grad"],
)
def test_wrong_length_of_theta(view: str) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=f"axis of length {model.dim}"):
        getattr(model, view)(torch.zeros(3, model.dim + 1, dtype=F64))


def test_classes_may_be_floats_and_columns() -> None:
    for y in (Y % 2, (Y % 2).unsqueeze(1), (Y % 2).bool(), (Y % 2).numpy()):
        model = BayesianModel(
            built(_dense, torch.float32), priors.Normal(), likelihoods.Bernoulli(), X, y
        )
        assert torch.equal(model.y, torch.arange(6) % 2)


def test_one_row_is_enough() -> None:
    model = BayesianModel(
        built(_dense, torch.float32),
        priors.Normal(),
        likelihoods.Gaussian(1.0),
        X[:1],
        Y[:1],
    )
    assert model.log_joint(model.sample_prior(2, 0)).shape == (2,)


def test_repr_says_what_it_is() -> None:
    assert repr(model_of("gaussian learned")).startswith(
        "BayesianModel(Sequential, dim=32, n=9, likelihood=Gaussian"
    )


def test_memory_is_used_again_by_one_call_after_the_other_only(monkeypatch) -> None:
    """The eager gradient writes into its own memory: results that were returned are never
    touched.
    """
    for home in ("bnnflow.model.fused", "bnnflow.compiled.routines"):
        monkeypatch.setattr(f"{home}.library", lambda dtype: None)
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(
            nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)
        ).double()
    model = BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), x, x.sin())
    first, second = model.sample_prior(5, 0), model.sample_prior(5, 1)
    rows = torch.randint(0, 9, (5, 4), generator=torch.Generator().manual_seed(0))
    for arguments in ((), (rows,)):
        value, grad = model.log_joint_and_grad(first, *arguments)
        kept = value.clone(), grad.clone()
        model.log_joint_and_grad(second, *arguments)
        model.log_joint_and_grad(second[:2])
        torch.testing.assert_close((value, grad), kept, rtol=0, atol=0)
        tracked = first.clone().requires_grad_()
        expected = model.log_joint_and_grad(tracked, *arguments)
        torch.testing.assert_close(
            (value, grad), expected, rtol=1e-12, atol=1e-12, check_device=False
        )
    copied = copy.deepcopy(model.network)
    torch.testing.assert_close(copied(first, x), model.network(first, x))
