"""Threads that sample, fit, predict and build models at the same time get what each would get
alone.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, posteriors, priors
from bnnflow.transport import Solver
from tests.problems import one_in

THREADS = 2


class Residual(nn.Module):
    """No chain of layers: its weights are put into the module whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body, self.head = nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.body(self.norm(x)).tanh())


@pytest.fixture(scope="module")
def nets(seeded) -> dict[str, nn.Module]:
    with seeded(0):
        return {
            "perceptron": nn.Sequential(
                nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)
            ).double(),
            "module": Residual().double(),
        }


def model_of(net: nn.Module, prior: Any = None) -> bf.BayesianModel:
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return bf.BayesianModel(
        net, prior or priors.Normal(), likelihoods.Gaussian(), x, x.prod(1)
    )


def together(work: Callable[[int], Tensor]) -> list[Tensor]:
    """Do the work of several seeds in threads that begin at the same moment."""
    barrier = threading.Barrier(THREADS)

    def one(seed: int) -> Tensor:
        barrier.wait()
        return work(seed)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(THREADS)))


SHORT = {"chains": 2, "warmup": 4, "draws": 3}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "HMC": (bf.HMC(max_leapfrog=4), SHORT),
    "AdjustedMCLMC": (bf.AdjustedMCLMC(max_leapfrog=4), SHORT),
    "MCLMC": (bf.MCLMC(thinning=2), SHORT),
    "SGLD": (bf.SGLD(batch_size=5, thinning=2), SHORT),
    "SGHMC": (bf.SGHMC(batch_size=5, thinning=2), SHORT),
    "SGNHT": (bf.SGNHT(batch_size=5, thinning=2), SHORT),
    "SMC": (bf.SMC(particles=20, moves=1, max_leapfrog=4), {"chains": 1}),
    "PyroNUTS": (bf.PyroNUTS(max_tree_depth=3), SHORT),
    "VI": (bf.VI(steps=10), {"draws": 5}),
    "low rank VI": (bf.VI(rank=2, steps=10), {"draws": 5}),
    "full VI": (bf.VI(rank="full", steps=10), {"draws": 5}),
    "flow VI": (bf.NormalizingFlowVI(steps=10), {"draws": 5}),
    "Laplace": (bf.Laplace(starts=2, steps=10), {"draws": 5}),
    "exact Laplace": (
        bf.Laplace("diagonal", hessian="exact", starts=2, steps=30),
        {"draws": 5},
    ),
    "SWAG": (bf.SWAG(members=2, steps=10, snapshots=20, every=1), {"draws": 5}),
    "DeepEnsemble": (bf.DeepEnsemble(3, 10), {}),
    "MCDropout": (bf.MCDropout(members=2, steps=10), {"draws": 5}),
}


CASES = [("perceptron", method) for method in METHODS]
CASES += [
    ("module", method)
    for method in ("HMC", "VI", "flow VI", "exact Laplace", "SWAG", "DeepEnsemble")
]


@pytest.mark.parametrize(("kind", "method"), one_in(3, CASES))
def test_draws_in_threads_are_those_of_each_alone(nets, kind: str, method: str) -> None:
    model, (settings, sizes) = model_of(nets[kind]), METHODS[method]

    def work(seed: int) -> Tensor:
        return bf.sample(model, settings, seed=seed, **sizes).theta

    for found, alone in zip(together(work), map(work, range(THREADS)), strict=True):
        assert torch.equal(found, alone)


def test_models_are_built_while_others_are_evaluated(nets) -> None:
    """Tracing a network replaces methods of nn.Module for the whole process."""
    running, x = model_of(nets["module"]), torch.ones(3, 2, dtype=torch.float64)
    theta = running.sample_prior(4, 0)

    def work(seed: int) -> Tensor:
        if seed == 0:
            return torch.stack([running.outputs(theta, x) for _ in range(8)])
        specs = [bf.WeightSpec.of(nets["perceptron"]) for _ in range(8)]
        return torch.tensor([spec.dim for spec in specs])

    for found, alone in zip(together(work), map(work, range(THREADS)), strict=True):
        assert torch.equal(found, alone)


def test_priors_and_densities_are_shared_by_threads(nets, seeded) -> None:
    model = model_of(nets["perceptron"], priors.StudentT(4.0))
    orders = (torch.randperm(model.dim, generator=torch.Generator().manual_seed(2)),) * 2
    with seeded(0):
        flow = posteriors.coupling_flow(orders, model.dim, 5).double()
        for parameter in flow.parameters():
            nn.init.normal_(parameter, 0.0, 0.3)
    q = posteriors.CouplingFlow(orders, tuple(p.detach() for p in flow.parameters()))

    def work(seed: int) -> Tensor:
        parts = [model.sample_prior(3, seed + i) + q.sample(3, seed + i) for i in range(8)]
        return torch.stack(
            [torch.cat([theta, q.log_prob(theta)[:, None]], 1) for theta in parts]
        )

    for found, alone in zip(together(work), map(work, range(THREADS)), strict=True):
        assert torch.equal(found, alone)


@pytest.mark.slow
def test_flows_and_predictions_in_threads_are_those_of_each_alone(nets) -> None:
    model = model_of(nets["perceptron"])
    few = Solver("euler", 2)
    draws = bf.sample(model, bf.DeepEnsemble(8, 5), seed=0)
    x = model.x[:5]

    def work(seed: int) -> Tensor:
        flow = bf.fit_flow(
            model,
            draws,
            seed=seed,
            progress=False,
            training=bf.Training(steps=2, batch_size=16),
        )
        more = flow.sample(2, seed, solver=few)
        mean = bf.predict(model, more.unsqueeze(0), x).mean
        return torch.cat([more.flatten(), mean.flatten(), flow.log_prob(more, solver=few)])

    for found, alone in zip(together(work), map(work, range(THREADS)), strict=True):
        assert torch.equal(found, alone)
