"""What tells two models apart, and what does not."""

import datetime
import functools
import math
import os
import subprocess
import sys
import threading
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import HalfNormal, Normal, TransformedDistribution
from torch.distributions.transforms import AffineTransform

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.identity import Identity

X = torch.linspace(-1, 1, 8).reshape(4, 2)
LABELS = torch.tensor([0, 1, 1, 0])


@pytest.fixture(scope="module")
def linear():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Linear(2, 2)


class Scaled(nn.Module):
    """A layer with plain attributes."""

    def __init__(self, linear, scale=1.0, function=torch.sin, table=None, buffer=0.0):
        super().__init__()
        self.linear, self.scale, self.function, self.table = linear, scale, function, table
        self.register_buffer("shift", torch.tensor(buffer), persistent=False)

    def forward(self, x):
        return self.scale * self.function(self.linear(x)) + self.shift


@dataclass(frozen=True)
class Weighted:
    """Classification with a weight for every class."""

    weights: torch.Tensor
    inner: nn.Module | None = None
    options: dict = field(default_factory=dict)
    kind: str = "classification"
    parameters: dict = field(default_factory=dict)

    def validate(self, y, n_outputs):
        return y

    def log_prob(self, outputs, y, parameters):
        chosen = (
            outputs.log_softmax(-1)
            .gather(-1, y.expand(outputs.shape[:-1]).unsqueeze(-1))
            .squeeze(-1)
        )
        return chosen * self.weights.to(outputs)[y]

    def mean(self, outputs, parameters=None):
        return outputs.softmax(-1)


def times(factor):
    return lambda x: factor * x


def fingerprint(net, likelihood=None, x=X, prior=None):
    likelihood = likelihood or likelihoods.Categorical()
    return bf.BayesianModel(
        net, prior or priors.Normal(), likelihood, x, LABELS
    ).fingerprint()


class Multiplied:
    def __init__(self, factor):
        self.factor = factor

    def by(self, x):
        return self.factor * x

    def __call__(self, x):
        return self.factor * x


def power(x, exponent):
    return x**exponent


class Named(dict):
    """A dict with attributes."""

    def __init__(self, name):
        super().__init__(a=1)
        self.name = name


class Level(int):
    """A number of a class of its own."""


def marked(factor):
    def function(x):
        return function.factor * x

    function.factor = factor
    return function


ATTRIBUTES = {
    "a number": lambda linear: Scaled(linear, 3.0),
    "a function": lambda linear: Scaled(linear, function=torch.cos),
    "a lambda": lambda linear: Scaled(linear, function=lambda x: x * 2.0),
    "another constant": lambda linear: Scaled(linear, function=lambda x: x * 3.0),
    "another operation": lambda linear: Scaled(linear, function=lambda x: x + 3.0),
    "a closure": lambda linear: Scaled(linear, function=times(2.0)),
    "another closure": lambda linear: Scaled(linear, function=times(3.0)),
    "a tensor in a closure": lambda linear: Scaled(
        linear, function=times(torch.tensor([2.0, 3.0]))
    ),
    "another tensor in it": lambda linear: Scaled(
        linear, function=times(torch.tensor([2.0, 4.0]))
    ),
    "a method": lambda linear: Scaled(linear, function=Multiplied(2.0).by),
    "of another object": lambda linear: Scaled(linear, function=Multiplied(3.0).by),
    "an object": lambda linear: Scaled(linear, function=Multiplied(2.0)),
    "another object": lambda linear: Scaled(linear, function=Multiplied(3.0)),
    "a partial": lambda linear: Scaled(
        linear, function=functools.partial(power, exponent=2)
    ),
    "another partial": lambda linear: Scaled(
        linear, function=functools.partial(power, exponent=3)
    ),
    "a default": lambda linear: Scaled(linear, function=lambda x, c=2.0: x * c),
    "another default": lambda linear: Scaled(linear, function=lambda x, c=3.0: x * c),
    "an array": lambda linear: Scaled(linear, table=np.arange(3.0)),
    "another array": lambda linear: Scaled(linear, table=np.arange(3.0) + 1),
    "a set": lambda linear: Scaled(linear, table={"a", "b"}),
    "another set": lambda linear: Scaled(linear, table={"a", "c"}),
    "nested": lambda linear: Scaled(linear, table=[{"deep": (1, torch.ones(2))}]),
    "nested otherwise": lambda linear: Scaled(
        linear, table=[{"deep": (1, torch.zeros(2))}]
    ),
    "a date": lambda linear: Scaled(linear, table=datetime.date(2020, 1, 1)),
    "another date": lambda linear: Scaled(linear, table=datetime.date(2020, 1, 2)),
    "a buffer that is not saved": lambda linear: Scaled(linear, buffer=1.0),
    "a submodule's setting": lambda linear: Scaled(linear, function=nn.LeakyReLU(0.1)),
    "another setting": lambda linear: Scaled(linear, function=nn.LeakyReLU(0.2)),
    "a dict with attributes": lambda linear: Scaled(linear, table=Named("a")),
    "with other attributes": lambda linear: Scaled(linear, table=Named("b")),
    "a number of its own class": lambda linear: Scaled(linear, table=Level(1)),
    "another number": lambda linear: Scaled(linear, table=Level(2)),
    "a function with attributes": lambda linear: Scaled(linear, function=marked(2.0)),
    "a function with others": lambda linear: Scaled(linear, function=marked(3.0)),
    "an epsilon": lambda linear: Scaled(
        linear, function=nn.LayerNorm(2, 1e-5, elementwise_affine=False)
    ),
    "another epsilon": lambda linear: Scaled(
        linear, function=nn.LayerNorm(2, 1e-3, elementwise_affine=False)
    ),
}


def test_whatever_a_module_computes_with_is_seen(linear):
    prints = {name: fingerprint(make(linear)) for name, make in ATTRIBUTES.items()}
    prints["none of it"] = fingerprint(Scaled(linear))
    assert len(set(prints.values())) == len(prints)
    assert {name: fingerprint(make(linear)) for name, make in ATTRIBUTES.items()} == {
        name: found for name, found in prints.items() if name in ATTRIBUTES
    }


def test_members_of_modules_of_the_callers_are_seen_where_code_names_them(linear):
    settings, inner = (
        types.ModuleType("settings_of_a_test"),
        types.ModuleType("settings_of_a_test.inner"),
    )
    settings.factor, settings.other, settings.inner = 2.0, 1.0, inner
    inner.settings, inner.power = settings, 2  # modules may hold one another
    space = {"settings": settings, "__name__": "code_of_a_test"}
    exec(
        "def function(x):\n    return settings.factor * x**settings.inner.power * "
        "settings.inner.settings.factor",
        space,
    )
    prints = []
    for change in (("other", 5.0), ("factor", 3.0), ("other", 6.0)):
        setattr(settings, *change)
        prints.append(fingerprint(Scaled(linear, function=space["function"])))
    inner.power = 3
    prints.append(fingerprint(Scaled(linear, function=space["function"])))
    assert prints[1] == prints[2]
    assert len(set(prints)) == 3


def test_what_cannot_be_identified_is_told_apart_in_one_process():
    first, second = (part for part in "a"), (part for part in "b")
    assert Identity().add(first, "a").digest == Identity().add(first, "a").digest
    assert Identity().add(first, "a").digest != Identity().add(second, "a").digest


def test_the_code_of_a_forward_is_seen_and_its_comments_are_not(linear):
    def model(body):
        source = (
            f"class Net(nn.Module):\n def __init__(s, l):\n  super().__init__()\n  s.l = l\n def "
            f"forward(s, x):\n{body}"
        )
        names = {"nn": nn, "torch": torch, "CONSTANT": 2.0}
        exec(source, names)
        return names, names["Net"](linear)

    _, one = model('  """Say."""\n  return torch.sin(s.l(x)) * CONSTANT')
    _, same = model(
        '  """Say otherwise."""\n\n  # a comment\n  return torch.sin(s.l(x)) * CONSTANT'
    )
    _, other = model("  return torch.sin(s.l(x)) * CONSTANT + 1.0")
    changed, four = model('  """Say."""\n  return torch.sin(s.l(x)) * CONSTANT')
    changed["CONSTANT"] = 3.0
    assert fingerprint(one) == fingerprint(same)
    assert len({fingerprint(each) for each in (one, other, four)}) == 3


def test_what_a_likelihood_holds_is_seen(linear):
    weights = torch.tensor([1.0, 2.0])
    several = [
        Weighted(weights),
        Weighted(weights + 1),
        Weighted(weights, nn.LeakyReLU(0.1)),
        Weighted(weights, nn.LeakyReLU(0.2)),
        Weighted(weights, options={"a": [weights.numpy()]}),
        Weighted(weights, options={"a": [weights.numpy() + 1]}),
        Weighted(weights, options={"a": Normal(0.0, 1.0)}),
        Weighted(weights, options={"a": Normal(0.0, 2.0)}),
        Weighted(
            weights,
            options={
                "a": TransformedDistribution(Normal(0.0, 1.0), AffineTransform(0.0, 2.0))
            },
        ),
        Weighted(
            weights,
            options={
                "a": TransformedDistribution(Normal(0.0, 1.0), AffineTransform(0.0, 3.0))
            },
        ),
    ]
    assert len({fingerprint(linear, each) for each in several}) == len(several)
    assert fingerprint(linear, Weighted(weights)) == fingerprint(
        linear, Weighted(weights.double())
    )


@dataclass(frozen=True)
class Grouped:
    """One scale for everything, with a factor that is no distribution's."""

    factors: torch.Tensor

    def parameters(self, spec):
        return {"scale": HalfNormal(torch.tensor(1.0))}

    def conditional(self, spec, parameters):
        scale = parameters["scale"]
        return {
            name: Normal(
                torch.zeros(()),
                (scale * self.factors[0]).reshape(*scale.shape[:-1], *(1,) * len(shape)),
            )
            for name, shape in spec.shapes.items()
        }


def test_what_a_prior_holds_is_seen(linear):
    one, two = (Grouped(torch.tensor([1.0, extra])) for extra in (2.0, 3.0))
    assert fingerprint(linear, prior=one) != fingerprint(linear, prior=two)


def test_what_was_computed_and_kept_does_not_count():
    one, two = (
        torch.distributions.Categorical(logits=torch.tensor([0.1, 0.9])) for _ in range(2)
    )
    assert two.probs.shape == (2,)  # computes and keeps them
    assert Identity().add(one, "d").digest == Identity().add(two, "d").digest


def test_objects_that_hold_themselves_end():
    one, two = [], []
    one.append(one)
    two.append([two])
    assert Identity().add(one, "x").digest != Identity().add(two, "x").digest


def test_what_cannot_be_identified_is_named(linear, tmp_path):
    model = bf.BayesianModel(
        Scaled(linear),
        priors.Normal(),
        Weighted(torch.ones(2), options={"lock": threading.Lock()}),
        X,
        LABELS,
    )
    assert model.unidentified == ("likelihood.options.lock (lock)",)
    assert model.fingerprint() == model.fingerprint()
    with pytest.raises(
        ValueError, match=r"checkpoint needs .* likelihood.options.lock \(lock\)"
    ):
        bf.sample(
            model,
            bf.SGLD(),
            chains=1,
            warmup=1,
            draws=1,
            seed=0,
            checkpoint=tmp_path / "run",
        )
    assert (
        bf.BayesianModel(
            linear, priors.Normal(), likelihoods.Categorical(), X, LABELS
        ).unidentified
        == ()
    )


PROCESS = """
from tests.test_identity import fingerprints
print(*fingerprints(), sep=chr(10))
"""


def fingerprints() -> list[str]:
    """Return those of what is known, and at last that of what cannot be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Linear(2, 2)
    held = {"set": {"x", "y", "z"}, "f": times(2.0), "d": Normal(0.0, 1.0)}
    known = Weighted(torch.ones(2), nn.Tanh(), held)
    locked = Weighted(torch.ones(2), options={"l": threading.Lock()})
    return [
        *(fingerprint(make(linear)) for make in ATTRIBUTES.values()),
        fingerprint(linear, known, prior=Grouped(torch.ones(2))),
        fingerprint(linear, locked),
    ]


def test_processes_agree_on_what_is_known_and_on_nothing_else():
    # a set of words goes by the hashes of its own process
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    out = subprocess.run(
        [sys.executable, "-c", PROCESS],
        env=os.environ
        | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
        text=True,
        capture_output=True,
    )
    assert out.returncode == 0, out.stderr
    (*first, odd), (*second, other) = fingerprints(), out.stdout.splitlines()
    assert first == second
    assert odd != other


def test_the_fingerprint_names_its_version(linear):
    assert fingerprint(linear).startswith("2:")


def test_numbers_of_one_value_and_several_types():
    values = [
        1,
        1.0,
        True,
        "1",
        b"1",
        None,
        (1,),
        [1],
        {1},
        {1: 1},
        math.nan,
        np.float64(1),
        torch.tensor(1),
        1j,
    ]
    found = {Identity().add(value, "x").digest for value in values}
    assert len(found) == len(values)
    assert (
        Identity().add(np.float64(1), "x").digest
        == Identity().add(torch.tensor(1.0), "x").digest
    )
    assert (
        Identity().add(np.arange(3), "x").digest
        != Identity().add(np.arange(3.0), "x").digest
    )
