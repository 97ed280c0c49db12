"""Networks of any module: gradients by turns are those of vmap, and memory is bounded whatever the
rows and draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.inference.approximate import laplace
from tests.problems import F64, built, generator, one_in


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = (
            nn.Linear(6, 5),
            nn.Linear(5, 5),
            nn.Linear(5, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.block(h)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 3)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x)).mean(1))


class Viewed(nn.Module):
    """A convnet that views its feature maps, which only one memory format allows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 4, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x).relu().view(len(x), -1))


def convnet() -> nn.Module:
    first = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *first, nn.Conv2d(4, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(5, 3)
    )


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 3))


def inputs_of(make: Callable[[], nn.Module], n: int, dtype: torch.dtype = F64) -> Tensor:
    shapes = {convnet: (2, 4, 4), Viewed: (2, 4, 4), Attention: (3, 2)}
    if make is embedding:
        return torch.randint(7, (n, 4), generator=generator(1))
    return torch.randn(n, *shapes.get(make, (6,)), generator=generator(1), dtype=F64).to(
        dtype
    )


def model_of(
    make: Callable[[], nn.Module], n: int = 12, dtype: torch.dtype = F64
) -> bf.BayesianModel:
    y = torch.arange(n) % 3
    return bf.BayesianModel(
        built(make, dtype),
        priors.Normal(1.0),
        likelihoods.Categorical(),
        inputs_of(make, n, dtype),
        y,
    )


MAKES = [convnet, Viewed, layer_norm, Residual, embedding, Attention]
each_network = pytest.mark.parametrize("make", MAKES)


# ---------------------------------------- the same numbers


@pytest.mark.parametrize("chains", [1, 3, 9])
@pytest.mark.parametrize("turns", [False, True])
@each_network
def test_turns_and_vmap_give_the_same_gradients(
    make, turns: bool, chains: int, monkeypatch
) -> None:
    monkeypatch.setattr("bnnflow.model.network.FEW_NETWORKS", 1000 if turns else 0)
    monkeypatch.setattr("bnnflow.model.network.SMALL_OPERATION", 0 if turns else math.inf)
    model = model_of(make)
    theta = model.sample_prior(chains, 0)
    value, grad = model.log_joint_and_grad(theta)
    tracked = theta.clone().requires_grad_()
    expected = model.log_joint(tracked)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), tracked)[0])
    again = model.log_joint_and_grad(theta)
    assert torch.equal(value, again[0])
    assert torch.equal(grad, again[1])


@each_network
def test_batches_of_each_networks_own(make, monkeypatch) -> None:
    model = model_of(make)
    theta = model.sample_prior(3, 0)
    rows = torch.tensor([[0, 5, 1], [2, 2, 3], [11, 7, 4]])
    batched = model.log_joint_and_grad(theta, rows)
    for i in range(3):
        alone = model.log_joint_and_grad(theta[i], rows[i])
        torch.testing.assert_close((batched[0][i], batched[1][i]), alone)
    # one row of one network at a time
    monkeypatch.setattr("bnnflow.model.network.LARGEST_BLOCK", 1)
    torch.testing.assert_close(model.log_joint_and_grad(theta, rows), batched)


@each_network
def test_blocks_change_nothing(make, monkeypatch) -> None:
    model = model_of(make, 4)
    theta = model.sample_prior(4, 0).unflatten(0, (2, 2))
    v = torch.randn(2, model.dim, generator=generator(3), dtype=F64)

    def everything() -> tuple:
        grad, product = model.at(theta[0]).grad_and_product()
        return (
            model.outputs(theta),
            model.log_joint(theta),
            model.pointwise_log_likelihood(theta),
            model.log_joint_and_grad(theta),
            model.log_likelihood_grad(theta),
            (grad, product(v), product(2 * v)),
            laplace.gauss_newton_precision(model, theta[0, 0]),
        )

    whole = everything()
    # one row of one network at a time
    monkeypatch.setattr("bnnflow.model.network.LARGEST_BLOCK", 1)
    torch.testing.assert_close(everything(), whole)


@each_network
def test_jacobians_are_the_derivatives_of_outputs(make) -> None:
    model = model_of(make, 6)
    theta = model.sample_prior(2, 0)
    outputs, jacobian = model.network.jacobian(theta, model.x)
    expected = torch.stack([torch.func.jacfwd(model.outputs)(each) for each in theta])
    torch.testing.assert_close(outputs, model.outputs(theta))
    torch.testing.assert_close(jacobian, expected)
    names = model.spec.names[-1:]
    part = model.network.jacobian(theta, model.x, names=names)[1]
    torch.testing.assert_close(part, expected[..., model.spec.slices[names[0]]])
    assert model.network.jacobian(theta, model.x, names=())[1].shape == (2, 6, 3, 0)


@each_network
def test_curvature_of_any_module(make) -> None:
    model = model_of(make, 5)
    theta = 0.3 * model.sample_prior(1, 0)[0]
    prior = laplace.prior_precision(model, theta)
    grad, product = model.at(theta.unsqueeze(0)).grad_and_product()
    columns = torch.cat(
        [product(row.unsqueeze(0)) for row in torch.eye(model.dim, dtype=F64)]
    )
    whole = laplace.gauss_newton_precision(model, theta)
    torch.testing.assert_close(whole, columns + prior.diag())
    torch.testing.assert_close(grad[0], model.log_likelihood_grad(theta))
    torch.testing.assert_close(
        laplace.gauss_newton_precision(model, theta, diagonal=True), whole.diagonal()
    )
    hessian = torch.func.hessian(model.log_joint)(theta)
    torch.testing.assert_close(
        laplace.exact_precision(model, theta, diagonal=False), -hessian
    )
    torch.testing.assert_close(
        laplace.exact_precision(model, theta, diagonal=True), -hessian.diagonal()
    )


# ---------------------------------------- memory


class Largest(TorchDispatchMode):
    """Remember the most numbers in a tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = [
                each.numel() for each in tree_leaves(result) if isinstance(each, Tensor)
            ]
            self.elements = max([self.elements, *made])
        return result


def largest(work: Callable[[], object]) -> int:
    with Largest() as seen:
        work()
    return seen.elements


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3))


@pytest.mark.parametrize("make", one_in(2, [perceptron, convnet, layer_norm]))
def test_draws_and_rows_together_take_bounded_memory(make, monkeypatch) -> None:
    monkeypatch.setattr("bnnflow.model.network.LARGEST_BLOCK", 10_000)
    model = model_of(make, 150, torch.float32)
    theta = 0.1 * model.sample_prior(30, 0)
    bound = max(20_000, theta.numel(), model.x.numel())
    assert largest(lambda: model.log_joint(theta)) <= bound
    assert largest(lambda: model.log_joint_and_grad(theta)) <= bound
    rows = torch.randint(150, (30, 50), generator=generator(2))
    assert largest(lambda: model.log_joint_and_grad(theta, rows)) <= bound
    assert largest(lambda: model.linearised(theta[0]).log_joint(theta)) <= bound
    # with fewer weights than rows: there is no matrix of draws and rows
    many = theta.repeat(20, 1)
    assert largest(lambda: model.log_joint(many)) <= max(bound, many.numel())
    monkeypatch.setattr("bnnflow.model.network.LARGEST_BLOCK", 2**24)
    assert largest(lambda: model.log_joint(theta)) > bound  # it is the blocks that bound it


@pytest.mark.parametrize("structure", ["full", "diagonal", "last_layer"])
def test_curvature_takes_no_more_memory_for_more_rows(structure: str, monkeypatch) -> None:
    monkeypatch.setattr("bnnflow.model.network.LARGEST_BLOCK", 50_000)

    def memory(rows: int) -> int:
        model = model_of(convnet, rows)
        theta = 0.1 * model.sample_prior(1, 0)[0]
        names = model.spec.names[-2:] if structure == "last_layer" else model.spec.names
        return largest(
            lambda: laplace.gauss_newton_precision(
                model, theta, names, diagonal=structure == "diagonal"
            )
        )

    assert memory(120) <= max(memory(60), 200_000)


# ---------------------------------------- what takes them

METHODS = [
    bf.HMC(max_leapfrog=2),
    bf.SGLD(batch_size=5),
    bf.Laplace("last_layer", steps=5, starts=2, polish=5),
    bf.VI(steps=5),
]


@pytest.mark.crossed
@pytest.mark.filterwarnings("ignore")  # of such short runs
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{type(method).__name__}")
@each_network
def test_every_method_takes_them(make, method) -> None:
    model = model_of(make, dtype=torch.float32)
    sampler = isinstance(method, bf.HMC | bf.SGLD)
    options = {"chains": 2, "warmup": 4, "init": "prior"} if sampler else {}
    first, second = (bf.sample(model, method, draws=2, seed=0, **options) for _ in range(2))
    assert bool(first.theta.isfinite().all())
    assert torch.equal(first.theta, second.theta)
    assert bool(bf.predict(model, first, model.x[:4]).mean.isfinite().all())


# ---------------------------------------- dropout


class Skipped(nn.Module):
    """A network whose dropped units are read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 6), nn.Dropout(0.2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.first(x)))
        return self.last(h) + h[:, :3]


def dropped_convnet() -> nn.Module:
    first = [
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Dropout2d(0.25),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 1),
    ]
    return nn.Sequential(
        *first, nn.ReLU(), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(20, 3)
    ).eval()


def test_dropout_of_channels_is_that_of_the_layers() -> None:
    x = torch.randn(9, 2, 4, 4, generator=generator(1), dtype=F64)
    net = built(dropped_convnet)
    model = bf.BayesianModel(
        net, priors.Normal(1.0), likelihoods.Categorical(), x, torch.arange(9) % 3
    )
    draws = bf.sample(model, bf.MCDropout(members=1, steps=2), draws=400, seed=0)
    whole = draws.flat.abs().amax(0)  # of weights that are kept
    params = model.spec.unflatten((draws.flat.abs() / whole).round(decimals=9))
    for name, rate, units in (("4.weight", 0.25, 4), ("8.weight", 0.5, 5)):
        factors = (
            params[name].flatten(1, 1).unflatten(2, (units, -1))
            if name == "8.weight"
            else params[name]
        )
        seen = factors.movedim(2, 1).flatten(2)  # (draw, units, weights that read it)
        assert bool((seen == seen[..., :1]).all()), (
            "a channel is dropped for all who read it"
        )
        assert set(seen.unique().tolist()) == {0.0, 1.0}
        assert abs(float(1 - seen.mean()) - rate) < 0.05
    for name in ("0.weight", "0.bias", "4.bias", "8.bias"):
        assert bool((params[name] == 1).all())
    assert bool(bf.predict(model, draws, x).mean.isfinite().all())


def test_dropout_that_no_weights_can_do_is_refused_by_name() -> None:
    x = torch.randn(9, 6, generator=generator(1), dtype=F64)
    y = torch.arange(9) % 3
    model = bf.BayesianModel(
        built(Skipped).eval(), priors.Normal(1.0), likelihoods.Categorical(), x, y
    )
    with pytest.raises(ValueError, match="'drop'"):
        bf.sample(model, bf.MCDropout(steps=2))
    with pytest.raises(ValueError, match="labelled hidden units"):
        bf.sample(model_of(convnet), bf.MCDropout(steps=2))
