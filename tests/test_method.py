"""One door for draws: flows are methods, and draws from every source say where they come from and
at what price.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.transport import (
    Flow,
    FlowMap,
    GaussNewton,
    GradientSteps,
    Solver,
    WeightsVelocity,
    distil,
    fit_gaussian,
)
from tests.problems import F64, built

X = torch.linspace(-1, 1, 10, dtype=F64).unsqueeze(-1)
NET = built(lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)))
MODEL = bf.BayesianModel(NET, bf.priors.Normal(), bf.likelihoods.Gaussian(0.3), X, X.sin())
FLOW = bf.GaussNewtonFlow(MODEL, GradientSteps(2), solver=Solver(steps=3))
FEW = bf.Training(steps=2, batch_size=8)

METHODS: dict[str, tuple[Any, dict[str, int]]] = {
    "HMC": (bf.HMC(max_leapfrog=4), {"chains": 2, "warmup": 4, "draws": 3}),
    "AdjustedMCLMC": (
        bf.AdjustedMCLMC(max_leapfrog=4),
        {"chains": 2, "warmup": 4, "draws": 3},
    ),
    "MCLMC": (bf.MCLMC(), {"chains": 2, "warmup": 4, "draws": 3}),
    "SGLD": (bf.SGLD(), {"chains": 2, "warmup": 4, "draws": 3}),
    "SGHMC": (bf.SGHMC(), {"chains": 2, "warmup": 4, "draws": 3}),
    "SGNHT": (bf.SGNHT(), {"chains": 2, "warmup": 4, "draws": 3}),
    "SMC": (bf.SMC(particles=12, moves=1), {"chains": 2}),
    "ParallelTempering": (
        bf.ParallelTempering(levels=4, max_leapfrog=4),
        {"chains": 2, "warmup": 4, "draws": 3},
    ),
    "PyroNUTS": (bf.PyroNUTS(max_tree_depth=3), {"chains": 1, "warmup": 4, "draws": 3}),
    "VI": (bf.VI(steps=5), {"draws": 3}),
    "NormalizingFlowVI": (bf.NormalizingFlowVI(steps=5), {"draws": 3}),
    "Laplace": (bf.Laplace(), {"draws": 3}),
    "SWAG": (bf.SWAG(steps=5, snapshots=20), {"draws": 3}),
    "DeepEnsemble": (bf.DeepEnsemble(members=2, steps=5), {}),
    "Flow": (FLOW, {"draws": 3}),
    "TransformedDensity": (fit_gaussian(MODEL, MODEL.sample_prior(50, 0)), {"draws": 3}),
}
CORRECTIONS: dict[str, Callable[[], bf.Draws]] = {
    "refine": lambda: bf.refine(
        MODEL, MODEL.sample_prior(20, 0), 2, seed=4, progress=False
    ),
    "correct": lambda: bf.correct(MODEL, FLOW, 50, "importance", seed=4, progress=False),
}


def check_info(draws: bf.Draws, method: str) -> None:
    info = draws.info
    assert info["method"] == method
    assert method in info["settings"]
    assert "0x" not in info["settings"]
    assert info["seed"] == 4
    assert info["model"] == MODEL.fingerprint()
    assert info["seconds"] > 0
    assert info["gradients"] >= 0
    assert repr(draws).startswith(f"{type(draws).__name__}({method}, ")
    assert len(repr(draws)) < 200


@pytest.mark.filterwarnings("ignore::UserWarning")  # these runs are far too short
@pytest.mark.parametrize("name", METHODS)
def test_draws_of_every_method_say_where_they_come_from(name: str) -> None:
    method, sizes = METHODS[name]
    draws = bf.sample(MODEL, method, seed=4, progress=False, **sizes)
    check_info(draws, name)
    if name not in ("Flow", "TransformedDensity"):
        assert draws.info["gradients"] > 0
    torch.testing.assert_close(draws.log_joint.flatten(), MODEL.log_joint(draws.flat))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrected_draws_say_where_they_come_from(name: str) -> None:
    draws = CORRECTIONS[name]()
    check_info(draws, name)
    assert (
        bf.refine(MODEL, draws.theta, 1, seed=0, progress=False).flat.shape
        == draws.flat.shape
    )


def test_gradients_are_those_that_were_asked_for() -> None:
    """Of each chain for HMC, and of each draw for a flow, by a model that counts."""
    counts = [0]
    model = bf.BayesianModel(
        NET, bf.priors.Normal(), bf.likelihoods.Gaussian(0.3), X, X.sin()
    )

    def counting(name: str) -> Callable[..., Any]:
        own = getattr(model, name)

        def counted(theta: Tensor, *rest: Any, **options: Any) -> Any:
            counts[0] += theta.numel() // theta.shape[-1]
            return own(theta, *rest, **options)

        return counted

    for name in ("log_joint_and_grad", "log_likelihood_grad"):
        setattr(model, name, counting(name))
    draws = bf.sample(
        model,
        bf.HMC(max_leapfrog=4),
        chains=3,
        warmup=5,
        draws=6,
        seed=0,
        init="prior",
        progress=False,
    )
    assert draws.info["gradients"] == pytest.approx(counts[0], abs=6)
    counts[0] = 0
    flow = bf.GaussNewtonFlow(model, GradientSteps(2), solver=Solver("rk4", 3))
    draws = bf.sample(model, flow, draws=7, seed=0)
    assert draws.info["gradients"] == 7 * 3 * 4 * 5
    # at t = 1 all steps of a displacement end at one point, if a sum of steps is not rounded below
    assert counts[0] in (7 * (3 * 4 * 5 - 4), 7 * 3 * 4 * 5)


def test_a_flow_is_a_method() -> None:
    draws = bf.sample(MODEL, FLOW, draws=5, seed=1)
    assert torch.equal(draws.flat, FLOW.sample(5, 1))
    assert (draws.n_chains, draws.n_draws) == (1, 5)
    assert bf.sample(MODEL, FLOW, seed=1).n_draws == 1000
    assert (
        bf.sample(MODEL, FLOW, draws=2, seed=1, dtype=torch.float32).theta.dtype
        == torch.float32
    )
    for options in ({"chains": 2}, {"warmup": 1}, {"init": "prior"}, {"checkpoint": "run"}):
        with pytest.raises(
            ValueError, match=f"Flow takes draws, not {next(iter(options))}"
        ):
            bf.sample(MODEL, FLOW, **options)
    other = bf.BayesianModel(
        NET, bf.priors.Normal(), bf.likelihoods.Gaussian(0.3), X, X.cos()
    )
    with pytest.raises(ValueError, match=r"to another posterior; flow\.bind"):
        bf.sample(other, FLOW, draws=2)
    assert bf.sample(other, FLOW.bind(other), draws=2).info["model"] == other.fingerprint()
    adaptive = bf.GaussNewtonFlow(MODEL, GaussNewton(), solver=Solver("bosh3"))
    assert bf.sample(MODEL, adaptive, draws=2).info["gradients"] is None
    with pytest.raises(TypeError, match="method must be a Method"):
        bf.sample(MODEL, MODEL)  # type: ignore[arg-type]


def test_what_is_made_of_a_flow_is_a_method_too() -> None:
    flow = Flow.of(
        built(lambda: WeightsVelocity(MODEL.spec, 8, 1)), MODEL, solver=Solver(steps=2)
    )
    fast = distil(flow, 2, trajectories=20, training=FEW, progress=False)
    assert isinstance(fast, FlowMap)
    assert torch.equal(bf.sample(MODEL, fast, draws=3, seed=2).flat, fast.sample(3, 2))


def test_draws_go_from_door_to_door() -> None:
    """Sampler, flow, refinement, prediction, report: nothing but the model and draws is carried
    along.
    """
    chains = bf.sample(
        MODEL, bf.HMC(), chains=4, warmup=40, draws=60, seed=0, progress=False
    )
    flow = bf.fit_flow(
        MODEL, chains, velocity="weights", training=FEW, seed=0, progress=False
    )
    refined = bf.refine(
        MODEL, bf.sample(MODEL, flow, draws=40, seed=1), 4, seed=2, progress=False
    )
    x, y = X + 0.1, (X + 0.1).sin()
    assert bf.predict(MODEL, refined, x).mean.shape == (10,)
    made = bf.report(MODEL, {"HMC": chains, "flow": refined}, x, y, path=None)
    assert [row["seconds"] for row in made.table] == [
        chains.info["seconds"],
        refined.info["seconds"],
    ]
    assert bf.align(MODEL, refined).info == refined.info
