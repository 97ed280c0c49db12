"""Three states of knowledge: symmetries that are known, none, and those of a network that cannot be
labelled.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors, symmetry
from bnnflow.equivariant import DWSNet
from bnnflow.report import plots, weight_convergence
from bnnflow.transport import (
    Matched,
    MiniBatchOT,
    Source,
    WeightsVelocity,
    fit_flow,
    fit_gaussian,
)
from bnnflow.weights import Symmetries, WeightSpec

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().double().eval()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (
            nn.Linear(1, 4),
            nn.Linear(1, 4),
            nn.Linear(1, 4),
            nn.Linear(4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unsqueeze(-1)
        scores = torch.matmul(self.q(tokens), self.k(tokens).mT)
        return self.out((torch.softmax(scores, -1) @ self.v(tokens)).mean(1))


UNKNOWN = {  # what cannot be labelled, and how the messages name it
    "batch norm": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)
        ),
        r"module '1' \(BatchNorm1d\)",
    ),
    "grouped convolution": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 3)),
            nn.Conv1d(1, 4, 1),
            nn.Conv1d(4, 4, 1, groups=2),
            nn.Flatten(),
            nn.Linear(12, 1),
        ),
        r"module '2' \(Conv1d\)",
    ),
    "attention": (Attention, "operation"),
    "softmax inside": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 1)),
        r"module '1' \(Softmax\)",
    ),
    "prelu": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 1)),
        r"module '1' \(PReLU\)",
    ),
}
NONE = {
    "linear": lambda: nn.Linear(3, 1),
    "one layer in a stack": lambda: nn.Sequential(nn.Linear(3, 1)),
}


def model_of(net: nn.Module, prior: priors.Prior | None = None) -> bf.BayesianModel:
    x = torch.randn(12, 3, generator=generator(1), dtype=F64)
    return bf.BayesianModel(
        net, prior or priors.Normal(), likelihoods.Gaussian(0.1), x, x.sum(1)
    )


def as_draws(model: bf.BayesianModel, theta: Tensor) -> bf.Draws:
    return bf.Draws(theta, model.log_joint(theta), {"n_steps": torch.ones(theta.shape[:2])})


@pytest.fixture(params=UNKNOWN, ids=str)
def unknown(request: pytest.FixtureRequest) -> tuple[bf.BayesianModel, str]:
    make, name = UNKNOWN[request.param]
    return model_of(built(make)), name


@pytest.mark.parametrize("name", UNKNOWN)
def test_the_spec_says_that_and_why_symmetries_are_not_known(name: str) -> None:
    make, named = UNKNOWN[name]
    spec = model_of(built(make)).spec
    assert not any(spec.symmetries())
    with pytest.raises(ValueError, match=f"not known: cannot label {named}"):
        spec.known_symmetries()
    assert f"symmetries: not known, {spec.unknown}" in repr(spec)
    again = WeightSpec.from_description(json.loads(json.dumps(spec.describe())))
    assert again == spec
    assert again.unknown == spec.unknown


@pytest.mark.parametrize("name", NONE)
def test_none_is_known_where_there_is_none(name: str) -> None:
    model = model_of(built(NONE[name]))
    assert model.spec.known_symmetries() == Symmetries(
        frozenset(), frozenset(), frozenset()
    )
    assert "symmetries: none" in repr(model.spec)
    theta = torch.randn(5, model.dim, generator=generator(), dtype=F64)
    assert torch.equal(bf.align(model, theta), theta)
    assert WeightSpec.from_description(model.spec.describe()) == model.spec


def test_a_linearised_model_is_known_to_have_none() -> None:
    model = model_of(built(UNKNOWN["batch norm"][0]))
    linear = model.linearised(torch.zeros(model.dim, dtype=F64))
    theta = torch.randn(5, model.dim, generator=generator(), dtype=F64)
    assert torch.equal(bf.align(linear, theta), theta)
    assert "symmetries: none" in repr(linear.spec)
    assert not WeightSpec.from_description(linear.spec.describe()).unknown


def test_descriptions_from_before_are_not_taken_for_none() -> None:
    values = model_of(built(UNKNOWN["prelu"][0])).spec.describe()
    del values["unknown"]
    assert WeightSpec.from_description(values).unknown
    values = WeightSpec.of(built(NONE["linear"])).describe()
    assert not WeightSpec.from_description(values).unknown


def test_what_is_all_about_symmetry_refuses_by_name(
    unknown: tuple[bf.BayesianModel, str],
) -> None:
    model, name = unknown
    spec = model.spec
    theta = torch.randn(5, model.dim, generator=generator(), dtype=F64)
    calls: dict[str, Callable[[], object]] = {
        "align": lambda: bf.align(model, theta),
        "align to a reference": lambda: bf.align(model, theta, reference=theta[0]),
        "align draws": lambda: bf.align(model, as_draws(model, theta[None])),
        "match": lambda: symmetry.match(theta, spec, theta[0]),
        "match activations": lambda: symmetry.match_activations(
            theta, spec, theta[0], model.x, net=model.net
        ),
        "sinkhorn": lambda: symmetry.sinkhorn_rebasin(theta, spec, theta[0]),
        "frechet mean": lambda: symmetry.frechet_mean(theta, spec),
        "sort": lambda: symmetry.sort_units(theta, spec),
        "scale": lambda: symmetry.normalise_scale(theta, spec),
        "sign": lambda: symmetry.normalise_sign(theta, spec),
        "geodesic": lambda: symmetry.Geodesic(theta[0], theta[1], spec),
        "spheres": lambda: symmetry.Spheres(spec),
        "random symmetry": lambda: spec.random_symmetry(theta, 0),
        "order": lambda: spec.log_group_order,
        "structure": lambda: plots.block_structure(spec),
        "equivariant network": lambda: DWSNet(spec, 1, 1),
        "matched pairs": lambda: Matched().pair(
            theta, theta, spec, spec.symmetries(), generator()
        ),
        "matched plan": lambda: MiniBatchOT(matched=True).pair(
            theta, theta, spec, spec.symmetries(), generator()
        ),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=name):
            call()


def test_a_group_of_the_callers_own_is_used() -> None:
    """Whoever knows the symmetries of an unlabelled network may say so: there are none here."""
    model = model_of(built(UNKNOWN["prelu"][0]))
    theta = torch.randn(5, model.dim, generator=generator(), dtype=F64)
    assert torch.equal(
        symmetry.match(theta, model.spec, theta[0], group=model.spec.symmetries()), theta
    )


def test_chains_in_copies_are_not_said_to_differ(
    unknown: tuple[bf.BayesianModel, str],
) -> None:
    model, _ = unknown
    chain = torch.randn(30, model.dim, generator=generator(3), dtype=F64)
    draws = as_draws(model, torch.stack([chain, chain.flip(0) + 1e-9]))
    result = weight_convergence(model, draws)
    assert result.unknown == model.spec.unknown
    assert result.aligned.keys() == result.raw.keys()
    assert "symmetries not known" in str(result)
    assert "modulo symmetry" not in str(result)
    label = plots.convergence(result).axes[0].get_xlabel()
    assert "symmetries not known" in label


def test_permuted_batch_norm_chains_get_an_honest_conclusion() -> None:
    """Fresh statistics are equal, so permuted copies are exact, and no label could say so in
    general.
    """
    model = model_of(built(UNKNOWN["batch norm"][0]))
    chain = 0.1 * torch.randn(40, model.dim, generator=generator(3), dtype=F64)
    centre = torch.randn(model.dim, generator=generator(4), dtype=F64)
    params = model.spec.unflatten(centre + chain)
    moved = {
        "0.weight": params["0.weight"].flip(-2),
        "0.bias": params["0.bias"].flip(-1),
        "1.weight": params["1.weight"].flip(-1),
        "1.bias": params["1.bias"].flip(-1),
        "3.weight": params["3.weight"].flip(-1),
        "3.bias": params["3.bias"],
    }
    copy = model.spec.flatten(moved)
    torch.testing.assert_close(model.outputs(copy), model.outputs(centre + chain))
    result = weight_convergence(model, as_draws(model, torch.stack([centre + chain, copy])))
    assert "not known" in result.conclusion
    assert "BatchNorm1d" in result.conclusion
    assert "not even modulo symmetry" not in str(result)


def test_baselines_say_that_draws_were_not_matched(
    unknown: tuple[bf.BayesianModel, str],
) -> None:
    model, _ = unknown
    theta = torch.randn(60, model.dim, generator=generator(), dtype=F64)
    info = fit_gaussian(model, theta).info
    assert info["matched"] is False
    assert model.spec.unknown in info["symmetries"]


def test_flows_take_other_fields_and_corrections_say_what_was_not_looked_at() -> None:
    model = model_of(built(UNKNOWN["prelu"][0]))
    theta = model.sample_prior(64, seed=0)
    with pytest.raises(ValueError, match=r"'1' \(PReLU\).*architecture='graph'"):
        fit_flow(model, theta, progress=False, training=bf.Training(steps=2))
    with torch.random.fork_rng(devices=[]):
        field = WeightsVelocity(model.spec, architecture="graph", width=8, depth=1)
    flow = fit_flow(
        model, theta, velocity=field, progress=False, training=bf.Training(steps=2)
    )
    found = bf.correct(model, flow, n=50, method="importance", progress=False)
    assert (
        "symmetries of the network are not known (cannot label module '1' (PReLU)"
        in str(found.info)
    )


def test_reports_say_so(unknown: tuple[bf.BayesianModel, str]) -> None:
    model, _ = unknown
    y = model.x.sum(1)
    made = bf.report(
        model, {"prior": model.sample_prior(20, seed=0)}, model.x, y, path=None
    )
    assert "not known: cannot label" in made.html()


def test_the_source_keeps_nothing_that_is_not_known(
    unknown: tuple[bf.BayesianModel, str],
) -> None:
    model, _ = unknown
    assert not any(Source(model.flat_prior).symmetries(model))


# ---------------------------------------- what is given to align


def perceptron_model() -> bf.BayesianModel:
    return model_of(
        built(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    )


def test_weights_that_are_not_the_models_are_refused() -> None:
    model = perceptron_model()
    theta = torch.randn(4, model.dim, generator=generator(), dtype=F64)
    wrong = {
        "draws must end in an axis": [
            theta[:, 1:],
            theta.unsqueeze(-1),
            torch.cat([theta, theta], 1),
            theta[0, :1],
        ],
        "NaN or infinite": [theta.index_fill(1, torch.tensor([2]), float("nan"))],
        "empty": [theta[:0]],
    }
    for message, each in wrong.items():
        for given in each:
            with pytest.raises(ValueError, match=message):
                bf.align(model, given)
    with pytest.raises(ValueError, match="reference must end in an axis"):
        bf.align(model, theta, reference=theta[0, 1:])
    with pytest.raises(ValueError, match="reference must be"):
        bf.align(model, theta, reference=theta[:3])
    with pytest.raises(ValueError, match="reference holds weights that are NaN"):
        bf.align(model, theta, reference=theta[0] * float("inf"))
    with pytest.raises(TypeError, match="floating-point"):
        bf.align(model, theta.long())
    with pytest.raises(
        TypeError, match="draws must be a Draws or a tensor of real numbers"
    ):
        bf.align(model, "weights")


@pytest.mark.parametrize(
    "convert",
    [lambda theta: theta.float(), lambda theta: theta.numpy()],
    ids=["float32", "numpy"],
)
def test_weights_of_another_type_are_aligned_alike(
    convert: Callable[[Tensor], object],
) -> None:
    model = perceptron_model()
    theta = torch.randn(4, model.dim, generator=generator(), dtype=F64)
    found = bf.align(model, convert(theta))
    torch.testing.assert_close(found.double(), bf.align(model, theta), rtol=1e-5, atol=1e-5)
