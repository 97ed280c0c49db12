"""Ctrl-C keeps what was computed, whatever the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import bnnflow as bf
from bnnflow.model import BayesianModel

CHAINS = {"chains": 2, "warmup": 4, "draws": 20}
METHODS: dict[str, tuple[bf.inference.Method, dict[str, Any]]] = {
    "HMC": (bf.HMC(max_leapfrog=8), CHAINS),
    "MCLMC": (bf.MCLMC(), CHAINS),
    "AdjustedMCLMC": (bf.AdjustedMCLMC(max_leapfrog=8), CHAINS),
    "ParallelTempering": (bf.ParallelTempering(levels=4, max_leapfrog=8), CHAINS),
    "PyroNUTS": (bf.PyroNUTS(max_tree_depth=3), CHAINS),
    "SGLD": (bf.SGLD(batch_size=5), CHAINS),
    "SGHMC": (bf.SGHMC(batch_size=5), CHAINS),
    "SGNHT": (bf.SGNHT(batch_size=5), CHAINS),
    "SMC": (bf.SMC(particles=50, moves=2), {"chains": 2}),
    "VI": (bf.VI(steps=60), {"draws": 20}),
    "VI, full": (bf.VI(rank="full", steps=60), {"draws": 20}),
    "NormalizingFlowVI": (bf.NormalizingFlowVI(hidden=8, steps=60), {"draws": 20}),
    "Laplace": (bf.Laplace(steps=60, starts=2), {"draws": 20}),
    "Laplace, tuned": (
        bf.Laplace(steps=60, starts=2, prior_precision="evidence"),
        {"draws": 20},
    ),
    "SWAG": (bf.SWAG(members=2, rank=4, snapshots=20, every=5, steps=20), {"draws": 20}),
    "DeepEnsemble": (bf.DeepEnsemble(members=3, steps=60), {}),
    "MCDropout": (bf.MCDropout(members=2, steps=60), {"draws": 20}),
}
UPHILL = {  # what a method does before it has anything to return, as a share of its evaluations
    "HMC": 0.9, "MCLMC": 0.9, "AdjustedMCLMC": 0.9, "PyroNUTS": 0.9, "SGLD": 0.9, "SGHMC": 0.9,
    "ParallelTempering": 0.9, "SGNHT": 0.9, "SMC": 0.2, "VI, full": 0.9, "SWAG": 0.9,
}  # fmt: skip


@pytest.fixture
def model(seeded: Callable) -> BayesianModel:
    data = bf.data.gap_regression(0, n=20, noise=0.3)
    with seeded(0):
        net = torch.nn.Sequential(
            torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
        )
    return BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.3), data.x_train, data.y_train
    )


@contextmanager
def counted(at: float = math.inf) -> Iterator[list[int]]:
    """Count evaluations of the posterior, and press Ctrl-C in one of them."""
    calls = [0]

    def counting(whole: Callable) -> Callable:
        def evaluate(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise KeyboardInterrupt
            return whole(*args, **options)

        return evaluate

    names = [
        "log_joint_and_grad",
        "log_likelihood_and_grad",
        "minibatch_log_joint_and_grad",
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(BayesianModel, name, counting(getattr(BayesianModel, name)))
        yield calls


def test_every_method_is_here():
    every = {
        name
        for name in bf.inference.__all__
        if isinstance(getattr(bf.inference, name), type)
        and issubclass(getattr(bf.inference, name), bf.inference.Method)
    }
    abstract = {"Method", "Sampleable"}
    assert every - abstract == {type(method).__name__ for method, _ in METHODS.values()}


@pytest.mark.crossed
@pytest.mark.filterwarnings("ignore:(?!interrupted)")  # of so few steps
@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
@pytest.mark.parametrize("name", METHODS)
def test_an_interrupt_keeps_what_was_computed(
    name: str, share: float, model: BayesianModel, recwarn: pytest.WarningsRecorder
) -> None:
    method, sizes = METHODS[name]
    with counted() as calls:
        whole = bf.sample(model, method, seed=0, **sizes)
    assert not whole.info.get("interrupted")
    at = max(2, round(share * calls[0]))
    try:
        with counted(at):
            draws = bf.sample(model, method, seed=0, **sizes)
    except KeyboardInterrupt:
        assert share < UPHILL.get(name, 0.0)
        return
    assert draws.info["interrupted"]
    assert any("interrupted" in str(each.message) for each in recwarn)
    assert 1 <= draws.n_chains <= whole.n_chains
    assert 1 <= draws.n_draws <= whole.n_draws
    assert draws.theta.isfinite().all()
    assert draws.log_joint.isfinite().all()
    prediction = bf.predict(model, draws, model.x)
    assert prediction.mean.isfinite().all()
    if draws.posterior is not None:
        assert draws.posterior.log_prob(draws.flat).isfinite().all()


def test_what_smc_has_is_weighed_for_the_posterior(seeded: Callable):
    """Exact in the limit of many particles, wherever it was interrupted."""
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).unsqueeze(-1)
    y = 1.5 * x + 0.3
    with seeded(0):
        net = torch.nn.Linear(1, 1)
    model = BayesianModel(net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.5), x, y)
    rows = torch.cat([x, torch.ones_like(x)], 1)
    precision = torch.eye(2, dtype=torch.float64) + rows.T @ rows / 0.25
    exact = torch.linalg.solve(precision, rows.T @ y / 0.25).flatten()
    method = bf.SMC(particles=4000, moves=2)
    with counted() as calls:
        bf.sample(model, method, chains=1, seed=0)
    with counted(round(0.6 * calls[0])), pytest.warns(UserWarning, match="of the way"):
        draws = bf.sample(model, method, chains=1, seed=0)
    weights = draws.log_weights.exp()
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights.std()) > 0
    assert draws.log_evidence is None
    mean = (weights.unsqueeze(-1) * draws.theta).sum((0, 1))
    assert torch.allclose(mean, exact, atol=0.05)


def test_an_interrupted_smc_goes_on_from_its_checkpoint(model: BayesianModel, tmp_path):
    method, place = bf.SMC(particles=50, moves=2), bf.Checkpoint(tmp_path, resume=True)
    with counted() as calls:
        whole = bf.sample(model, method, chains=2, seed=0)
    with counted(round(0.6 * calls[0])), pytest.warns(UserWarning, match="interrupted"):
        bf.sample(model, method, chains=2, seed=0, checkpoint=place)
    resumed = bf.sample(model, method, chains=2, seed=0, checkpoint=place)
    assert torch.equal(resumed.theta, whole.theta)
    assert resumed.log_evidence == whole.log_evidence
    assert not resumed.info["interrupted"]


def test_a_flow_keeps_the_draws_that_are_done(model: BayesianModel, monkeypatch):
    flow = bf.transport.GaussNewtonFlow(model)
    whole = bf.sample(model, flow, draws=40, seed=0)
    monkeypatch.setattr("bnnflow.transport.flow.default_chunk", lambda device: 16)
    carry, calls = type(flow).forward, [0]

    def interrupted(*args: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return carry(*args, **options)

    monkeypatch.setattr(type(flow), "forward", interrupted)
    with pytest.warns(UserWarning, match="returning the 32 of 40 draws"):
        draws = bf.sample(model, flow, draws=40, seed=0)
    assert draws.info["interrupted"]
    assert torch.allclose(draws.theta, whole.theta[:, :32], atol=1e-4)
