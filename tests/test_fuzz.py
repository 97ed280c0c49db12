"""The gate under fire: malformed values in the place of every argument of everything public.

Every outcome must be a right result, or an error that names the argument. `fuzzing` has the calls
and the values.
"""

import collections
import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bnnflow as bf
from bnnflow import data, equivariant, inference, predictive, symmetry, transport
from tests import fuzzing

RESULTS = {
    "Barrier",
    "Calibrated",
    "Diagnosis",
    "PredictiveCheck",
    "Plane",
    "Prediction",
    "Radii",
    "Report",
    "Stacked",
    "WeightConvergence",
}
RESULTS |= {
    "Correction",
    "Dataset",
    "INRs",
    "FlowMap",
    "ManifoldFlow",
    "CompletedFlow",
    "TransformedDensity",
    "Reliability",
}
PROTOCOLS = {
    "Field",
    "FixedPrior",
    "HierarchicalPrior",
    "Likelihood",
    "Method",
    "Path",
    "Prior",
    "ProbabilityPath",
    "Run",
}
WITHOUT_ARGUMENTS = {
    "Constant",
    "Independent",
    "Matched",
    "Uniform",
    "Poisson",
    "Categorical",
    "Bernoulli",
}
# made of parts that were checked before, or of modules alone
INNER = {"PosteriorTargets", "NetworkLoss", "Pushforward"}
# set upon by scikit-learn's own checks, whose messages they have
ESTIMATORS = {"BayesianMLPClassifier", "BayesianMLPRegressor"}
EVERY = 97  # of the cases, in the suite


class Case(collections.namedtuple("Case", "call name what value form")):
    """One call with one argument replaced."""


def cases(world: fuzzing.World) -> Iterator[Case]:
    for call in fuzzing.calls(world):
        for name, value in call.arguments.items():
            yield from (
                Case(call, name, what, other, True) for what, other in fuzzing.forms(value)
            )
            wrong = itertools.chain(
                fuzzing.malformed(value), fuzzing.swapped(call, name, world)
            )
            yield from (Case(call, name, what, other, False) for what, other in wrong)


def outcomes(chosen: Iterator[Case]) -> dict[str, list[str]]:
    """Return the cases of every outcome, in words."""
    found: dict[str, list[str]] = {kind: [] for kind in fuzzing.OUTCOMES}
    clean: dict[str, Any] = {}
    for call, name, what, value, form in chosen:
        if call.name not in clean:
            clean = {call.name: fuzzing.run(call, call.arguments)}  # of one call at a time
        kind, message = fuzzing.outcome(call, name, value, clean[call.name], form=form)
        found[kind].append(f"{call.name}({name}={what}): {message}")
    return found


def check(found: dict[str, list[str]]) -> None:
    total = sum(map(len, found.values()))
    assert not found["silent"]
    assert not found["refused"]
    for kind in ("obscure", "other"):
        assert len(found[kind]) < 0.01 * total, "\n".join(
            [f"{kind} of {total}:", *found[kind]]
        )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fuzzing.World]:
    monkeypatch.chdir(tmp_path)  # words are names of files to some arguments
    # networks among the arguments are drawn from torch's own generator
    with torch.random.fork_rng(devices=[]):
        yield fuzzing.World()


def test_some_malformed_values_are_refused_by_name(world: fuzzing.World) -> None:
    check(outcomes(itertools.islice(cases(world), 0, None, EVERY)))


@pytest.mark.validate
def test_every_malformed_value_is_refused_by_name(world: fuzzing.World) -> None:
    found = outcomes(cases(world))
    print({kind: len(each) for kind, each in found.items()})
    check(found)


def test_everything_public_is_under_fire(world: fuzzing.World) -> None:
    called = {
        part for call in fuzzing.calls(world) for part in call.name.split(" ")[0].split(".")
    }
    rooms = (
        bf,
        data,
        equivariant,
        inference,
        predictive,
        symmetry,
        transport,
        bf.likelihoods,
        bf.priors,
        bf.metrics,
    )
    names = {
        name for room in rooms for name in room.__all__ if callable(getattr(room, name))
    }
    names -= {name for name in names if inspect.ismodule(getattr(bf, name, None))}
    assert (
        names - called
        <= RESULTS | PROTOCOLS | WITHOUT_ARGUMENTS | INNER | ESTIMATORS | {"FlatPrior"}
    )


def test_fields_without_parameters_and_single_draws_are_refused(
    world: fuzzing.World,
) -> None:
    with pytest.raises(ValueError, match="velocity, has no parameters"):
        bf.fit_flow(
            world.model,
            world.theta,
            velocity=torch.nn.Sequential(),
            seed=0,
            progress=False,
            training=bf.Training(steps=1),
        )
    with pytest.raises(ValueError, match="n must be at least 2"):
        world.flow.solver_error(1)
    with pytest.raises(ValueError, match="state must hold one tensor or more"):
        transport.integrate(lambda t, state: state, (), torch.tensor([0.0, 1.0]))
