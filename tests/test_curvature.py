"""Parts of a model: subsets of its rows, its curvature, its symmetries, and priors as a type."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.model.priors import Prior
from bnnflow.transport.whitened import WhitenedPosterior
from bnnflow.weights import Symmetries, WeightSpec
from tests.problems import F64, built, chain, normal

N = 12


def model_of(prior=None, likelihood=None, **options) -> bf.BayesianModel:
    x = normal(N, 2)
    likelihood = likelihoods.Gaussian() if likelihood is None else likelihood
    net = built(lambda: chain(2, 3, 1))
    return bf.BayesianModel(
        net, prior or priors.Normal(0.8), likelihood, x, x.sum(1).sin(), **options
    )


@dataclass(frozen=True)
class LaplaceNoise(likelihoods.Likelihood):
    """What has no Fisher factor."""

    law: td.Distribution

    def log_prob(self, outputs: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return self.law.log_prob(y - outputs).sum(-1)

    def mean(self, outputs: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return outputs


# ---------------------------------------- subsets


def test_likelihoods_of_parts_multiply_to_that_of_all_rows() -> None:
    model = model_of(temperature=0.7)
    theta = normal(4, model.dim, seed=1)
    parts = [
        model.subset(slice(5)),
        model.subset(torch.arange(5, N)),
        model.subset(torch.arange(N).flip(0)),
    ]
    whole = sum(part.log_likelihood(theta) for part in parts[:2])
    torch.testing.assert_close(whole, model.log_likelihood(theta))
    torch.testing.assert_close(parts[2].log_joint(theta), model.log_joint(theta))
    for part in parts:
        torch.testing.assert_close(
            part.log_prior(theta), model.log_prior(theta), rtol=0, atol=0
        )
    twice = model.subset(torch.tensor([3, 3]))
    expected = 2 * model.pointwise_log_likelihood(theta)[:, 3]
    torch.testing.assert_close(twice.log_likelihood(theta), expected)


def test_a_subset_is_another_posterior_and_all_rows_are_the_same() -> None:
    model = model_of()
    assert model.subset(slice(None)).fingerprint() == model.fingerprint()
    part = model.subset(slice(7))
    assert part.fingerprint() != model.fingerprint()
    assert part.fingerprint() == model.subset(torch.arange(7)).fingerprint()
    draws = bf.Draws(
        normal(2, 3, model.dim), normal(2, 3), info={"model": model.fingerprint()}
    )
    with pytest.raises(ValueError, match="draws of another model"):
        bf.predict(part, draws)
    theta = normal(2, model.dim, seed=1)
    straight = model.linearised(theta[0])
    torch.testing.assert_close(
        straight.subset(slice(7)).outputs(theta), straight.outputs(theta)[:, :7]
    )


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (slice(0), ValueError),
        (slice(N, None), ValueError),
        (torch.tensor([], dtype=torch.int64), ValueError),
        (torch.ones(N, dtype=torch.bool), ValueError),
        (torch.ones(2, 2, dtype=torch.int64), ValueError),
        (torch.tensor([0.0, 1.0]), ValueError),
        ("all", TypeError),
        (None, TypeError),
        (torch.tensor([N]), IndexError),
    ],
    ids=str,
)
def test_rows_that_are_none_are_refused(rows, kind) -> None:
    with pytest.raises(kind, match="rows" if kind is not IndexError else "out of"):
        model_of().subset(rows)


# ---------------------------------------- curvature


@pytest.mark.parametrize("rows", [None, [0, 4, 5]])
@pytest.mark.parametrize("prior", [priors.Normal(0.8), priors.Hierarchical()], ids=str)
def test_all_that_is_said_of_the_curvature_is_of_one_matrix(prior, rows) -> None:
    model = model_of(prior)
    theta, v = normal(3, model.dim, seed=1), normal(3, model.dim, seed=2)
    at = model.at(theta, None if rows is None else torch.tensor(rows))
    grad, factor = at.grad_and_factor()
    torch.testing.assert_close(grad, at.grad)
    assert at.grad is at.grad  # computed once
    assert at.residual is not None
    torch.testing.assert_close((factor.mT @ at.residual.unsqueeze(-1)).squeeze(-1), grad)
    again, product = at.grad_and_product()
    torch.testing.assert_close(again, grad)
    expected = (factor.mT @ factor @ v.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(product(v), expected)
    found = at.grad_and_hessian()
    assert found is not None
    torch.testing.assert_close(found[0], grad)
    # The derivative of grad - A^T A v at v = 0 is the Hessian.
    slope = at.slope(torch.zeros_like(v))
    assert slope is not None
    torch.testing.assert_close(slope, found[1])


@pytest.mark.parametrize("source", [None, 1.4])
@pytest.mark.parametrize(
    "prior", [priors.Normal(0.8), priors.Laplace(), priors.Hierarchical()], ids=str
)
def test_whitened_curvature_has_the_members_of_curvature(prior, source) -> None:
    model = model_of(prior)
    scaled = None if source is None else bf.transport.Source.scaled(model, source)
    context = WhitenedPosterior(model, scaled)
    x, v = 0.5 * normal(3, model.dim, seed=1), normal(3, model.dim, seed=2)
    at = context.at(x)
    assert context.at(x.clone()) is at
    assert context.at(x + 1e-9) is not at
    grad, factor = at.grad_and_factor()
    torch.testing.assert_close(grad, at.grad)
    torch.testing.assert_close(grad, at.value_and_grad[1])
    value = lambda z: context.at(z).value_and_grad[0].sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(value)(x), grad)
    expected = (factor.mT @ factor @ v.unsqueeze(-1)).squeeze(-1)
    expected = (
        expected
        if context.precision_shift is None
        else expected + context.precision_shift_times(v)
    )
    torch.testing.assert_close(at.grad_and_product()[1](v), expected)
    residual = at.residual
    assert residual is not None
    pulled = (factor.mT @ residual[0].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(
        pulled if residual[1] is None else pulled + residual[1], grad
    )
    second = at.grad_and_hessian()
    assert second is not None
    torch.testing.assert_close(
        second[1],
        torch.stack([torch.func.jacrev(context.grad)(x)[i, :, i] for i in range(3)]),
    )


def test_weights_of_another_size_are_refused_when_the_curvature_is_asked_for() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="theta must end in an axis of length"):
        model.at(normal(2, model.dim + 1))
    with pytest.raises(ValueError, match="rows must be int64"):
        model.at(normal(2, model.dim), torch.tensor([0.5]))
    law = td.Laplace(0.0, 1.0)
    blind = model_of(likelihood=LaplaceNoise(law))
    at = blind.at(normal(2, blind.dim))
    with pytest.raises(ValueError, match="LaplaceNoise has no fisher_factor"):
        at.grad_and_factor()
    with pytest.raises(ValueError, match="LaplaceNoise has no fisher_factor"):
        at.grad_and_product()
    assert at.residual is None
    assert at.slope(normal(2, blind.dim)) is None
    torch.testing.assert_close(at.grad, blind.log_likelihood_grad(normal(2, blind.dim)))


# ---------------------------------------- priors as a type


class Wide(Prior):
    """Fixed distributions."""

    def distributions(self, spec: WeightSpec) -> dict[str, td.Distribution]:
        return dict.fromkeys(spec.names, td.Normal(0.0, 2.0))


class Shaped:
    """The same of an object that only has the method."""

    def distributions(self, spec: WeightSpec) -> dict[str, td.Distribution]:
        return dict.fromkeys(spec.names, td.Normal(0.0, 2.0))


@dataclass(frozen=True)
class Halved(priors.Hierarchical):
    """A class derived from one with closed forms, which says something else."""

    def conditional(
        self, spec: WeightSpec, parameters: dict[str, Tensor]
    ) -> dict[str, td.Distribution]:
        given = super().conditional(spec, parameters)
        return {name: td.Normal(each.loc, 0.5 * each.scale) for name, each in given.items()}


class Nothing(Prior):
    pass


class OnlyParameters(Prior):
    def parameters(self, spec: WeightSpec) -> dict[str, td.Distribution]:
        return {"scale": td.HalfNormal(1.0)}

    def distributions(self, spec: WeightSpec) -> dict[str, td.Distribution]:
        return dict.fromkeys(spec.names, td.Normal(0.0, 1.0))


def test_a_prior_is_a_type_or_an_object_with_its_methods() -> None:
    expected, theta = model_of(priors.Normal(2.0)), normal(3, model_of().dim)
    for given in (
        Wide(),
        Shaped(),
        td.Normal(0.0, 2.0),
        priors.Independent(td.Normal(0.0, 2.0)),
    ):
        model = model_of(given)
        assert isinstance(model.prior, Prior)
        assert not model.prior.has_parameters
        torch.testing.assert_close(model.log_prior(theta), expected.log_prior(theta))
        assert model.symmetries() == expected.symmetries()
        # what it says counts, not who says it
        assert model.fingerprint() == expected.fingerprint()
    shaped = Shaped()
    adapted = model_of(shaped).prior
    assert adapted.given is shaped
    assert adapted.name == "Shaped"
    assert Prior.of(adapted) is adapted
    with pytest.raises(ValueError, match="OneOf has no fixed distributions"):
        Prior.of(OneOf()).distributions(expected.spec)


class OneOf:
    def parameters(self, spec: WeightSpec) -> dict[str, td.Distribution]:
        return {"scale": td.HalfNormal(1.0)}

    def conditional(
        self, spec: WeightSpec, parameters: dict[str, Tensor]
    ) -> dict[str, td.Distribution]:
        scale = parameters["scale"]
        shaped = {
            n: scale.reshape(*scale.shape[:-1], *(1,) * len(s))
            for n, s in spec.shapes.items()
        }
        return {name: td.Normal(0.0, each) for name, each in shaped.items()}


def test_a_class_derived_from_a_closed_form_goes_by_its_own_word() -> None:
    model, base = model_of(Halved()), model_of(priors.Hierarchical())
    theta = normal(3, model.dim, seed=1)
    weights, scales = theta[:, : model.spec.network.dim], theta[:, model.spec.network.dim :]
    twice = torch.cat([2 * weights, scales], 1)
    change = model.spec.network.dim * torch.tensor(2.0, dtype=F64).log()
    torch.testing.assert_close(model.log_prior(theta), base.log_prior(twice) + change)
    value, grad = model.flat_prior.log_prob_and_grad(theta)
    leaf = theta.clone().requires_grad_()
    torch.testing.assert_close(
        grad, torch.autograd.grad(model.log_prior(leaf).sum(), leaf)[0]
    )
    torch.testing.assert_close(value, model.log_prior(theta))


def test_priors_that_say_too_little_are_refused() -> None:
    with pytest.raises(ValueError, match="Nothing has no fixed distributions"):
        model_of(Nothing())
    with pytest.raises(
        ValueError, match="OnlyParameters: a prior with parameters has both"
    ):
        model_of(OnlyParameters())
    with pytest.raises(TypeError, match="prior must be a Prior"):
        model_of(object())  # type: ignore[arg-type]


def test_the_models_symmetries_are_those_that_its_prior_keeps() -> None:
    uneven = priors.PerTensor(
        {"0.bias": td.Normal(torch.arange(3.0), 1.0)}, td.Normal(0.0, 1.0)
    )
    for prior in (
        priors.Normal(1.0),
        priors.Normal(1.0, 0.3),
        priors.Horseshoe(),
        priors.OutputScales(),
        uneven,
        OneOf(),
    ):
        model = model_of(prior)
        group = model.symmetries()
        assert group == model.prior.symmetries(model.spec) == model.known_symmetries()
        assert group.permutation <= model.spec.symmetries().permutation
        assert group.sign <= model.spec.symmetries().sign
        theta = normal(5, model.dim, seed=1)
        moved = model.spec.random_symmetry(theta, 0, group)
        torch.testing.assert_close(model.log_joint(moved), model.log_joint(theta))
    assert model_of(uneven).symmetries() == Symmetries()
    net = built(
        lambda: nn.Sequential(
            nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)
        ).eval()
    )
    x = normal(N, 2)
    unknown = bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(), x, x[:, 0])
    assert not any(unknown.symmetries())
    with pytest.raises(ValueError, match=r"not known.*BatchNorm1d"):
        unknown.known_symmetries()


def test_public_priors_keep_their_address_wherever_their_files_are() -> None:
    for name in priors.__all__:
        assert getattr(priors, name).__module__ == "bnnflow.model.priors"
