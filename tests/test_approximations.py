"""Laws of the approximations: closed forms on conjugate regression, densities that integrate, and
known bounds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import arviz
import pytest
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods, posteriors, priors
from bnnflow.inference.approximate import laplace
from bnnflow.inference.approximate.dropout import dropout_factors
from bnnflow.inference.approximate.swag import gaussian_of_snapshots
from tests.problems import one_in

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module], dtype: torch.dtype = F64) -> nn.Module:
    """Build a network from a seed, without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().to(dtype)


class Conjugate(NamedTuple):
    """Bayesian linear regression with fixed noise, and its posterior."""

    model: bf.BayesianModel
    mean: Tensor
    covariance: Tensor
    log_evidence: float


def conjugate(
    n: int = 25,
    dtype: torch.dtype = F64,
    temperature: float = 1.0,
    correlation: float = 0.0,
) -> Conjugate:
    """Return the problem at a temperature; the evidence is that at temperature 1."""
    g, noise, scale = generator(1), 0.5, 1.5
    x = torch.randn(n, 3, generator=g, dtype=F64)
    x = torch.stack([x[:, 0], correlation * x[:, 0] + x[:, 1], x[:, 2]], 1)
    y = (
        x @ torch.tensor([1.0, -0.5, 0.02], dtype=F64)
        + 0.3
        + noise * torch.randn(n, generator=g, dtype=F64)
    )
    net = built(lambda: nn.Linear(3, 1), dtype)
    model = bf.BayesianModel(
        net,
        priors.Normal(scale),
        likelihoods.Gaussian(noise),
        x,
        y,
        temperature=temperature,
    )
    design = torch.cat([x, torch.ones(n, 1, dtype=F64)], 1)
    covariance = torch.linalg.inv(
        design.T @ design / noise**2 + torch.eye(4, dtype=F64) / scale**2
    )
    marginal = noise**2 * torch.eye(n, dtype=F64) + scale**2 * design @ design.T
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(n, dtype=F64), marginal
    ).log_prob(y)
    return Conjugate(
        model,
        covariance @ design.T @ y / noise**2,
        temperature * covariance,
        float(evidence),
    )


def sine(
    likelihood=None, prior=None, temperature: float = 1.0, hidden: int = 4
) -> bf.BayesianModel:
    """Return a small network with nine rows of data."""
    x = torch.linspace(-1.5, 1.5, 9, dtype=F64).unsqueeze(-1)
    y = (2 * x).sin() + 0.2 * torch.randn(9, 1, generator=generator(2), dtype=F64)
    net = built(
        lambda: nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1))
    )
    prior, likelihood = prior or priors.Normal(), likelihood or likelihoods.Gaussian(0.3)
    return bf.BayesianModel(net, prior, likelihood, x, y, temperature=temperature)


def banana() -> bf.BayesianModel:
    """Return a posterior over two weights that only their product is known of."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight[:1] + x * self.weight[1:].square()

    x = torch.tensor([[1.0], [1.1]], dtype=F64)
    return bf.BayesianModel(
        built(Product), priors.Normal(1.5), likelihoods.Gaussian(0.3), x, 0.5 * x
    )


def covariance(gaussian: bf.Gaussian) -> Tensor:
    return gaussian.scale_tril @ gaussian.scale_tril.T


def check_sampled(draws: Tensor, mean: Tensor, covariance: Tensor, k: float = 4.5) -> None:
    """Compare independent draws ``(n, dim)`` with two moments, each within ``k`` of its Monte-Carlo
    errors.
    """
    offset = draws.double() - mean
    products = (offset.unsqueeze(-1) * offset.unsqueeze(-2)).flatten(1)
    for values, truth in (
        (offset, torch.zeros_like(mean)),
        (products, covariance.flatten()),
    ):
        errors = (values.mean(0) - truth).abs() / (
            values.std(0) / math.sqrt(len(values)) + 1e-12
        )
        assert errors.max() < k


# ---------------------------------------- densities


def kronecker(dtype: torch.dtype = F64) -> posteriors.KroneckerGaussian:
    left = [
        torch.linalg.qr(torch.randn(a, a, generator=generator(a), dtype=dtype))[0]
        for a in (2, 1)
    ]
    right = [
        torch.linalg.qr(torch.randn(b, b, generator=generator(b + 5), dtype=dtype))[0]
        for b in (2, 1)
    ]
    precision = [
        torch.tensor([[1.0, 4.0], [0.5, 2.0]], dtype=dtype),
        torch.tensor([[3.0]], dtype=dtype),
    ]
    return posteriors.KroneckerGaussian(
        torch.arange(5, dtype=dtype), tuple(left), tuple(right), tuple(precision)
    )


def low_rank(seed: int = 0) -> posteriors.LowRankGaussian:
    g = generator(seed)
    loc, factor = (
        torch.randn(5, generator=g, dtype=F64),
        torch.randn(5, 2, generator=g, dtype=F64),
    )
    return posteriors.LowRankGaussian(
        loc, factor, 0.2 + torch.rand(5, generator=g, dtype=F64)
    )


def coupling() -> posteriors.CouplingFlow:
    permutations = (torch.tensor([2, 0, 1, 4, 3]), torch.tensor([1, 4, 2, 0, 3]))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        flow = posteriors.coupling_flow(permutations, 5, 7).to(F64)
        for parameter in flow.parameters():
            nn.init.normal_(parameter, 0.0, 0.3)
    return posteriors.CouplingFlow(
        permutations, tuple(p.detach() for p in flow.parameters())
    )


def restricted() -> posteriors.Conditional:
    return posteriors.Conditional(
        torch.arange(7, dtype=F64), torch.tensor([0, 2, 3, 5, 6]), kronecker()
    )


DENSITIES = {
    "low rank": low_rank,
    "kronecker": kronecker,
    "mixture": lambda: posteriors.Mixture((low_rank(0), low_rank(1), low_rank(2))),
    "flow": coupling,
    "restricted": restricted,
}


def dense(q) -> torch.distributions.MultivariateNormal:
    """Return a Gaussian with the dense covariance that ``q`` says it has."""
    if isinstance(q, posteriors.LowRankGaussian):
        return torch.distributions.MultivariateNormal(
            q.loc, q.factor @ q.factor.T + q.diagonal.diag()
        )
    blocks = [
        torch.kron(left, right) @ p.flatten().diag() @ torch.kron(left, right).T
        for left, right, p in zip(q.left, q.right, q.precision, strict=True)
    ]
    return torch.distributions.MultivariateNormal(
        q.loc, precision_matrix=torch.block_diag(*blocks)
    )


@pytest.mark.parametrize("make", [low_rank, kronecker])
def test_structured_gaussians_are_torchs(make) -> None:
    q = make()
    oracle, theta = dense(q), torch.randn(3, 4, 5, generator=generator(), dtype=F64)
    torch.testing.assert_close(q.log_prob(theta), oracle.log_prob(theta))
    check_sampled(q.sample(20_000, 0), oracle.mean, oracle.covariance_matrix)


@pytest.mark.parametrize("make", DENSITIES.values(), ids=DENSITIES.keys())
def test_densities_are_those_of_their_draws(make) -> None:
    """E_q[r / q] = 1 for any density r: taken over a narrow one, the ratio has small variance."""
    q = make()
    assert torch.equal(q.sample(5, 3), q.sample(5, 3))
    draws = q.sample(20_000, 0)
    free = draws[:, q.where] if isinstance(q, posteriors.Conditional) else draws
    near = bf.Gaussian(free.median(0).values, 0.7 * free.std(0))
    ratio = (near.log_prob(free) - q.log_prob(draws)).exp()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / math.sqrt(len(ratio))
    assert q.log_prob(draws[:6].reshape(2, 3, -1)).shape == (2, 3)
    assert q.log_prob(draws[:2].float()).dtype == F64


def test_restricted_densities_end_at_their_slice() -> None:
    theta = restricted().sample(2, 0)
    theta[1, 1] += 1e-9
    assert restricted().log_prob(theta).isfinite().tolist() == [True, False]


@pytest.mark.parametrize("make", DENSITIES.values(), ids=DENSITIES.keys())
def test_posteriors_are_saved_with_their_draws(make, tmp_path) -> None:
    q = make()
    theta = q.sample(6, 0)
    draws = bf.Draws(theta.unsqueeze(0), torch.zeros(1, 6, dtype=F64), posterior=q)
    loaded = bf.load(draws.save(tmp_path / "draws.npz"))
    assert type(loaded.posterior) is type(q)
    assert torch.equal(loaded.posterior.log_prob(theta), q.log_prob(theta))
    assert torch.equal(loaded.posterior.sample(4, 1), q.sample(4, 1))


def test_a_gaussian_from_its_precision() -> None:
    root = torch.randn(6, 6, generator=generator(), dtype=F64)
    precision = root @ root.T + torch.eye(6, dtype=F64)
    found = bf.Gaussian.of_precision(torch.zeros(6, dtype=F64), precision)
    torch.testing.assert_close(covariance(found) @ precision, torch.eye(6, dtype=F64))
    assert torch.equal(found.scale_tril, found.scale_tril.tril())
    with pytest.raises(torch.linalg.LinAlgError):
        bf.Gaussian.of_precision(torch.zeros(6), -precision)


# ---------------------------------------- variational inference


@pytest.mark.parametrize(("temperature", "correlation"), [(1.0, 10.0), (0.3, 0.0)])
def test_full_rank_vi_is_exact_where_the_posterior_is_gaussian(
    temperature: float, correlation: float
) -> None:
    problem = conjugate(temperature=temperature, correlation=correlation)
    draws = bf.sample(problem.model, bf.VI(rank="full", steps=1000), draws=10, seed=0)
    torch.testing.assert_close(draws.posterior.loc, problem.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        covariance(draws.posterior), problem.covariance, rtol=1e-5, atol=1e-7
    )
    if temperature == 1:
        assert draws.info["elbo"] == pytest.approx(problem.log_evidence, abs=1e-6)


@pytest.mark.parametrize("n", one_in(2, [25, 2500]))
def test_the_divergence_from_the_prior_is_counted_once_whatever_the_number_of_rows(
    n: int,
) -> None:
    """A known defect elsewhere is a KL term divided by a batch size: variances are then wrong by
    that factor.
    """
    problem = conjugate(n)
    draws = bf.sample(problem.model, bf.VI(steps=1500), draws=1000, seed=0)
    precision = torch.linalg.inv(problem.covariance)
    sd = precision.diagonal().rsqrt()
    torch.testing.assert_close(
        draws.posterior.loc / sd, problem.mean / sd, rtol=0, atol=0.1
    )
    torch.testing.assert_close(
        draws.posterior.scale_tril / sd, torch.ones(4, dtype=F64), rtol=0, atol=0.06
    )
    divergence = 0.5 * float(
        precision.diagonal().log().sum() - torch.linalg.slogdet(precision)[1]
    )
    error = 5 * draws.info["elbo_error"] + 1e-3
    assert draws.info["elbo"] == pytest.approx(problem.log_evidence - divergence, abs=error)


@pytest.mark.validate
def test_low_rank_vi_lies_between_mean_field_and_full_rank() -> None:
    problem = conjugate(correlation=2.0)
    elbo = [
        bf.sample(
            problem.model, bf.VI(rank=rank, steps=600, learning_rate=0.05), seed=0
        ).info["elbo"]
        for rank in (0, 1, 2, "full")
    ]
    assert elbo == sorted(elbo)
    assert elbo[1] > elbo[0] + 0.1
    assert elbo[-1] == pytest.approx(problem.log_evidence, abs=1e-6)


def test_learned_scales_and_temperatures_reach_the_guide() -> None:
    """With inputs of zero and pinned weights only log scale is learned, whose marginal a grid
    knows.
    """
    y = 0.7 * sine().y
    net = built(lambda: nn.Linear(1, 1))
    model = bf.BayesianModel(
        net,
        priors.Normal(0.05),
        likelihoods.Gaussian(),
        torch.zeros(9, 1, dtype=F64),
        y,
        temperature=0.2,
    )
    found = bf.sample(model, bf.VI(steps=800), draws=10, seed=0).posterior
    theta = found.loc.expand(400, -1).clone()
    theta[:, -1] = torch.linspace(-4, 3, 400, dtype=F64)
    weights = model.log_joint(theta).softmax(0)
    mean = float((weights * theta[:, -1]).sum())
    sd = float((weights * (theta[:, -1] - mean).square()).sum().sqrt())
    assert abs(float(found.loc[-1]) - mean) < 0.15 * sd
    assert float(found.scale_tril[-1]) == pytest.approx(sd, rel=0.15)


@pytest.mark.validate
def test_a_flow_follows_a_bend_that_no_gaussian_can() -> None:
    model = banana()
    sizes = {"draws": 1000, "seed": 0}
    elbo = {
        name: bf.sample(model, method, **sizes).info["elbo"]
        for name, method in (
            ("mean field", bf.VI(steps=300)),
            ("full", bf.VI(rank="full", steps=300)),
            ("flow", bf.NormalizingFlowVI(steps=500, hidden=32, learning_rate=0.01)),
        )
    }
    grid = torch.cartesian_prod(*[torch.linspace(-8, 6, 281, dtype=F64)] * 2)
    log_evidence = float(model.log_joint(grid).logsumexp(0)) + 2 * math.log(14 / 280)
    assert elbo["flow"] > max(elbo["mean field"], elbo["full"]) + 0.1
    assert elbo["flow"] < log_evidence + 0.05
    assert elbo["flow"] > log_evidence - 0.6


# ---------------------------------------- Laplace


@pytest.mark.parametrize("hessian", ["ggn", "exact"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_laplace_is_exact_where_the_posterior_is_gaussian(
    hessian, temperature: float
) -> None:
    problem = conjugate(temperature=temperature, correlation=3.0)
    draws = bf.sample(problem.model, bf.Laplace(hessian=hessian, steps=300), seed=0)
    torch.testing.assert_close(draws.posterior.loc, problem.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        covariance(draws.posterior), problem.covariance, rtol=0, atol=1e-6
    )
    check_sampled(draws.flat, problem.mean, problem.covariance)
    if temperature == 1:
        assert draws.log_evidence is not None
        assert draws.log_evidence[0] == pytest.approx(problem.log_evidence, abs=1e-6)
        assert math.isnan(draws.log_evidence[1])
    else:  # the normaliser of p(theta, y) ** (1 / T) for a Gaussian
        normaliser = float(problem.model.log_joint(problem.mean))
        normaliser += 0.5 * float(torch.logdet(2 * math.pi * problem.covariance))
        assert draws.log_evidence is None
        assert draws.info["log_tempered_normaliser"] == pytest.approx(normaliser, abs=1e-6)


def test_diagonal_and_last_layer_laplace_are_parts_of_the_full_one() -> None:
    model = sine()
    found = {
        s: bf.sample(model, bf.Laplace(s), seed=0)
        for s in ("full", "diagonal", "last_layer")
    }
    mode = found["full"].posterior.loc
    assert all(torch.equal(draws.posterior.loc, mode) for draws in found.values())
    assert float(model.log_joint_and_grad(mode[None])[1].norm()) < 1e-4
    precision = torch.linalg.inv(covariance(found["full"].posterior))
    torch.testing.assert_close(
        found["diagonal"].posterior.scale_tril, precision.diagonal().rsqrt()
    )
    last = model.spec.slices["2.weight"].start
    part = found["last_layer"].posterior
    assert part.where.tolist() == list(range(last, model.dim))
    torch.testing.assert_close(
        torch.linalg.inv(covariance(part.free)), precision[last:, last:]
    )
    assert (found["last_layer"].flat[:, :last] == mode[:last]).all()
    assert found["last_layer"].log_evidence is None


def test_last_layer_of_any_network() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(1, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.body(x).sin())

    class Backwards(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.expand(-1, 3)).sin() + self.body(x).sum(-1, keepdim=True)

    base = sine()
    models = [
        bf.BayesianModel(built(kind), priors.Normal(), base.likelihood, base.x, base.y)
        for kind in (Residual, Backwards)
    ]
    draws = bf.sample(models[0], bf.Laplace("last_layer", steps=50), draws=5)
    assert len(draws.posterior.where) == 4
    with pytest.raises(ValueError, match="not affine in"):
        bf.sample(models[1], bf.Laplace("last_layer"))


def test_the_linearised_predictive_is_that_of_the_last_layer_and_of_a_linear_model() -> (
    None
):
    model, x = sine(), torch.linspace(-3, 3, 7, dtype=F64).unsqueeze(-1)
    for structure, same in (("last_layer", True), ("full", False)):
        draws = bf.sample(model, bf.Laplace(structure), draws=400, seed=0)
        linear = model.linearised(draws.posterior.loc)
        assert (
            torch.allclose(model.outputs(draws.flat, x), linear.outputs(draws.flat, x))
            == same
        )
        prediction = bf.predict(linear, draws, x)
        assert prediction.mean.isfinite().all()
    # mean and variance of the linearised outputs have closed forms
    jacobian = torch.func.jacrev(lambda theta: model.outputs(theta, x).squeeze(-1))(
        draws.posterior.loc
    )
    outputs = linear.outputs(draws.flat, x).squeeze(-1)
    check_sampled(outputs, model.outputs(draws.posterior.loc, x).squeeze(-1),
                  jacobian @ covariance(draws.posterior) @ jacobian.T)  # fmt: skip


def test_rows_in_blocks_make_the_same_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sine(likelihoods.Gaussian())
    theta = model.sample_prior(1, 0)[0]
    whole = laplace.gauss_newton_precision(model, theta)
    factor = model.at(theta[None]).grad_and_factor()[1][0]
    torch.testing.assert_close(
        whole, factor.T @ factor + laplace.prior_precision(model, theta).diag()
    )
    monkeypatch.setattr("bnnflow.model.network.LARGEST_BLOCK", 40 * model.dim)
    torch.testing.assert_close(laplace.gauss_newton_precision(model, theta), whole)
    torch.testing.assert_close(
        laplace.gauss_newton_precision(model, theta, diagonal=True), whole.diagonal()
    )
    exact = laplace.exact_precision(model, theta, diagonal=False)
    hessian = torch.func.hessian(model.log_joint)(theta)
    torch.testing.assert_close(exact, -hessian)
    torch.testing.assert_close(
        laplace.exact_precision(model, theta, diagonal=True), -hessian.diagonal()
    )


@pytest.mark.parametrize(
    ("prior", "curvature"),
    [
        (priors.Normal(0.5), 4.0),
        # flat but for its kink: the quartiles'
        (priors.Laplace(0.5), (1.349 / (2 * 0.5 * math.log(2))) ** 2),
    ],
    ids=["normal", "laplace"],
)
def test_prior_curvature_is_positive(prior, curvature: float) -> None:
    model = sine(prior=prior)
    found = laplace.prior_precision(model, model.sample_prior(1, 0)[0])
    torch.testing.assert_close(found, torch.full_like(found, curvature), rtol=0.25, atol=0)


def test_laplace_takes_learned_scales_and_classes() -> None:
    draws = bf.sample(sine(likelihoods.Gaussian()), bf.Laplace(), draws=100, seed=0)
    assert draws.theta.isfinite().all()
    x = torch.randn(30, 2, generator=generator(), dtype=F64)
    net = built(lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)))
    model = bf.BayesianModel(
        net,
        priors.Normal(),
        likelihoods.Categorical(),
        x,
        (x[:, 0] > 0).long() + (x[:, 1] > 0),
    )
    draws = bf.sample(model, bf.Laplace(), draws=100, seed=0)
    assert draws.info["gradient_norm"] < 1e-4
    assert draws.log_evidence[0] < float(model.log_likelihood(draws.posterior.loc))


def test_what_laplace_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sine()
    # doctest may import the module again
    monkeypatch.setitem(bf.Laplace.draw.__globals__, "LARGEST_FULL", 12)
    with pytest.raises(
        ValueError, match="structure='full' is for up to 12 coordinates, this model has 13"
    ):
        bf.sample(model, bf.Laplace())
    assert bf.sample(model, bf.Laplace("diagonal", steps=10), draws=2).dim == 13
    with pytest.raises(
        ValueError, match="hessian must be 'ggn' for structure='last_layer'"
    ):
        bf.Laplace("last_layer", hessian="exact")
    with pytest.raises(ValueError, match="structure must be"):
        bf.Laplace("block")  # type: ignore[arg-type]


@pytest.mark.parametrize("structure", one_in(2, ["full", "diagonal"]))
def test_a_posterior_without_a_mode_is_refused(
    structure: Literal["full", "diagonal"],
) -> None:
    """Scales of the prior that shrink with the weights make the joint density grow without
    bound.
    """
    with pytest.raises(
        ValueError, match=r"grows without bound.* \(the prior is Hierarchical\)"
    ):
        bf.sample(
            sine(prior=priors.Hierarchical()),
            bf.Laplace(structure, starts=2, steps=50),
            draws=5,
            seed=0,
        )


def test_a_mode_that_was_not_reached_is_told() -> None:
    with pytest.warns(UserWarning, match="no mode was found"):
        draws = bf.sample(
            sine(likelihoods.Gaussian(1e-4)), bf.Laplace(steps=1, polish=1), draws=5, seed=0
        )
    assert not draws.info["converged"]
    assert draws.log_evidence is None


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "laplace", None)
    with pytest.raises(ImportError, match=r"pip install bnnflow\[laplace\]"):
        bf.sample(sine(), bf.Laplace("kronecker"))


def laplace_torch():
    """Return laplace-torch, or skip.

    A torchvision that does not fit torch raises RuntimeError on import.
    """
    try:
        import laplace
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"laplace-torch: {error}")
    return laplace


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scales", [1.0, 1e-8, 1e8])
def test_kronecker_products_are_exact_for_a_layer_with_noise_of_each_output(
    scales: float,
) -> None:
    laplace_torch()
    noise = scales * torch.tensor([0.1, 1.0], dtype=F64)
    x = torch.randn(40, 3, generator=generator(), dtype=F64)
    y = scales * x[:, :2] + noise * torch.randn(40, 2, generator=generator(1), dtype=F64)
    net = built(lambda: nn.Linear(3, 2, bias=False))
    likelihood = likelihoods.Gaussian(
        scale_prior=torch.distributions.HalfNormal(scales * torch.ones(2))
    )
    model = bf.BayesianModel(net, priors.Normal(scales), likelihood, x, y)
    full, product = (
        bf.sample(model, bf.Laplace(each, starts=2, steps=50), draws=2, seed=0).posterior
        for each in ("full", "kronecker")
    )
    at = full.sample(5, 0)
    torch.testing.assert_close(
        product.log_prob(at), full.log_prob(at), rtol=1e-4, atol=1e-3
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("structure", ["full", "diagonal", "last_layer", "kronecker"])
def test_laplace_has_the_precision_of_laplace_torch(kind: str, structure) -> None:
    oracle = laplace_torch()
    x = torch.randn(30, 2, generator=generator(), dtype=F64)
    y = (
        (x[:, :1] * x[:, 1:]).sin()
        if kind == "regression"
        else (x[:, 0] > 0).long() + (x[:, 1] > 0)
    )
    net = built(
        lambda: nn.Sequential(
            nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1 if kind == "regression" else 3)
        )
    )
    likelihood = (
        likelihoods.Gaussian(0.3) if kind == "regression" else likelihoods.Categorical()
    )
    model = bf.BayesianModel(net, priors.Normal(0.8), likelihood, x, y)
    draws = bf.sample(model, bf.Laplace(structure), draws=200, seed=0)
    mode = draws.posterior.loc
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(model.x, model.y), batch_size=30
    )
    where = {"last_layer": "last_layer"}.get(structure, "all")
    short = {"full": "full", "diagonal": "diag", "last_layer": "full", "kronecker": "kron"}[
        structure
    ]
    with torch.random.fork_rng(devices=[]):
        theirs = oracle.Laplace(
            model.network_at(mode), kind, subset_of_weights=where, hessian_structure=short,
            sigma_noise=0.3 if kind == "regression" else 1.0, prior_precision=0.8**-2,
        )  # fmt: skip
        theirs.fit(data)
    if structure == "kronecker":
        found = dense(draws.posterior).precision_matrix
        expected = theirs.posterior_precision.to_matrix()
    elif structure == "diagonal":
        found, expected = draws.posterior.scale_tril.pow(-2), theirs.posterior_precision
    else:
        gaussian = draws.posterior.free if structure == "last_layer" else draws.posterior
        found, expected = torch.linalg.inv(covariance(gaussian)), theirs.posterior_precision
    torch.testing.assert_close(found, expected.to(F64), rtol=1e-4, atol=1e-4)
    if structure in ("full", "kronecker", "diagonal"):
        assert draws.log_evidence[0] == pytest.approx(
            float(theirs.log_marginal_likelihood()), abs=1e-3
        )


# ---------------------------------------- SWAG, ensembles, dropout


def test_swag_visits_the_neighbourhood_of_the_mode() -> None:
    problem = conjugate(200)
    method = bf.SWAG(members=3, batch_size=10, snapshots=200, rank=10, every=10)
    draws = bf.sample(problem.model, method, draws=2000, seed=0)
    assert draws.theta.shape == (3, 2000, 4)
    sd = problem.covariance.diagonal().sqrt()
    assert ((draws.flat.mean(0) - problem.mean).abs() / sd).max() < 0.7
    spread = draws.flat.std(0) / sd
    assert spread.min() > 0.4
    assert spread.max() < 2.5
    assert draws.info["restarts"] == 0
    assert not draws.stats


def test_a_swag_member_is_the_gaussian_of_its_snapshots() -> None:
    points = torch.randn(6, 3, generator=generator(), dtype=F64)
    found = gaussian_of_snapshots(points, 6)
    sample = torch.cov(points.T)
    torch.testing.assert_close(found.loc, points.mean(0))
    torch.testing.assert_close(found.factor @ found.factor.T, 0.5 * sample)
    torch.testing.assert_close(found.diagonal, 0.5 * points.var(0, correction=0))
    for scale in (1e-8, 1e8):
        other = gaussian_of_snapshots(scale * points, 6)
        torch.testing.assert_close(
            other.log_prob(scale * points), found.log_prob(points) - 3 * math.log(scale)
        )


def test_swag_survives_a_rate_that_is_far_too_large() -> None:
    method = bf.SWAG(members=2, learning_rate=1e6, steps=20, snapshots=20)
    with pytest.warns(UserWarning, match="SWAG: training diverged for 2 of 2 members"):
        draws = bf.sample(sine(), method, draws=10, seed=0)
    assert draws.info["restarts"] > 0
    assert draws.theta.isfinite().all()


def test_ensemble_members_reach_the_mode() -> None:
    problem = conjugate()
    draws = bf.sample(problem.model, bf.DeepEnsemble(members=4, steps=1500), seed=0)
    assert draws.theta.shape == (1, 4, 4)
    torch.testing.assert_close(
        draws.theta[0], problem.mean.expand(4, -1), rtol=0, atol=1e-3
    )


def test_dropout_factors_drop_whole_units() -> None:
    net = built(
        lambda: nn.Sequential(
            nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
        )
    )
    spec = bf.WeightSpec.of(net)
    factors = spec.unflatten(dropout_factors(spec, 0.25, (4000,), generator(), F64))
    for name in ("0.weight", "0.bias", "2.bias", "4.bias"):
        assert (factors[name] == 1).all()
    for name in ("2.weight", "4.weight"):
        assert (factors[name] == factors[name][:, :1]).all(), (
            "a unit is dropped for all who read it"
        )
        assert set(factors[name].unique().tolist()) == {0.0, 1 / 0.75}
        assert abs(float(factors[name].mean()) - 1) < 0.03
    theta = torch.randn(spec.dim, generator=generator(), dtype=F64)
    masked = theta * spec.flatten({name: factor[0] for name, factor in factors.items()})
    x = torch.randn(6, 2, generator=generator(1), dtype=F64)
    p = spec.unflatten(theta)
    h = torch.tanh(x @ p["0.weight"].T + p["0.bias"]) * factors["2.weight"][0, 0]
    h = torch.relu(h @ p["2.weight"].T + p["2.bias"]) * factors["4.weight"][0, 0]
    model = bf.BayesianModel(
        net, priors.Normal(), likelihoods.Categorical(), x, torch.arange(6) % 3
    )
    torch.testing.assert_close(model.outputs(masked), h @ p["4.weight"].T + p["4.bias"])


def test_dropout_trains_the_expected_objective() -> None:
    """For a linear readout of fixed features the objective is a ridge regression in closed form."""
    rate, n = 0.3, 40
    x = torch.randn(n, 2, generator=generator(), dtype=F64)
    y = x.sum(-1) + 0.3 * torch.randn(n, generator=generator(1), dtype=F64)
    net = built(
        lambda: nn.Sequential(
            nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 1, bias=False)
        )
    )
    model = bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.5), x, y)
    method = bf.MCDropout(rate=rate, members=1, steps=3000, masks=16)
    draws = bf.sample(model, method, draws=400, seed=0)
    assert draws.theta.shape == (1, 400, 6)
    # Undo the masks: the largest multiple that each readout weight takes is 1 / (1 - rate) of it.
    readout = draws.flat[:, 4:]
    w = torch.where(
        readout.max(0).values > -readout.min(0).values,
        readout.max(0).values,
        readout.min(0).values,
    )
    w = w * (1 - rate)
    h = torch.tanh(x @ draws.flat[0, :4].reshape(2, 2).T)
    gram = (
        h.T @ h
        + rate / (1 - rate) * (h.T @ h).diagonal().diag()
        + 0.25 * torch.eye(2, dtype=F64)
    )
    torch.testing.assert_close(w, torch.linalg.solve(gram, h.T @ y), rtol=0.03, atol=0.03)


def test_dropout_needs_labelled_hidden_units() -> None:
    with pytest.raises(ValueError, match="labelled hidden units"):
        bf.sample(conjugate().model, bf.MCDropout())


# ---------------------------------------- NUTS


@pytest.mark.parametrize("full_mass", one_in(2, [True, False]))
def test_nuts_finds_the_conjugate_posterior(full_mass: bool) -> None:
    problem = conjugate(temperature=0.5)
    nuts = bf.PyroNUTS(full_mass=full_mass)
    draws = bf.sample(problem.model, nuts, chains=3, warmup=60, draws=100, seed=0)
    assert draws.theta.shape == (3, 100, 4)
    sd = problem.covariance.diagonal().sqrt()
    ess = min(arviz.ess(draws.theta[..., i].numpy()) for i in range(4))
    assert ess > 100
    assert ((draws.flat.mean(0) - problem.mean).abs() / sd).max() < 5 / math.sqrt(ess)
    assert ((draws.flat.std(0) / sd - 1).abs()).max() < 5 / math.sqrt(ess)
    assert set(draws.stats) == {"acceptance_rate", "diverging", "n_steps"}
    assert 0.6 < float(draws.stats["acceptance_rate"].mean()) <= 1
    assert (
        (draws.stats["acceptance_rate"] >= -1e-9)
        & (draws.stats["acceptance_rate"] <= 1 + 1e-9)
    ).all()
    assert (draws.stats["n_steps"] >= 1).all()
    torch.testing.assert_close(draws.log_joint, problem.model.log_joint(draws.theta))
    assert len(set(draws.info["step_size"])) == 3


def test_chains_from_one_point_differ() -> None:
    """A known defect elsewhere: chains that share one seed are copies, and R-hat then is
    perfect.
    """
    model = sine()
    draws = bf.sample(
        model,
        bf.PyroNUTS(),
        chains=3,
        warmup=0,
        draws=3,
        seed=0,
        init=model.sample_prior(1, 0)[0],
    )
    assert len(draws.theta[:, -1].unique(dim=0)) == 3
    again = bf.sample(
        model,
        bf.PyroNUTS(),
        chains=3,
        warmup=0,
        draws=3,
        seed=0,
        init=model.sample_prior(1, 0)[0],
    )
    assert torch.equal(draws.theta, again.theta)


@pytest.mark.parametrize(
    ("calls", "shape"), [(60, (1, 0)), (500, (1, 40))], ids=["first chain", "second chain"]
)
def test_an_interrupt_keeps_what_nuts_has_drawn(
    calls: int, shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sine()
    count, whole = 0, model.log_joint_and_grad

    def interrupted(theta: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt
        return whole(theta)

    monkeypatch.setattr(model, "log_joint_and_grad", interrupted)
    init, sizes = torch.zeros(13, dtype=F64), {"chains": 9, "warmup": 2, "draws": 40}
    with pytest.warns(UserWarning, match=r"interrupted: returning \d of 9 chains"):
        draws = bf.sample(model, bf.PyroNUTS(max_tree_depth=4), init=init, seed=0, **sizes)
    assert draws.info["interrupted"]
    assert draws.n_chains >= shape[0]
    assert 1 <= draws.n_draws <= 40
    assert draws.n_draws == 40 or draws.n_chains == 1
    assert draws.theta.isfinite().all()


# ---------------------------------------- what holds for all

SMALL = [
    bf.VI(steps=20),
    bf.VI(rank=2, steps=20),
    bf.VI(rank="full", steps=20),
    bf.NormalizingFlowVI(steps=20),
    bf.Laplace(steps=20),
    bf.Laplace("diagonal", steps=20),
    bf.Laplace("last_layer", steps=20),
    bf.SWAG(members=2, steps=20, snapshots=20, every=1),
    bf.MCDropout(members=2, steps=20),
    bf.DeepEnsemble(3, 20),
    bf.PyroNUTS(max_tree_depth=3),
]


@pytest.mark.crossed
@pytest.mark.parametrize("method", SMALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_every_method_runs_in_either_precision_and_repeats(
    method, dtype: torch.dtype, tmp_path
) -> None:
    model = sine(likelihoods.Gaussian())
    sizes = (
        {"chains": 2, "warmup": 5, "draws": 5} if isinstance(method, bf.PyroNUTS) else {}
    )
    draws = bf.sample(model, method, seed=0, dtype=dtype, **sizes)
    assert torch.equal(
        draws.theta, bf.sample(model, method, seed=0, dtype=dtype, **sizes).theta
    )
    assert not torch.equal(
        draws.theta, bf.sample(model, method, seed=1, dtype=dtype, **sizes).theta
    )
    assert draws.theta.dtype == dtype
    torch.testing.assert_close(
        draws.log_joint, model.to(dtype=dtype).log_joint(draws.theta)
    )
    assert draws.info["gradients_per_chain"] > 0
    assert bool(draws.stats) == isinstance(method, bf.PyroNUTS)
    loaded = bf.load(draws.save(tmp_path / "draws.npz"))
    assert torch.equal(loaded.theta, draws.theta)
    if draws.posterior is not None:
        assert draws.posterior.sample(3, 0).dtype == dtype
        assert draws.posterior.log_prob(draws.flat).dtype == F64
        assert torch.equal(
            loaded.posterior.log_prob(draws.flat), draws.posterior.log_prob(draws.flat)
        )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            bf.VI(),
            {"warmup": 1, "checkpoint": "run"},
            "VI takes steps, not warmup, checkpoint",
        ),
        (bf.Laplace(), {"warmup": 1}, "Laplace takes structure and starts, not warmup"),
        (bf.SWAG(), {"chains": 2}, "SWAG takes members and draws, not chains"),
        (bf.SWAG(batch_size=10), {}, "batch_size must be between 1 and the 9 rows"),
        (bf.MCDropout(), {"warmup": 2}, "MCDropout takes members and draws, not warmup"),
        (
            bf.NormalizingFlowVI(),
            {"warmup": 2},
            "NormalizingFlowVI takes steps, not warmup",
        ),
    ],
)
def test_numbers_without_sense_are_refused(method, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bf.sample(sine(), method, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (bf.VI, {"rank": -1}),
        (bf.VI, {"rank": "half"}),
        (bf.VI, {"scale": 0.0}),
        (bf.NormalizingFlowVI, {"couplings": 0}),
        (bf.Laplace, {"starts": 0}),
        (bf.Laplace, {"hessian": "none"}),
        (bf.SWAG, {"rank": 1}),
        (bf.SWAG, {"snapshots": 5}),
        (bf.SWAG, {"batch_size": 0}),
        (bf.MCDropout, {"rate": 1.0}),
        (bf.MCDropout, {"masks": 0}),
        (bf.PyroNUTS, {"max_tree_depth": 0}),
        (bf.PyroNUTS, {"target_acceptance": 1.0}),
    ],
)
def test_settings_without_sense_are_refused(method: type, options: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        method(**options)


# ---------------------------------------- noise that runs to zero

FEW: dict[str, Any] = {"starts": 2, "steps": 100, "polish": 300}
LAPLACE: dict[str, dict[str, Any]] = {
    "full": {},
    "diagonal": {"structure": "diagonal"},
    "last layer": {"structure": "last_layer"},
    "averaged": {"hessian": "averaged"},
    "tuned": {"prior_precision": "evidence"},
}
OTHERS = {
    "SWAG": bf.SWAG(steps=100),
    "VI": bf.VI(steps=50),
    "flow": bf.NormalizingFlowVI(steps=20),
}


def without_noise(noise: float | None) -> bf.BayesianModel:
    """A network that can fit every row."""
    x = torch.randn(6, 2, generator=generator())
    net = built(
        lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), torch.float32
    )
    y = 2 * x[:, :1] - x[:, 1:]
    return bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(noise), x, y)


@pytest.mark.parametrize("name", [*LAPLACE, "exact"])
def test_curvature_beyond_double_precision_is_told(name: str) -> None:
    method = bf.Laplace(**FEW, **LAPLACE.get(name, {"hessian": "exact"}))
    with pytest.raises(ValueError, match="beyond what double precision holds"):
        bf.sample(without_noise(1e-9), method, draws=20, seed=0)


@pytest.mark.filterwarnings("ignore:no mode was found")
@pytest.mark.parametrize("name", [*LAPLACE, *OTHERS])
def test_noise_that_runs_to_zero_leaves_draws_finite(name: str) -> None:
    method = OTHERS.get(name) or bf.Laplace(**FEW, **LAPLACE[name])
    draws = bf.sample(without_noise(None), method, draws=20, seed=0)
    assert bool(draws.theta.isfinite().all())
