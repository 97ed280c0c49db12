"""The factored Jacobian is the matrix: its products, its Gram matrix, and what is solved with
them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.model.arrowhead import Arrowhead
from bnnflow.model.factored import (
    BorderedFactor,
    ClosedFactor,
    FactoredJacobian,
    MatrixFactor,
)
from bnnflow.transport import GaussNewton, Source
from bnnflow.transport.proximal_step import Linearised, cholesky_or_nan
from bnnflow.transport.whitened import WhitenedPosterior
from tests.problems import F64, built, chain, normal

LIKELIHOODS = {
    "gaussian": (likelihoods.Gaussian(0.3), 1),
    "gaussians": (likelihoods.Gaussian(0.3), 3),
    "heteroscedastic": (likelihoods.HeteroscedasticGaussian(), 2),
    "categorical": (likelihoods.Categorical(), 3),
}


def model_of(
    likelihood: str = "gaussian",
    hidden: tuple[int, ...] = (6,),
    prior: bf.priors.Prior | None = None,
    *,
    bias: bool = True,
    activation: type[nn.Module] = nn.Tanh,
    temperature: float = 1.0,
) -> bf.BayesianModel:
    which, out = LIKELIHOODS[likelihood]
    net = built(lambda: chain(2, *hidden, out, activation=activation, bias=bias))
    targets = out // 2 if likelihood == "heteroscedastic" else out
    y = (
        torch.tensor([0, 2, 1, 0])
        if likelihood == "categorical"
        else normal(4, targets, seed=1)
    )
    prior = priors.Normal(1.3) if prior is None else prior
    return bf.BayesianModel(net, prior, which, normal(4, 2), y, temperature=temperature)


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 1, 3])])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [(6,), (5, 4)])
@pytest.mark.parametrize("likelihood", list(LIKELIHOODS))
def test_products_are_those_of_the_matrix(
    likelihood: str, hidden: tuple[int, ...], bias: bool, rows: Tensor | None
):
    model = model_of(likelihood, hidden, bias=bias)
    theta, v = normal(3, model.dim, seed=2), normal(3, model.dim, seed=3)
    grad, matrix = model.at(theta, rows).grad_and_factor()
    found = model.at(theta, rows).factored()
    assert found is not None
    assert found[1].rows == matrix.shape[1] < model.dim
    torch.testing.assert_close(found[0], grad, rtol=1e-10, atol=1e-10)
    scales = {name: 0.5 + 0.3 * i for i, name in enumerate(model.spec.names)}
    along = torch.empty(model.dim, dtype=F64)
    for name, where in model.spec.slices.items():
        along[where] = scales[name]
    for factor, a in ((found[1], matrix), (found[1].scaled(scales), matrix * along)):
        dense, u = MatrixFactor(a), normal(3, a.shape[1], seed=4)
        torch.testing.assert_close(factor.gram(), dense.gram(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(factor.times(v), dense.times(v), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            factor.transposed(u), dense.transposed(u), rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(dense.transposed(u), torch.einsum("brd,br->bd", a, u))
        # nothing is then written into memory that is there
        tracked = factor.parts[0].leaving.requires_grad_(True)
        torch.testing.assert_close(factor.gram(), dense.gram(), rtol=1e-10, atol=1e-10)
        tracked.requires_grad_(False)


@pytest.mark.crossed
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(
    "prior", [priors.Normal(1.3), priors.FanIn(1.2, 0.7), priors.Normal(0.8, 0.3)]
)
@pytest.mark.parametrize("scale", [None, 1.4])
def test_linearisation_is_that_of_the_matrix(
    prior: bf.priors.Prior, temperature: float, scale: float | None, monkeypatch
):
    model = model_of(prior=prior, temperature=temperature)
    context = WhitenedPosterior(
        model, None if scale is None else Source.scaled(model, scale)
    )
    x, v, s2 = (
        normal(5, model.dim),
        normal(5, model.dim, seed=1),
        torch.linspace(0, 2, 5, dtype=F64).unsqueeze(-1),
    )
    assert isinstance(context.at(x).factored[1], FactoredJacobian)
    factored = Linearised(context, x, s2)
    score = GaussNewton(2)(context, x, s2)
    slope = _slope(context, x, s2, v)
    context = WhitenedPosterior(model, context.source)
    monkeypatch.setattr(context, "scales", None)
    assert isinstance(context.at(x).factored[1], MatrixFactor)
    dense = Linearised(context, x, s2)
    for one, other in (
        (factored.grad, dense.grad),
        (factored.times(v), dense.times(v)),
        (factored.solve(v), dense.solve(v)),
        *zip(score, GaussNewton(2)(context, x, s2), strict=True),
        *zip(slope, _slope(context, x, s2, v), strict=True),
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    # (I + s^2 H) undoes the solution
    solved = dense.solve(v)
    torch.testing.assert_close(solved + s2 * dense.times(solved), v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("source", [None, 1.4])
@pytest.mark.parametrize("prior", [priors.Normal(1.3), priors.Laplace(1.0)])
def test_blocks_of_draws_change_nothing(
    prior: bf.priors.Prior, source: float | None, monkeypatch
):
    model = model_of(hidden=(5, 4), prior=prior)
    context = WhitenedPosterior(
        model, None if source is None else Source.scaled(model, source)
    )
    x, s2 = normal(5, model.dim), torch.linspace(0, 2, 5, dtype=F64).unsqueeze(-1)
    whole = Linearised(context, x, s2)
    # two draws of four rows
    monkeypatch.setattr("bnnflow.transport.proximal_step.BLOCK", 2 * 4**2)
    parts = Linearised(context, x, s2)
    torch.testing.assert_close(parts.root, whole.root)
    torch.testing.assert_close(parts.solve(x), whole.solve(x))


def _slope(
    context: WhitenedPosterior, x: Tensor, s2: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a derivative of the score forwards and one backwards."""

    def score(x: Tensor) -> Tensor:
        return GaussNewton(2)(context, x, s2).w

    return torch.func.jvp(score, (x,), (v,))[1], torch.func.vjp(score, x)[1](v)[0]


def test_a_matrix_is_taken_where_factors_do_not_pay_or_do_not_fit():
    x, y = normal(4, 2), normal(4, 1, seed=1)

    def factor(model: bf.BayesianModel, source: Source | None = None) -> type:
        return type(WhitenedPosterior(model, source).at(normal(2, model.dim)).factored[1])

    assert factor(model_of()) is FactoredJacobian
    # more rows than weights
    assert factor(model_of(hidden=(1,), likelihood="gaussians", bias=False)) is ClosedFactor
    assert factor(model_of(prior=priors.Laplace(1.0))) is MatrixFactor
    learned = bf.BayesianModel(
        built(lambda: chain(2, 6, 1)), priors.Normal(), likelihoods.Gaussian(), x, y
    )
    assert factor(learned) is BorderedFactor
    assert (
        factor(
            bf.BayesianModel(
                learned.net, priors.Hierarchical(), likelihoods.Gaussian(), x, y
            )
        )
        is MatrixFactor
    )
    module = bf.BayesianModel(
        built(lambda: nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1))),
        priors.Normal(),
        likelihoods.Gaussian(0.3),
        x,
        y,
    )
    assert factor(module) is MatrixFactor
    model = model_of()
    assert factor(model.linearised(model.sample_prior(1, 0)[0])) is MatrixFactor
    assert factor(model, Source.gaussian(model, model.sample_prior(200, 0))) is MatrixFactor


@pytest.mark.crossed
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(
    "prior",
    [
        priors.Normal(1.3),
        priors.Laplace(),
        priors.Hierarchical(),
        priors.Horseshoe(),
        priors.OutputScales(),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "likelihood", ["Gaussian", "StudentT", "HeteroscedasticGaussian", "Categorical"]
)
def test_closed_factors_are_the_matrix(likelihood: str, prior, temperature: float) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=g, dtype=torch.float64)
    out = {"HeteroscedasticGaussian": 2, "Categorical": 3}.get(likelihood, 1)
    y = torch.arange(60) % 3 if likelihood == "Categorical" else x.sum(1).sin()
    net = nn.Sequential(
        nn.utils.skip_init(nn.Linear, 2, 3, dtype=torch.float64), nn.Tanh(),
        nn.utils.skip_init(nn.Linear, 3, 2, bias=False, dtype=torch.float64), nn.SiLU(),
        nn.utils.skip_init(nn.Linear, 2, out, dtype=torch.float64),
    )  # fmt: skip
    model = bf.BayesianModel(
        net, prior, getattr(bf.likelihoods, likelihood)(), x, y, temperature=temperature
    )
    z = torch.randn(4, model.dim, generator=g, dtype=torch.float64)
    v = torch.randn(4, model.dim, generator=g, dtype=torch.float64)
    for source in (
        None,
        Source.scaled(model, 1.5),
        Source.gaussian(model, model.sample_prior(200, 1)),
    ):
        for rows in (None, torch.arange(0, 59)):
            context = WhitenedPosterior(model, source, rows)
            (grad, factor), (exact_grad, matrix) = (
                context.at(z).factored,
                context.at(z).grad_and_factor(),
            )
            exact = MatrixFactor(matrix)
            assert isinstance(factor, ClosedFactor)
            assert factor.rows == exact.rows
            u = torch.randn(4, factor.rows, generator=g, dtype=torch.float64)
            torch.testing.assert_close(grad, exact_grad, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(
                factor.times(v), exact.times(v), rtol=1e-9, atol=1e-9
            )
            torch.testing.assert_close(
                factor.transposed(u), exact.transposed(u), rtol=1e-9, atol=1e-9
            )
            for some in (slice(0, 4), slice(1, 3)):
                torch.testing.assert_close(
                    factor.normal(some), exact.normal(some), rtol=1e-9, atol=1e-9
                )


@pytest.mark.parametrize("scale", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(
    "likelihood", [likelihoods.Gaussian(), likelihoods.StudentT()], ids=str
)
def test_parameters_of_the_likelihood_border_the_factors(
    likelihood, temperature: float, scale: float | None
):
    x, y = normal(4, 2), normal(4, 1, seed=1)
    net = built(lambda: chain(2, 6, 1))
    model = bf.BayesianModel(
        net, priors.Normal(1.3), likelihood, x, y, temperature=temperature
    )
    context = WhitenedPosterior(
        model,
        None if scale is None else Source.scaled(model, scale),
        torch.tensor([0, 2, 3]),
    )
    z, v = normal(3, model.dim), normal(3, model.dim, seed=1)
    (grad, factor), (exact_grad, matrix) = (
        context.at(z).factored,
        context.at(z).grad_and_factor(),
    )
    assert isinstance(factor, BorderedFactor)
    exact, u = MatrixFactor(matrix), normal(3, factor.rows, seed=2)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(factor.matrix, matrix, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(factor.gram(), exact.gram(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(factor.times(v), exact.times(v), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        factor.transposed(u), exact.transposed(u), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        factor[1:2].gram(), exact[1:2].gram(), rtol=1e-10, atol=1e-10
    )
    s2 = torch.full((3, 1), 0.4, dtype=F64)
    change = Linearised(context, z, s2).change(None)
    system = torch.eye(model.dim, dtype=F64) + 0.4 * matrix.mT @ matrix
    if scale is not None:
        system = system + 0.4 * (scale**2 - 1) * torch.eye(model.dim, dtype=F64)
    torch.testing.assert_close(
        change, torch.linalg.solve(system, grad), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    "prior", [priors.Normal(), priors.Hierarchical(), priors.Horseshoe()], ids=str
)
@pytest.mark.parametrize(
    "likelihood", ["Gaussian", "HeteroscedasticGaussian", "Categorical"]
)
def test_single_precision_draws_and_gradients_are_those_of_double(
    likelihood: str, prior
) -> None:
    x = normal(60, 2)
    out = {"HeteroscedasticGaussian": 2, "Categorical": 3}.get(likelihood, 1)
    y = torch.arange(60) % 3 if likelihood == "Categorical" else x.sum(1).sin()
    double = bf.BayesianModel(
        built(lambda: chain(2, 4, out)), prior, getattr(likelihoods, likelihood)(), x, y
    )
    z, s2 = 0.5 * normal(4, double.dim), torch.full((4, 1), 0.1, dtype=F64)
    exact = WhitenedPosterior(double)
    single = WhitenedPosterior(double.to(dtype=torch.float32))
    assert isinstance(single.at(z.float()).factored[1], ClosedFactor)
    for one, other in (
        (single.grad(z.float()), exact.grad(z)),
        *zip(single.value_and_grad(z.float()), exact.value_and_grad(z), strict=True),
        *zip(
            GaussNewton(2)(single, z.float(), s2.float()),
            GaussNewton(2)(exact, z, s2),
            strict=True,
        ),
    ):
        torch.testing.assert_close(
            one.double(), other, rtol=2e-4, atol=2e-4 * float(other.abs().max())
        )


@pytest.mark.parametrize("prior", [priors.Normal(), priors.Horseshoe()], ids=str)
def test_what_is_kept_of_a_point_is_of_that_point_alone(prior) -> None:
    model = model_of(hidden=(5,), prior=prior)
    asked, x = WhitenedPosterior(model), normal(3, model.dim)
    for change in (0.0, 0.5, -0.5):  # in place, and back to where it was
        x.add_(change)
        fresh = WhitenedPosterior(model)
        for name in (
            "grad",
            "value_and_grad",
            "residual",
            "grad_and_factor",
            "grad_and_hessian",
            "value_and_grad",
        ):
            found, expected = getattr(asked.at(x), name), getattr(fresh.at(x), name)
            if callable(found):
                found, expected = found(), expected()
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    leaf = x.clone().requires_grad_()  # equal, but followed
    (slope,) = torch.autograd.grad(asked.grad(leaf).sum(), leaf)
    hessian = asked.at(x).grad_and_hessian()
    assert hessian is not None
    torch.testing.assert_close(slope, hessian[1].sum(1), rtol=1e-9, atol=1e-9)
    assert asked.grad(x[:2]).shape == (2, model.dim)


@pytest.mark.parametrize("likelihood", ["heteroscedastic", "poisson"])
def test_systems_that_rounding_makes_indefinite_are_solved(likelihood: str) -> None:
    x = normal(60, 2)
    which = (
        likelihoods.Poisson()
        if likelihood == "poisson"
        else likelihoods.HeteroscedasticGaussian()
    )
    y = x.sum(1).exp().round() if likelihood == "poisson" else x.sum(1).sin()
    net = built(lambda: chain(2, 4, 1 if likelihood == "poisson" else 2))
    exact = WhitenedPosterior(bf.BayesianModel(net, priors.Normal(), which, x, y))
    z, s2 = 2 * normal(40, exact.dim), torch.full((40, 1), 0.3, dtype=F64)
    factor = exact.at(z).factored[1]
    assert isinstance(factor, ClosedFactor)
    systems = torch.eye(exact.dim, dtype=F64) + 0.3 * factor.normal(slice(None))
    assert (torch.linalg.cholesky_ex(systems.float()).info > 0).any()
    w = GaussNewton(1)(
        WhitenedPosterior(exact.model.to(dtype=torch.float32)), z.float(), s2.float()
    ).w.double()
    expected = GaussNewton(1)(exact, z, s2).w
    assert w.isfinite().all()
    apart, easy = (
        (w - expected).norm(dim=1) / expected.norm(dim=1),
        torch.linalg.cond(systems) < 1e4,
    )
    assert (apart < 1.5).all()  # no nonsense where it is hard,
    assert easy.any()
    assert (apart[easy] < 1e-3).all()  # and right where it is not


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_what_has_no_factor_spoils_no_other(dtype: torch.dtype) -> None:
    half = normal(6, 5, 9).to(dtype)
    systems = torch.eye(5, dtype=dtype) + half @ half.mT
    expected = torch.linalg.cholesky(systems)
    torch.testing.assert_close(cholesky_or_nan(systems), expected, rtol=0, atol=0)
    systems[1, 4, 4] = torch.nan
    systems[3] = torch.full((5, 5), 1e9) - 20 * torch.eye(5) * torch.finfo(dtype).eps * 1e9
    factors = cholesky_or_nan(systems)
    assert factors[1].isnan().all()
    torch.testing.assert_close(
        factors[3] @ factors[3].mT, systems[3], rtol=1e3 * torch.finfo(dtype).eps, atol=0
    )
    others = [0, 2, 4, 5]
    torch.testing.assert_close(factors[others], expected[others], rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("source", [None, "wide", "gaussian"])
@pytest.mark.parametrize("local", ["unit", "weight"])
def test_weights_and_scales_of_their_own_are_solved_together(
    local, source: str | None, temperature: float
) -> None:
    x = normal(60, 2)
    net = built(lambda: chain(2, 3, 1))
    model = bf.BayesianModel(
        net,
        priors.Horseshoe(local=local),
        likelihoods.Gaussian(),
        x,
        x.sum(1).sin(),
        temperature=temperature,
    )
    sources = {
        "wide": Source.scaled(model, 1.4),
        "gaussian": Source.gaussian(model, model.sample_prior(200, 1)),
    }
    context = WhitenedPosterior(model, None if source is None else sources[source])
    z, v, s2 = (
        normal(4, model.dim),
        normal(4, model.dim, seed=1),
        torch.tensor([[0.0], [0.1], [0.5], [1.0]], dtype=F64),
    )
    z[0] = 0.0  # weights of zero feel nothing of their scales
    matrix, eye = context.at(z).grad_and_factor()[1], torch.eye(model.dim, dtype=F64)
    excess = (
        torch.zeros((), dtype=F64)
        if context.precision_shift is None
        else context.precision_shift
    )
    systems = eye + s2.unsqueeze(-1) * (
        matrix.mT @ matrix + (excess if excess.dim() else excess * eye)
    )
    linear = Linearised(context, z, s2)
    # the last layer has one output
    pairs = {"unit": 3, "weight": 9}[local] if source != "gaussian" else 0
    assert linear.root.shape[-1] == model.dim - pairs
    torch.testing.assert_close(
        linear.solve(v), torch.linalg.solve(systems, v), rtol=1e-9, atol=1e-9
    )
    targets = normal(4, model.dim, 5, seed=2)
    torch.testing.assert_close(
        linear.solve_each(targets),
        torch.linalg.solve(systems, targets),
        rtol=1e-9,
        atol=1e-9,
    )


def test_pairs_of_which_nothing_is_felt_are_left_alone() -> None:
    own = torch.tensor([[0, 2], [1, 0]])  # weights, and a parameter of each
    arrow = Arrowhead(normal(3, 6), torch.zeros(3, 3, 2, dtype=F64), own)
    assert arrow.columns is not None
    arrow.columns[:, own[0], own[1]] = normal(3, 2, seed=1)
    arrow.diagonal[1, 0], arrow.columns[1, 0, 1] = 0.0, 0.0
    small, pairs = arrow.compact()
    assert pairs is not None
    v = normal(3, 6, seed=2)
    torch.testing.assert_close(pairs.solved(v, lambda kept: kept), v)
    felt = []
    pairs.solved(v, lambda kept: felt.append(small.times(kept)) or kept)
    torch.testing.assert_close(felt[0][:, :3], arrow.times(v)[:, :3])
