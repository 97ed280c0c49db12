"""Networks with batch normalisation keep their own losses at the ends of a path, and get statistics
on the way.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.symmetry import NetworkLoss, barrier, fit_curve, loss_plane

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    x = 3 + 2 * torch.randn(n, 3, generator=generator(seed), dtype=F64)
    return x, x.sum(1, keepdim=True).sin()


def trained(seed: int, frozen: bool = False) -> nn.Module:
    """A network that has seen the data in training mode, so that its statistics are its own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(3, 6),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Linear(6, 5),
            nn.BatchNorm1d(5),
            nn.ReLU(),
            nn.Linear(5, 1),
        ).double()
    x, y = data()
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(60):
        optimiser.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimiser.step()
    net[0].bias.requires_grad_(not frozen)
    return net.eval()


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    return trained(0), trained(1)


def own_loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return F.mse_loss(net(x), y)


def test_the_ends_of_a_path_have_the_losses_of_the_networks(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    for x, y in (data(), data(25, 7)):
        loss = NetworkLoss(pair, F.mse_loss, x, y, statistics=data()[0])
        found = barrier(*loss.weights, loss, points=5)
        for end, net in zip((0, -1), pair, strict=True):
            torch.testing.assert_close(found.losses[end], own_loss(net, x, y))
    curve = fit_curve(
        *loss.weights, NetworkLoss(pair, F.mse_loss, *data()), steps=3, progress=False
    )
    torch.testing.assert_close(
        loss(curve.at(torch.tensor([0.0, 1.0]))), found.losses[[0, -1]]
    )


def test_with_the_statistics_of_one_network_the_other_has_another_loss(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    x, y = data()
    mixed = copy.deepcopy(pair[0])
    mixed.load_state_dict({**mixed.state_dict(), **dict(pair[1].named_parameters())})
    right, wrong = own_loss(pair[1], x, y), own_loss(mixed, x, y)
    assert wrong > 2 * right
    model = bf.BayesianModel(pair[0], priors.Normal(), likelihoods.Gaussian(0.1), x, y)
    model.theta_of(pair[0])
    with pytest.raises(ValueError, match=r"1\.running_mean"):
        model.theta_of(pair[1])


def test_statistics_on_the_way_are_those_of_the_networks_own_activations(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    x, y = data()
    loss = NetworkLoss(pair, F.mse_loss, x, y)
    theta = loss.weights.mean(0)
    average = loss.network(theta)
    inside = average[0](x)
    torch.testing.assert_close(average[1].running_mean, inside.mean(0))
    torch.testing.assert_close(average[1].running_var, inside.var(0))
    by_rows = copy.deepcopy(average).train()
    torch.testing.assert_close(loss(theta), F.mse_loss(by_rows(x), y).detach())
    # variances over n - 1 and n
    torch.testing.assert_close(own_loss(average, x, y), loss(theta), rtol=0.1, atol=0)
    other = NetworkLoss(pair, F.mse_loss, *data(25, 7), statistics=x)
    torch.testing.assert_close(other(theta), own_loss(average, *data(25, 7)))
    assert torch.equal(loss.network(loss.weights[1])(x), pair[1](x))


def test_nothing_is_changed_by_evaluation(pair: tuple[nn.Module, nn.Module]) -> None:
    before = copy.deepcopy(pair[0].state_dict())
    loss = NetworkLoss(pair, F.mse_loss, *data())
    theta = torch.lerp(*loss.weights, torch.tensor(0.3, dtype=F64))
    first = loss(theta)
    loss(loss.weights.mean(0))
    loss.network(theta)
    assert torch.equal(loss(theta), first)
    assert all(
        torch.equal(before[name], each) for name, each in pair[0].state_dict().items()
    )


def test_gradients_are_those_of_the_loss(pair: tuple[nn.Module, nn.Module]) -> None:
    loss = NetworkLoss(pair, F.mse_loss, *data())
    theta = torch.lerp(*loss.weights, torch.tensor(0.4, dtype=F64)).requires_grad_()
    (grad,) = torch.autograd.grad(loss(theta), theta)
    along = torch.randn(len(theta), generator=generator(3), dtype=F64)
    with torch.no_grad():
        slope = (loss(theta + 1e-6 * along) - loss(theta - 1e-6 * along)) / 2e-6
    torch.testing.assert_close(grad @ along, slope, rtol=1e-5, atol=1e-7)


def test_planes_and_batches_of_networks(pair: tuple[nn.Module, nn.Module]) -> None:
    loss = NetworkLoss([*pair, trained(2)], F.mse_loss, *data())
    plane = loss_plane(*loss.weights, loss, points=3)
    assert plane.losses.isfinite().all()
    assert loss(loss.weights.reshape(3, 1, -1)).shape == (3, 1)


def test_networks_without_statistics_need_none() -> None:
    with torch.random.fork_rng(devices=[]):
        nets = [
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
            for _ in range(2)
        ]
    x, y = data()
    loss = NetworkLoss(nets, F.mse_loss, x, y)
    middle = loss.weights.mean(0)
    torch.testing.assert_close(loss(middle), own_loss(loss.network(middle), x, y))


def test_what_differs_otherwise_is_named(pair: tuple[nn.Module, nn.Module]) -> None:
    x, y = data()
    with pytest.raises(ValueError, match=r"0\.bias differs"):
        NetworkLoss([trained(0, frozen=True), trained(1, frozen=True)], F.mse_loss, x, y)
    other = copy.deepcopy(pair[1])
    other.register_buffer("mask", torch.ones(2))
    with pytest.raises(ValueError, match="different architectures: mask"):
        NetworkLoss([pair[0], other], F.mse_loss, x, y)
    with pytest.raises(ValueError, match="two rows"):
        NetworkLoss(pair, F.mse_loss, x[:1], y[:1])
    other = copy.deepcopy(pair[0])
    other[1].running_mean += 1
    with pytest.raises(ValueError, match=r"same weights, but 1\.running_mean differs"):
        NetworkLoss([pair[0], other], F.mse_loss, x, y)
    with pytest.raises(ValueError, match="networks is empty"):
        NetworkLoss([], F.mse_loss, x, y)
    loss = NetworkLoss(pair, F.mse_loss, x, y)
    with pytest.raises(ValueError, match="axis of length"):
        loss(loss.weights[:, 1:])
    with pytest.raises(ValueError, match="theta must be"):
        loss.network(loss.weights)
