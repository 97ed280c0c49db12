"""Laws that every likelihood keeps, and closed forms of the counts, the heavy tails and the ordered
classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as td
from pyro import condition, poutine
from scipy import integrate, stats
from torch import Tensor, nn

from bnnflow import BayesianModel, likelihoods, metrics, predict, priors
from bnnflow.model.likelihoods.shared import StudentTable, student_constant, student_slope

F64 = torch.float64
LEVELS = torch.tensor([0.0, 1, 3, 4, 7], dtype=F64)

LIKELIHOODS: dict[str, tuple[Any, int]] = {  # likelihood, outputs
    "gaussian": (likelihoods.Gaussian(0.3), 2),
    "gaussian learned": (likelihoods.Gaussian(), 2),
    "heteroscedastic": (likelihoods.HeteroscedasticGaussian(0.05), 4),
    "varying student": (likelihoods.HeteroscedasticStudentT(min_scale=0.05), 4),
    "varying student, fixed": (likelihoods.HeteroscedasticStudentT(3.0), 4),
    "student": (likelihoods.StudentT(3.5, 0.4), 2),
    "student learned": (likelihoods.StudentT(5.0, scale_prior=td.LogNormal(-1.0, 0.5)), 1),
    "standardised": (
        likelihoods.Standardised(likelihoods.Gaussian(0.3), (2.0, -1.0), (3.0, 0.5)),
        2,
    ),
    "standardised learned": (
        likelihoods.Standardised(likelihoods.StudentT(5.0), loc=0.4, scale=2.0),
        1,
    ),
    "log-normal": (likelihoods.LogNormal(likelihoods.Gaussian(0.4)), 2),
    "log-normal learned": (
        likelihoods.LogNormal(likelihoods.Standardised(likelihoods.Gaussian(), 0.5, 0.7)),
        1,
    ),
    "gamma": (likelihoods.Gamma(0.3), 2),
    "gamma learned": (likelihoods.Gamma(), 1),
    "poisson": (likelihoods.Poisson(), 2),
    "levels": (likelihoods.Levels((0, 1, 3, 4, 7)), 1),
    "negative binomial": (likelihoods.NegativeBinomial(0.7), 2),
    "negative binomial learned": (likelihoods.NegativeBinomial(), 1),
    "categorical": (likelihoods.Categorical(), 3),
    "bernoulli": (likelihoods.Bernoulli(), 1),
    "ordinal of 3": (likelihoods.Ordinal(3), 1),
    "ordinal of 5": (likelihoods.Ordinal(5, td.HalfNormal(2.0)), 1),
}
COUNTS = [name for name, (each, _) in LIKELIHOODS.items() if each.discrete]
REGRESSION = [name for name, (each, _) in LIKELIHOODS.items() if each.kind == "regression"]
CONTINUOUS = [name for name in REGRESSION if name not in COUNTS]
VARYING = [name for name in LIKELIHOODS if name.startswith(("hetero", "varying"))]
POSITIVE = [name for name in CONTINUOUS if name.startswith(("log-normal", "gamma"))]
TRANSFORMED = [name for name, (each, _) in LIKELIHOODS.items() if each.wide_targets]
CLASSES = [name for name in LIKELIHOODS if name not in REGRESSION]
WITH_DIVERGENCE = (
    "gaussian",
    "gaussian learned",
    "heteroscedastic",
    "poisson",
    "levels",
    *CLASSES,
)
WITH_FISHER = [name for name, (each, _) in LIKELIHOODS.items() if each.has_fisher_factor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a network from a seed, without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make()


def n_targets(name: str) -> int:
    return 2 if name in VARYING else LIKELIHOODS[name][1]


def n_classes(name: str) -> int:
    return {"categorical": 3, "bernoulli": 2, "ordinal of 3": 3, "ordinal of 5": 5}[name]


def targets(name: str, *shape: int, seed: int = 5) -> Tensor:
    g = generator(seed)
    if name in CLASSES:
        return torch.randint(n_classes(name), shape, generator=g)
    if name == "levels":
        return LEVELS[torch.randint(5, (*shape, 1), generator=g)]
    if name in COUNTS:
        return torch.randint(8, (*shape, n_targets(name)), generator=g).to(F64)
    y = 1.5 * torch.randn(*shape, n_targets(name), generator=g, dtype=F64)
    return y.exp() if name in POSITIVE else y


def case(name: str, chains: int = 3, n: int = 7) -> tuple[Any, Tensor, dict[str, Tensor]]:
    likelihood, n_outputs = LIKELIHOODS[name]
    outputs = 1.2 * torch.randn(chains, n, n_outputs, generator=generator(4), dtype=F64)
    g, parameters = generator(6), {}
    for key, prior in likelihood.parameters.items():
        shape = tuple(prior.batch_shape) or (1,)
        parameters[key] = torch.rand(chains, *shape, generator=g, dtype=F64) + 0.3
    return likelihood, outputs, parameters


def oracle(name: str, outputs: Tensor, parameters: dict[str, Tensor]) -> td.Distribution:
    """Return torch's distribution of a row."""
    return law_of(LIKELIHOODS[name][0], name, outputs, parameters)


def law_of(
    likelihood: Any, name: str, outputs: Tensor, parameters: dict[str, Tensor]
) -> td.Distribution:
    if name in TRANSFORMED:
        inner = likelihood.base
        within = "gaussian" if isinstance(inner, likelihoods.Gaussian) else "student"
        within = "standardised" if isinstance(inner, likelihoods.Standardised) else within
        map_ = (
            td.ExpTransform()
            if isinstance(likelihood, likelihoods.LogNormal)
            else td.AffineTransform(
                torch.tensor(likelihood.loc, dtype=F64),
                torch.tensor(likelihood.scale, dtype=F64),
            )
        )
        law = law_of(inner, within, outputs, parameters)
        return td.Independent(td.TransformedDistribution(law.base_dist, map_), 1)

    def setting(key: str) -> Any:
        fixed = getattr(likelihood, key, None)
        return (
            parameters[key].unsqueeze(-1)
            if fixed is None
            else torch.tensor(fixed, dtype=F64)
        )

    if name.startswith("gaussian"):
        return td.Independent(td.Normal(outputs, setting("scale")), 1)
    if name in VARYING:
        mean, raw = outputs.chunk(2, -1)
        scale = nn.functional.softplus(raw) + likelihood.min_scale
        if name == "heteroscedastic":
            return td.Independent(td.Normal(mean, scale), 1)
        df = likelihood.df or 2 + setting("excess_df")
        return td.Independent(td.StudentT(df, mean, scale), 1)
    if name.startswith("student"):
        return td.Independent(td.StudentT(likelihood.df, outputs, setting("scale")), 1)
    if name.startswith("gamma"):
        a = 1 / setting("dispersion").expand_as(outputs)
        return td.Independent(td.Gamma(a, a / outputs.exp()), 1)
    if name == "poisson":
        return td.Independent(td.Poisson(outputs.exp()), 1)
    if name.startswith("negative binomial"):
        r = 1 / setting("dispersion").expand_as(outputs)
        return td.Independent(td.NegativeBinomial(r, logits=outputs - r.log()), 1)
    if name.startswith(("ordinal", "levels")):
        gaps = parameters["gap"].cumsum(-1)
        # (..., 1, classes - 1)
        cutpoints = torch.cat([torch.zeros_like(gaps[..., :1]), gaps], -1).unsqueeze(-2)
        below = torch.sigmoid(cutpoints - outputs)
        ends = torch.zeros_like(outputs), torch.ones_like(outputs)
        return td.Categorical(torch.cat([ends[0], below, ends[1]], -1).diff(dim=-1))
    return (
        td.Categorical(logits=outputs)
        if name == "categorical"
        else td.Bernoulli(logits=outputs.squeeze(-1))
    )


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_log_prob_is_torchs_with_every_constant(name: str) -> None:
    likelihood, outputs, parameters = case(name)
    y = likelihood.validate(targets(name, 7), outputs.shape[-1])
    log_prob = likelihood.log_prob(outputs, y, parameters)
    if name == "levels":
        y = torch.searchsorted(LEVELS, y.squeeze(-1))
    expected = oracle(name, outputs, parameters).log_prob(
        y.to(F64) if name == "bernoulli" else y
    )
    assert log_prob.shape == (3, 7)
    torch.testing.assert_close(log_prob, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_density_has_mass_one(name: str) -> None:
    likelihood, outputs, parameters = case(name, 1, 1)
    if name in CLASSES:
        rows = [
            likelihood.log_prob(outputs, torch.full((1,), k), parameters)
            for k in range(n_classes(name))
        ]
        assert torch.cat(rows).exp().sum() == pytest.approx(1, abs=1e-12)
    elif name in COUNTS:
        y = (LEVELS if name == "levels" else torch.arange(400, dtype=F64)).unsqueeze(-1)
        one = outputs[..., :1].expand(1, len(y), 1)
        assert likelihood.log_prob(one, y, parameters).exp().sum() == pytest.approx(
            1, abs=1e-10
        )
    elif name != "standardised":  # which has two targets, and whose base is tested alone
        one = outputs[..., ::2] if name in VARYING else outputs[..., :1]

        def density(value: float) -> float:
            return math.exp(
                float(
                    likelihood.log_prob(
                        one, torch.full((1, 1), value, dtype=F64), parameters
                    )
                )
            )

        least = 0.0 if name in POSITIVE else -np.inf
        assert integrate.quad(density, least, np.inf, limit=400)[0] == pytest.approx(
            1, abs=1e-6
        )


@pytest.mark.parametrize("per_network", [False, True], ids=["shared y", "y per network"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_score_is_the_gradient(name: str, per_network: bool) -> None:
    likelihood, outputs, parameters = case(name)
    y = (
        targets(name, 3, 7)
        if per_network
        else likelihood.validate(targets(name, 7), outputs.shape[-1])
    )
    logs = {key: value.log().requires_grad_() for key, value in parameters.items()}
    outputs.requires_grad_()
    log_prob = likelihood.log_prob(
        outputs, y, {key: log.exp() for key, log in logs.items()}
    )
    expected = torch.autograd.grad(log_prob.sum(), [outputs, *logs.values()])
    by_outputs, by_parameters = likelihood.score(outputs, y, parameters)
    assert list(by_parameters) == list(likelihood.parameters)
    for found, wanted in zip([by_outputs, *by_parameters.values()], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    if per_network:  # each network sees its own targets
        alone = [
            likelihood.log_prob(
                outputs[i : i + 1], y[i], {k: v[i : i + 1] for k, v in parameters.items()}
            )
            for i in range(3)
        ]
        torch.testing.assert_close(log_prob, torch.cat(alone))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_score_in_single_precision(name: str) -> None:
    likelihood, outputs, parameters = case(name)
    y = targets(name, 7)
    exact = likelihood.score(outputs, y, parameters)
    single_y = y if name in CLASSES else y.float()
    single = {key: value.float() for key, value in parameters.items()}
    by_outputs, by_parameters = likelihood.score(outputs.float(), single_y, single)
    assert by_outputs.dtype == torch.float32
    assert likelihood.log_prob(outputs.float(), single_y, single).dtype == torch.float32
    torch.testing.assert_close(by_outputs.double(), exact[0], rtol=1e-4, atol=1e-4)
    for key, value in by_parameters.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact[1][key], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", WITH_FISHER)
def test_fisher_factor_is_the_covariance_of_the_score(name: str) -> None:
    likelihood, outputs, parameters = case(name, 2, 1)
    size, count = outputs.shape[-1], 60_000
    factor, information = likelihood.fisher_factor(outputs, parameters)

    def scores(i: int) -> Tensor:
        """Scores by outputs and log parameters of many draws of the row of network i."""
        many = outputs[i : i + 1].expand(count, 1, size)
        values = {
            key: value[i : i + 1].expand(count, *value.shape[1:])
            for key, value in parameters.items()
        }
        if name in CLASSES:
            probs = likelihood.mean(many[:1], {k: v[:1] for k, v in values.items()})[0, 0]
            y = torch.multinomial(
                probs, count, replacement=True, generator=generator(i)
            ).unsqueeze(-1)
        else:
            y = likelihood.sample(many, values, generator(i))
        by_outputs, by_parameters = likelihood.score(many, y, values)
        # (count, size + parameters)
        return torch.cat([by_outputs[:, 0], *by_parameters.values()], -1)

    for i in range(2):
        drawn = scores(i)
        expected = torch.zeros(drawn.shape[1], drawn.shape[1], dtype=F64)
        expected[:size, :size] = factor[i, 0] @ factor[i, 0].mT
        for value in information.values():
            if value.dim() == 4:
                whole = torch.cat([factor[i, 0], value[i, 0]], 0)
                expected = whole @ whole.mT
            else:
                expected[size:, size:] = torch.diag(value[i])
        products = drawn.unsqueeze(-1) * drawn.unsqueeze(-2)
        error = products.std(0) / math.sqrt(count)
        assert ((products.mean(0) - expected).abs() <= 5 * error + 1e-9).all()


@pytest.mark.parametrize("name", REGRESSION)
def test_samples_agree_with_mean_variance_and_cdf(name: str) -> None:
    likelihood, outputs, parameters = case(name, 1, 2)
    count = 20_000
    many = outputs.expand(count, -1, -1)
    values = {
        key: value.expand(count, *value.shape[1:]) for key, value in parameters.items()
    }
    state = torch.get_rng_state()
    y = likelihood.sample(many, values, generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, likelihood.sample(many, values, generator(1)))
    mean, variance = (
        likelihood.mean(outputs, parameters)[0],
        likelihood.variance(outputs, parameters)[0],
    )
    assert ((y.mean(0) - mean).abs() < 5 * (variance / count).sqrt()).all()
    squares = (y - mean).square()
    if (
        "student" not in name or name == "student learned"
    ):  # else the square has no variance
        assert (
            (squares.mean(0) - variance).abs() < 6 * squares.std(0) / math.sqrt(count)
        ).all()
    if name not in (*TRANSFORMED, "levels"):  # torch knows no moments of these
        law = oracle(name, outputs, parameters).base_dist
        torch.testing.assert_close(mean, law.mean[0])
        torch.testing.assert_close(variance, law.variance[0])
    for at in (-1.0, 0.0, 1.0, 3.0):
        cdf = likelihood.cdf(outputs, torch.full_like(mean, at), parameters)[0]
        below = (y <= at).double().mean(0)
        assert ((below - cdf).abs() <= 5 * (cdf * (1 - cdf) / count).sqrt() + 1e-9).all()


def test_cdfs_are_those_of_scipy() -> None:
    y = torch.tensor([-3.0, -0.5, 0.0, 1.0, 2.5, 30.0], dtype=F64).reshape(-1, 1, 1)
    likelihood, outputs, parameters = case("poisson", 1, 3)
    found = likelihood.cdf(outputs, y, parameters).numpy()
    np.testing.assert_allclose(
        found, stats.poisson.cdf(y.numpy(), outputs.exp().numpy()), rtol=1e-12
    )
    likelihood, outputs, parameters = case("negative binomial", 1, 3)
    mean, r = outputs.exp().numpy(), 1 / 0.7
    found = likelihood.cdf(outputs, y, parameters).numpy()
    np.testing.assert_allclose(
        found, stats.nbinom.cdf(y.numpy(), r, r / (r + mean)), rtol=1e-12
    )
    likelihood, outputs, parameters = case("student", 1, 3)
    found = likelihood.cdf(outputs, y, parameters).numpy()
    np.testing.assert_allclose(
        found, stats.t.cdf(y.numpy(), 3.5, outputs.numpy(), 0.4), rtol=0, atol=2e-8
    )


def test_students_table_is_right_for_all_tails() -> None:
    df = [2.0, 2.001, 2.7, 5.0, 33.3, 399.0, 401.0, 1e3, 1e6, 1e12, 1e15]
    df = torch.tensor(df, dtype=F64).reshape(-1, 1, 1)
    z = torch.cat([torch.linspace(-30, 30, 20_001, dtype=F64), 10 ** torch.arange(9.0)])
    z = z.reshape(1, -1, 1).expand(len(df), -1, 1)
    found = StudentTable(df)(z)
    np.testing.assert_allclose(found, stats.t.cdf(z, df), rtol=0, atol=2e-8)
    assert (found[:, :20_001].diff(dim=1) >= -1e-12).all()
    assert StudentTable(df.float())(z.float()).dtype == torch.float32
    unknown = torch.tensor([[[math.nan], [0.0]]], dtype=F64)
    assert StudentTable(df[:1])(unknown).isnan().flatten().tolist() == [True, False]


def test_students_constant_and_its_slope_hold_for_all_degrees() -> None:
    exact = [  # by 80 digits
        (2.0, -1.0397207708399179, 0.05685281944005469),
        (5.5, -0.9641517248501245, 0.008135852137282313),
        (30.0, -0.9272703253788457, 0.0002776237981191988),
        (399.0, -0.9195650989647688, 1.5703369629519677e-06),
        (401.0, -0.9195619739550032, 1.5547118652951074e-06),
        (1e4, -0.9189635332046311, 2.4999999875000003e-09),
        (1e8, -0.9189385357046728, 2.5e-17),
        (1e15, -0.918938533204673, 2.5e-31),
    ]
    df, constant, slope = torch.tensor(exact, dtype=F64).T
    torch.testing.assert_close(student_constant(df), constant, rtol=0, atol=1e-12)
    torch.testing.assert_close(student_slope(df), slope, rtol=1e-9, atol=0)


@pytest.mark.parametrize("excess", [0.01, 1.0, 30.0, 1e3, 1e5])
def test_all_tails_in_single_precision(excess: float) -> None:
    """Constants are small differences of large numbers."""
    likelihood, outputs, _ = case("varying student", 1, 50)
    y = targets("varying student", 50)
    exact = {"excess_df": torch.tensor([[excess]], dtype=F64)}
    where = outputs.float(), y.float(), {"excess_df": exact["excess_df"].float()}
    expected, found = (
        likelihood.log_prob(outputs, y, exact),
        likelihood.log_prob(*where),
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    expected, found = likelihood.score(outputs, y, exact), likelihood.score(*where)
    for one, other in (
        (found[0], expected[0]),
        (found[1]["excess_df"], expected[1]["excess_df"]),
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-5)
    expected = likelihood.fisher_factor(outputs, exact)[1]["excess_df"]
    found = likelihood.fisher_factor(where[0], where[2])[1]["excess_df"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-7)


def test_probabilities_of_classes() -> None:
    for name in CLASSES:
        likelihood, outputs, parameters = case(name)
        probs = likelihood.mean(outputs, parameters)
        assert probs.shape == (3, 7, n_classes(name))
        for k in range(n_classes(name)):
            log_prob = likelihood.log_prob(outputs, torch.full((7,), k), parameters)
            torch.testing.assert_close(probs[..., k], log_prob.exp())


def test_negative_binomial_without_dispersion_is_poisson() -> None:
    outputs, y = (
        torch.randn(1, 9, 1, generator=generator(), dtype=F64),
        targets("poisson", 9)[:, :1],
    )
    poisson, nearly = likelihoods.Poisson(), likelihoods.NegativeBinomial(1e-9)
    for dtype, tolerance in ((F64, 1e-6), (torch.float32, 1e-4)):
        where = outputs.to(dtype), y.to(dtype), {}
        torch.testing.assert_close(
            nearly.log_prob(*where),
            poisson.log_prob(*where),
            rtol=tolerance,
            atol=tolerance,
        )
        torch.testing.assert_close(
            nearly.score(*where)[0],
            poisson.score(*where)[0],
            rtol=tolerance,
            atol=tolerance,
        )


def test_two_levels_are_a_bernoulli_law() -> None:
    outputs, y = (
        torch.tensor([[[0.3], [-1.2]]], dtype=F64),
        torch.tensor([[5.0], [2.0]], dtype=F64),
    )
    two, bernoulli = likelihoods.Levels((2, 5)), likelihoods.Bernoulli()
    labels = torch.tensor([1, 0])
    assert torch.equal(
        two.log_prob(outputs, y, {}), bernoulli.log_prob(outputs, labels, {})
    )
    assert torch.equal(
        two.score(outputs, y, {})[0], bernoulli.score(outputs, labels, {})[0]
    )
    torch.testing.assert_close(two.mean(outputs, {}), 2 + 3 * torch.sigmoid(outputs))
    probability = torch.sigmoid(outputs)
    torch.testing.assert_close(
        two.variance(outputs, {}), 9 * probability * (1 - probability)
    )


def test_student_of_many_degrees_of_freedom_is_gaussian() -> None:
    outputs, y = (
        torch.randn(1, 9, 1, generator=generator(), dtype=F64),
        targets("gaussian", 9)[:, :1],
    )
    heavy, light = likelihoods.StudentT(1e7, 0.4), likelihoods.Gaussian(0.4)
    torch.testing.assert_close(
        heavy.log_prob(outputs, y, {}), light.log_prob(outputs, y, {}), rtol=1e-4, atol=1e-4
    )


def test_extreme_outputs_have_finite_scores() -> None:
    far = torch.tensor([-400.0, 400.0], dtype=F64).reshape(1, 2, 1)
    gap = {"gap": torch.tensor([[0.1, 3.0]], dtype=F64)}
    for label in range(4):
        y = torch.full((2,), label)
        assert likelihoods.Ordinal(4).log_prob(far, y, gap).isfinite().all()
        assert likelihoods.Ordinal(4).score(far, y, gap)[0].isfinite().all()
    by_outputs, by_parameters = likelihoods.NegativeBinomial().score(
        far * 2,
        torch.full((2, 1), 3.0, dtype=F64),
        {"dispersion": torch.full((1, 1), 1e-8, dtype=F64)},
    )
    assert by_parameters["dispersion"].isfinite().all()
    assert by_outputs.isfinite().all()


# ---------------------------------------- in a model


def model_of(
    name: str, *, dtype: torch.dtype = F64, n: int = 12, **options: Any
) -> BayesianModel:
    likelihood, n_outputs = LIKELIHOODS[name]
    net = built(
        lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, n_outputs))
    ).to(dtype)
    x = torch.randn(n, 2, generator=generator(1), dtype=F64)
    return BayesianModel(
        net, priors.Normal(0.8), likelihood, x.to(dtype), targets(name, n), **options
    )


def points(model: BayesianModel, *shape: int) -> Tensor:
    return 0.5 * torch.randn(*shape, model.dim, generator=generator(3), dtype=F64).to(
        model.dtype
    )


def autograd(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(function(theta).sum(), theta)[0]


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_log_joint_and_grad(name: str) -> None:
    model = model_of(name, temperature=0.7)
    theta = points(model, 3)
    value, grad = model.log_joint_and_grad(theta)
    torch.testing.assert_close(value, model.log_joint(theta), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, autograd(model.log_joint, theta), rtol=1e-9, atol=1e-9)
    single = model.to(dtype=torch.float32)
    torch.testing.assert_close(
        single.log_joint_and_grad(theta.float())[1].double(), grad, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_all_batches_of_one_row_average_to_the_gradient(name: str) -> None:
    model = model_of(name, temperature=0.7)
    theta = points(model, 2)
    pairs = [
        model.log_joint_and_grad(theta, torch.tensor([row])) for row in range(len(model.x))
    ]
    value, grad = model.log_joint_and_grad(theta)
    torch.testing.assert_close(
        torch.stack([v for v, _ in pairs]).mean(0), value, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        torch.stack([g for _, g in pairs]).mean(0), grad, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", WITH_FISHER)
def test_gauss_newton_is_the_fisher_matrix(name: str) -> None:
    model = model_of(name, n=5)
    theta = points(model, 2)
    grad, factor = model.at(theta).grad_and_factor()
    torch.testing.assert_close(grad, model.log_likelihood_grad(theta), rtol=1e-9, atol=1e-9)
    for row, a in zip(theta, factor, strict=True):
        if name not in WITH_DIVERGENCE:  # in closed form
            jacobian = torch.func.jacrev(model.outputs)(row)  # (n, out, dim)
            parameters = model.likelihood_parameters(row.unsqueeze(0))
            r, information = model.likelihood.fisher_factor(
                model.outputs(row).unsqueeze(0), parameters
            )
            rows = torch.einsum("nkd,nkr->nrd", jacobian, r[0])
            expected = torch.zeros(model.dim, model.dim, dtype=F64)
            for value in information.values():
                if value.dim() == 4:  # shared with the outputs
                    rows[..., -1] += value[0, :, 0]
                else:
                    expected[-1, -1] += value.squeeze()
            expected += torch.einsum("nrd,nre->de", rows, rows)
        else:
            expected = torch.func.hessian(
                lambda other, row=row: _divergence(name, model, row, other)
            )(row)
        torch.testing.assert_close(a.mT @ a, expected, rtol=1e-8, atol=1e-8)


def _divergence(name: str, model: BayesianModel, theta: Tensor, other: Tensor) -> Tensor:
    """Return KL(p(y | theta) || p(y | other)): its Hessian in `other` at equality is Fisher's
    information.
    """
    laws = [
        oracle(
            name,
            model.outputs(each).unsqueeze(0),
            model.likelihood_parameters(each.unsqueeze(0)),
        )
        for each in (theta, other)
    ]
    return td.kl_divergence(*laws).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_pyro_sees_the_same_density(name: str, temperature: float) -> None:
    model = model_of(name, temperature=temperature)
    for theta in points(model, 2):
        params = model.spec.unflatten(theta)
        sites = {
            n.replace("likelihood.log_", "likelihood."): v.exp()
            if n in model.spec.extras
            else v
            for n, v in params.items()
        }
        trace = poutine.trace(condition(model.to_pyro(), sites)).get_trace()
        log_jacobian = theta[model.spec.network.dim :].sum()
        torch.testing.assert_close(
            trace.log_prob_sum() + log_jacobian, model.log_joint(theta)
        )


def test_fingerprint_tells_likelihoods_apart() -> None:
    def fingerprint(likelihood: Any, y: Tensor) -> str:
        net = built(lambda: nn.Linear(2, 1))
        return BayesianModel(
            net, priors.Normal(), likelihood, torch.arange(12.0).reshape(6, 2), y
        ).fingerprint()

    y = torch.tensor([0, 1, 2, 0, 1, 2])
    several = [
        likelihoods.Poisson(),
        likelihoods.NegativeBinomial(0.5),
        likelihoods.NegativeBinomial(0.6),
        likelihoods.NegativeBinomial(),
        likelihoods.NegativeBinomial(dispersion_prior=td.HalfNormal(2.0)),
        likelihoods.StudentT(4.0, 0.5),
        likelihoods.StudentT(5.0, 0.5),
        likelihoods.StudentT(),
        likelihoods.Ordinal(3),
        likelihoods.Ordinal(4),
        likelihoods.Ordinal(3, td.HalfNormal(1.0)),
    ]
    assert len({fingerprint(each, y) for each in several}) == len(several)


# ---------------------------------------- predictions


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_predictions_are_mixtures(name: str) -> None:
    model = model_of(name)
    theta = points(model, 6)
    p = predict(model, theta, chunk_size=4)
    expected = model.pointwise_log_likelihood(theta).logsumexp(0) - math.log(6)
    torch.testing.assert_close(p.log_prob(model.y), expected)
    drawn = p.sample(4000, seed=1)
    if name in CLASSES:
        frequency = nn.functional.one_hot(drawn, n_classes(name)).double().mean(0)
        assert (frequency - p.probs).abs().max() < 0.05
        assert metrics.brier(p, model.y) > 0
    else:
        assert ((drawn.mean(0) - p.mean).abs() < 6 * p.sd / math.sqrt(4000)).all()
        assert metrics.rmse(p, model.y.squeeze(-1)) > 0


@pytest.mark.parametrize("name", COUNTS)
def test_quantiles_of_counts_are_whole_numbers_where_the_cdf_arrives(name: str) -> None:
    model = model_of(name)
    p = predict(model, points(model, 6))
    levels = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], dtype=F64)
    for level, quantile in zip(levels, p.quantile(levels), strict=True):
        assert torch.equal(quantile, quantile.round())
        assert (p.cdf(quantile) >= level).all()
        before = p.cdf((quantile - 1).clamp(min=0))
        assert (before[quantile > 0] < level).all()
    assert torch.equal(p.quantile(0.5), p.quantile([0.5])[0])


@pytest.mark.parametrize("name", COUNTS)
def test_crps_of_counts_is_that_of_samples(name: str) -> None:
    model = model_of(name)
    p = predict(model, points(model, 6))
    y = model.y.clone()
    y[0] = 7 if name == "levels" else 90  # far outside what is predicted
    drawn = p.sample(40_000, seed=2).reshape(40_000, 12, -1)
    first, second = drawn.chunk(2)
    # CRPS = E|Y - y| - E|Y - Y'| / 2
    terms = ((first - y).abs() - 0.5 * (first - second).abs()).mean(-1)
    error = terms.std(0) / math.sqrt(len(terms))
    found = metrics.rowwise(p, y)["crps"]
    assert ((found - terms.mean(0)).abs() < 5 * error + 1e-3).all()


@pytest.mark.parametrize("name", COUNTS)
def test_coverage_of_counts_is_that_of_their_intervals(name: str) -> None:
    model = model_of(name)
    p = predict(model, points(model, 6))
    low, high = p.interval(0.6)
    y = p.targets(model.y)
    assert metrics.coverage(p, model.y, 0.6) == float(
        ((y >= low) & (y <= high)).double().mean()
    )


def test_randomised_pit_of_calibrated_counts_is_uniform() -> None:
    net = built(lambda: nn.Linear(1, 1)).double()
    x = torch.linspace(-1, 1, 2000, dtype=F64).unsqueeze(-1)
    rates = (0.3 + 0.8 * x).exp()
    y = torch.poisson(rates, generator=generator(3))
    model = BayesianModel(net, priors.Normal(), likelihoods.Poisson(), x, y)
    p = predict(model, torch.tensor([[0.8, 0.3]], dtype=F64))
    values = metrics.pit(p, y)
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(values, metrics.pit(p, y, seed=0))
    # which is why it is randomised
    assert stats.kstest(p.cdf(y).numpy(), "uniform").pvalue < 1e-6
    assert metrics.coverage(p, y, 0.8) >= 0.8


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_transformed_model_is_that_of_its_base(name: str) -> None:
    """Draws, gradients and quantiles are those in the units of the base, carried over."""
    model, theta = model_of(name), points(model_of(name), 3)
    base = model.untransformed()
    torch.testing.assert_close(
        base.log_joint_and_grad(theta)[1], model.log_joint_and_grad(theta)[1]
    )
    slope = model.likelihood.log_slope(model.y).sum()
    torch.testing.assert_close(base.log_joint(theta) + slope, model.log_joint(theta))
    p = predict(model, theta)
    for level in (0.02, 0.5, 0.97):
        quantile = p.quantile(level)
        torch.testing.assert_close(
            p.cdf(quantile), torch.full_like(quantile, level), atol=1e-4, rtol=0
        )
    assert base.untransformed() is base or name == "log-normal learned"


def test_targets_far_from_zero_lose_no_digits() -> None:
    seconds = 1.7e9 + 60.0 * torch.arange(8, dtype=F64)
    x = torch.linspace(-1, 1, 8).unsqueeze(-1)
    scale = float(seconds.std())
    likelihood = likelihoods.Standardised(
        likelihoods.Gaussian(0.1), float(seconds.mean()), scale
    )
    model = BayesianModel(
        built(lambda: nn.Linear(1, 1)), priors.Normal(), likelihood, x, seconds
    )
    assert model.dtype == torch.float32
    exact = torch.tensor(
        [[float((x[:, 0].double() * seconds).sum() / x.double().square().sum())]]
    )
    slope = (exact / scale).float()
    p = predict(model, torch.cat([slope, torch.zeros(1, 1)], 1), x)
    assert metrics.rmse(p, seconds) < 1.0
    assert float(
        model.to(dtype=F64).log_joint(points(model.to(dtype=F64)))
    ) == pytest.approx(float(model.log_joint(points(model))), rel=1e-5)


def test_quantiles_of_a_log_normal_law_without_moments() -> None:
    law = likelihoods.LogNormal(likelihoods.HeteroscedasticGaussian())
    net = built(lambda: nn.Linear(1, 2)).double()
    x = torch.linspace(0, 1, 4, dtype=F64).unsqueeze(-1)
    model = BayesianModel(net, priors.Normal(), law, x, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    # exp(800) overflows
    p = predict(model, torch.tensor([[0.0, 0.0, 1.0, 40.0]], dtype=F64))
    assert torch.isinf(p.mean).all()
    assert (p.quantile(0.5) - math.e).abs().max() < 0.1


def test_crps_of_wide_counts_is_refused() -> None:
    x = torch.linspace(0, 1, 5, dtype=F64).unsqueeze(-1)
    net = built(lambda: nn.Linear(1, 1)).double()
    model = BayesianModel(net, priors.Normal(), likelihoods.NegativeBinomial(2.0), x, x * 4)
    with pytest.raises(ValueError, match="the CRPS of counts sums over"):
        metrics.crps(predict(model, torch.tensor([[0.0, 12.0]], dtype=F64)), model.y)


# ---------------------------------------- refusals

BAD: dict[str, tuple[Any, Tensor, int, str]] = {
    "negative count": (
        likelihoods.Poisson(),
        torch.tensor([1.0, -2.0]),
        1,
        "y in row 1 is -2: counts are the whole",
    ),
    "half a count": (
        likelihoods.NegativeBinomial(),
        torch.tensor([1.0, 2.0, 0.5]),
        1,
        "y in row 2 is 0.5",
    ),
    "count in a column": (
        likelihoods.Poisson(),
        torch.tensor([[1.0, 2.5]]),
        2,
        "y in row 0 is 2.5",
    ),
    "no positive number": (
        likelihoods.Gamma(),
        torch.tensor([1.0, 0.0]),
        1,
        "y in row 1 is 0: it must be positive",
    ),
    "no logarithm": (
        likelihoods.LogNormal(likelihoods.Gaussian()),
        torch.tensor([[1.0], [-2.0]]),
        1,
        "y in row 1 is -2: it must be positive",
    ),
    "scales of other targets": (
        likelihoods.Standardised(likelihoods.Gaussian(), 0.0, (1.0, 2.0)),
        torch.ones(3),
        1,
        "scale has 2 values, and y 1 targets",
    ),
    "targets of the base": (
        likelihoods.Standardised(likelihoods.Gaussian()),
        torch.ones(3, 2),
        1,
        r"\(n, 1\) for this network",
    ),
    "no level": (
        likelihoods.Levels((3, 4, 5)),
        torch.tensor([3.0, 4.5]),
        1,
        "y in row 1 is 4.5, none of the levels",
    ),
    "targets": (likelihoods.StudentT(), torch.zeros(3, 2), 1, r"\(n, 1\) for this network"),
    "outputs of ordinal": (likelihoods.Ordinal(3), torch.zeros(3), 2, "one output, got 2"),
    "label beyond": (
        likelihoods.Ordinal(3),
        torch.tensor([0, 3]),
        1,
        "label 3 in row 1 is not one of the classes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_targets_are_refused(name: str) -> None:
    likelihood, y, n_outputs, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        likelihood.validate(y, n_outputs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: likelihoods.StudentT(2.0), "df must be above 2"),
        (lambda: likelihoods.StudentT(math.inf), "df must be above 2 and finite, got inf"),
        (lambda: likelihoods.StudentT(4.0, -1.0), "scale must be positive"),
        (
            lambda: likelihoods.NegativeBinomial(0.0),
            "dispersion must be positive and finite, got 0.0",
        ),
        (lambda: likelihoods.Ordinal(2), "for two use Bernoulli"),
        (lambda: likelihoods.Levels((1,)), "two or more whole numbers"),
        (lambda: likelihoods.Levels((1, 3, 2)), "ascending order"),
        (lambda: likelihoods.Levels((1, 2.5, 3)), "whole numbers"),
        (lambda: likelihoods.Gamma(-1.0), "dispersion must be positive"),
        (lambda: likelihoods.Standardised(likelihoods.Poisson()), "continuous targets"),
        (lambda: likelihoods.Standardised(likelihoods.Categorical()), "continuous targets"),
        (
            lambda: likelihoods.Standardised(likelihoods.Gaussian(), scale=(1.0, 0.0)),
            "scale must be positive",
        ),
        (
            lambda: likelihoods.Standardised(likelihoods.Gaussian(), loc=math.nan),
            "loc must be finite",
        ),
        (
            lambda: likelihoods.LogNormal(likelihoods.StudentT()),
            "base must have normal noise",
        ),
    ],
)
def test_bad_settings_are_refused(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_learned_dispersion_has_no_fisher_factor() -> None:
    model = model_of("negative binomial learned")
    assert not model.likelihood.has_fisher_factor
    with pytest.raises(ValueError, match="NegativeBinomial has no fisher_factor"):
        model.at(points(model, 1)).grad_and_factor()
