"""Draws, flows and densities know whose they are: another model refuses them, their own takes them
in every form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bnnflow as bf
from bnnflow.transport import (
    Flow,
    FlowMap,
    ScoreVelocity,
    Solver,
    WeightsVelocity,
    fit_gaussian,
)
from tests.problems import built

X = torch.linspace(-1, 1, 12, dtype=torch.float64).unsqueeze(-1) / 3


def model(shift: float = 0.0, units: int = 3, **changes: Any) -> bf.BayesianModel:
    net = built(
        lambda: nn.Sequential(nn.Linear(1, units), nn.Tanh(), nn.Linear(units, 1)),
        torch.float64,
    )
    return bf.BayesianModel(
        net,
        bf.priors.Normal(),
        bf.likelihoods.Gaussian(0.3),
        X,
        X.sin() + shift * X,
        **changes,
    )


MODEL = model()
DRAWS = bf.sample(MODEL, bf.HMC(max_leapfrog=4), chains=4, warmup=5, draws=10, seed=0)
USES: dict[str, Callable[[bf.BayesianModel, Any], Any]] = {
    "predict": lambda model, draws: bf.predict(model, draws, X),
    "diagnose": lambda model, draws: bf.diagnose(model, draws, X),
    "report": lambda model, draws: bf.report(model, {"HMC": draws}, X, X, path=None),
    "weight_convergence": lambda model, draws: bf.weight_convergence(model, draws),
    "to_arviz": lambda model, draws: bf.to_arviz(model, draws),
    "align": lambda model, draws: bf.align(model, draws),
    "evidence": lambda model, draws: bf.evidence(
        model, draws, bf.SMC(particles=10), progress=False
    ),
    "fit_flow": lambda model, draws: bf.fit_flow(
        model, draws, velocity="weights", progress=False, training=bf.Training(steps=1)
    ),
    "held-out draws": lambda model, draws: bf.fit_flow(
        model,
        DRAWS.theta,
        held_out=draws,
        velocity="weights",
        progress=False,
        training=bf.Training(steps=1),
    ),
    "fit_gaussian": lambda model, draws: fit_gaussian(model, draws),
    "correct": lambda model, draws: bf.correct(
        model,
        bf.GaussNewtonFlow(model, solver=Solver(steps=2)),
        50,
        method="importance",
        held_out=draws,
        progress=False,
    ),
}


@pytest.mark.parametrize("name", USES)
@pytest.mark.filterwarnings("ignore")
def test_draws_of_another_model_are_refused(name: str) -> None:
    use, other = USES[name], model(shift=1e-3)
    with pytest.raises(
        ValueError,
        match=f"draws of another model, with fingerprint {MODEL.fingerprint()}; this one has ",
    ):
        use(other, DRAWS)
    if name not in ("evidence", "correct"):  # what costs little is done
        use(MODEL, DRAWS)


def test_weights_say_nothing_and_refine_starts_anywhere() -> None:
    other = model(shift=1.0)
    bf.predict(other, DRAWS.theta)
    bf.predict(other, replace(DRAWS, info={}))
    moved = bf.refine(other, DRAWS, 1, progress=False)
    assert moved.info["model"] == other.fingerprint()
    assert bf.align(other, DRAWS.theta).shape == DRAWS.theta.shape


def test_a_model_takes_its_own_draws_in_every_form() -> None:
    half = MODEL.to(dtype=torch.float32)
    assert half.fingerprint() == MODEL.fingerprint()
    # though its data are rounded
    assert half.to(dtype=torch.float64).fingerprint() == MODEL.fingerprint()
    bf.predict(half, DRAWS)
    narrow = bf.sample(
        MODEL,
        bf.HMC(max_leapfrog=4),
        chains=2,
        warmup=2,
        draws=3,
        seed=0,
        dtype=torch.float32,
    )
    bf.predict(MODEL, narrow)
    straight = MODEL.linearised(DRAWS.flat[0])
    bf.predict(straight, DRAWS)
    bf.predict(straight.to(dtype=torch.float32), DRAWS)
    with pytest.raises(ValueError, match="draws of another model"):
        bf.predict(
            MODEL,
            bf.sample(
                straight, bf.HMC(max_leapfrog=4), chains=2, warmup=2, draws=3, seed=0
            ),
        )
    with pytest.raises(ValueError, match="draws of another model"):
        bf.predict(model(shift=1.0).linearised(DRAWS.flat[0]), DRAWS)
    moved = MODEL.to(dtype=torch.float32)
    moved.y = moved.y + 1  # another posterior, whatever it was converted from
    assert moved.fingerprint() != MODEL.fingerprint()
    with pytest.raises(ValueError, match="draws of another model"):
        bf.predict(moved, DRAWS)
    half.y += 1  # in place, after it was recognised
    with pytest.raises(ValueError, match="draws of another model"):
        bf.predict(half, DRAWS)


def test_loading_with_a_model_asks_whose_it_is(tmp_path: Path) -> None:
    draws, run = DRAWS.save(tmp_path / "draws"), tmp_path / "run"
    bf.sample(MODEL, bf.SGLD(), chains=2, warmup=1, draws=2, seed=0, checkpoint=run)
    field = built(lambda: WeightsVelocity(MODEL.spec, 4, 1), torch.float64)
    blind = Flow.of(field, MODEL).save(tmp_path / "blind")
    seeing = Flow.of(built(lambda: _informed(MODEL), torch.float64), MODEL)
    informed = seeing.save(tmp_path / "informed")
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    mapped = FlowMap(seeing.velocity, seeing.source, seeing.spec, times).save(
        tmp_path / "map"
    )
    for path, message, others in (
        (draws, "draws of another model", (model(shift=1.0), model(units=4))),
        (run, "draws of another model", (model(shift=1.0), model(units=4))),
        (blind, "not the model's weights.*10 in the file, 13 in the model", (model(units=4),)),
        (informed, "not the model", (model(shift=1.0), model(units=4))),
        (mapped, "not the model", (model(shift=1.0), model(units=4))),
    ):  # fmt: skip
        bf.load(path, MODEL)
        for other in others:
            with pytest.raises(ValueError, match=message):
                bf.load(path, other)
    bf.load(blind, model(shift=1.0))  # which looks at no data


def _informed(model: bf.BayesianModel) -> nn.Module:
    from bnnflow.transport import GradientSteps, InformedVelocity

    return InformedVelocity(model.spec, GradientSteps(1), 4, 1)


def test_a_flow_on_some_rows_is_saved_as_that(tmp_path: Path) -> None:
    flow = Flow.of(built(lambda: _informed(MODEL), torch.float64), MODEL)
    part = flow.on_batch(5, 1)
    found = bf.load(part.save(tmp_path / "part"), MODEL)
    assert isinstance(found, Flow)
    assert torch.equal(found.sample(4, 0), part.sample(4, 0))
    assert not torch.equal(found.sample(4, 0), flow.sample(4, 0))
    assert torch.equal(found.bind(MODEL).sample(4, 0), flow.sample(4, 0))
    drive = Flow.of(ScoreVelocity(), MODEL).on_batch(3, 0)
    assert torch.equal(
        bf.load(drive.save(tmp_path / "drive"), MODEL).sample(4, 0), drive.sample(4, 0)
    )
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    few = FlowMap(part.velocity, part.source, part.spec, times)
    assert torch.equal(
        bf.load(few.save(tmp_path / "few"), MODEL).sample(4, 0), few.sample(4, 0)
    )
