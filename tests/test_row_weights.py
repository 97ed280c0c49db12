"""Rows that count more or less than once: whole weights are repeated rows, for everything."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.method import Method
from tests.problems import F64, built, normal, one_in

COUNTS = torch.tensor([1, 3, 2, 1, 1, 4, 2, 1, 1, 2, 1, 5], dtype=F64)
X = normal(len(COUNTS), 2, seed=1)
LINE = X.sum(1) + 0.3 * normal(len(COUNTS), seed=2)
KINDS = {
    "normal": (likelihoods.Gaussian(0.3), 1, LINE),
    "learned": (likelihoods.Gaussian(), 1, LINE),
    "two targets": (likelihoods.Gaussian(), 2, torch.stack([LINE, -LINE], 1)),
    "varying": (likelihoods.HeteroscedasticGaussian(), 2, LINE),
    "varying student": (likelihoods.HeteroscedasticStudentT(), 2, LINE),
    "standardised": (
        likelihoods.Standardised(likelihoods.Gaussian(), 100.0, 20.0),
        1,
        100 + 20 * LINE,
    ),
    "student": (likelihoods.StudentT(), 1, LINE),
    "log-normal": (likelihoods.LogNormal(likelihoods.Gaussian()), 1, LINE.exp()),
    "gamma": (likelihoods.Gamma(), 1, LINE.exp()),
    "counts": (likelihoods.Poisson(), 1, LINE.exp().round()),
    "overdispersed": (likelihoods.NegativeBinomial(), 1, LINE.exp().round()),
    "levels": (likelihoods.Levels((-1.0, 0.0, 1.0)), 1, LINE.clamp(-1, 1).round()),
    "two classes": (likelihoods.Bernoulli(), 1, (LINE > 0).long()),
    "classes": (likelihoods.Categorical(), 3, (LINE.clamp(-1, 1).round() + 1).long()),
    "ordered": (likelihoods.Ordinal(3), 1, (LINE.clamp(-1, 1).round() + 1).long()),
}


def pair(kind: str) -> tuple[bf.BayesianModel, bf.BayesianModel]:
    """Return a model of weighted rows, and the same of repeated ones."""
    likelihood, out, y = KINDS[kind]
    net = built(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, out)))
    rows = torch.arange(len(X)).repeat_interleave(COUNTS.long())
    weighted = bf.BayesianModel(net, priors.Normal(), likelihood, X, y, row_weights=COUNTS)
    repeated = bf.BayesianModel(net, priors.Normal(), likelihood, X[rows], y[rows])
    return weighted, repeated


@pytest.mark.parametrize("kind", KINDS)
def test_whole_weights_are_repeated_rows(kind: str) -> None:
    weighted, repeated = pair(kind)
    theta = 0.5 * normal(5, weighted.dim, seed=3)
    assert torch.allclose(weighted.log_joint(theta), repeated.log_joint(theta))
    for ours, theirs in zip(
        weighted.log_joint_and_grad(theta),
        repeated.log_joint_and_grad(theta),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)
    one = weighted.pointwise_log_likelihood(theta)
    each = repeated.pointwise_log_likelihood(theta)
    assert torch.allclose(one.repeat_interleave(COUNTS.long(), 1), each, rtol=1e-6)
    v, (a, b) = normal(5, weighted.dim, seed=4), (m.at(theta) for m in (weighted, repeated))
    if weighted.likelihood.has_fisher_factor:
        products = [at.grad_and_product()[1](v) for at in (a, b)]
        assert torch.allclose(*products, rtol=1e-6)
        factors = [at.grad_and_factor()[1] for at in (a, b)]
        assert torch.allclose(*(f.mT @ f for f in factors), rtol=1e-6, atol=1e-8)
        slopes = [at.slope(v) for at in (a, b)]
        assert slopes[0] is not None
        assert torch.allclose(*slopes, rtol=1e-6, atol=1e-8)
    hessians = [at.grad_and_hessian() for at in (a, b)]
    assert torch.allclose(hessians[0][1], hessians[1][1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", one_in(3, KINDS))
def test_mini_batches_of_weighted_rows_are_unbiased(kind: str) -> None:
    weighted, _ = pair(kind)
    theta = 0.5 * normal(2, weighted.dim, seed=3)
    rows = torch.arange(len(X)).reshape(-1, 1)
    parts = [weighted.log_likelihood_and_grad(theta, row) for row in rows]
    whole = weighted.log_likelihood_and_grad(theta)
    for i in range(2):
        mean = torch.stack([part[i] for part in parts]).mean(0)
        assert torch.allclose(mean, whole[i], rtol=1e-6, atol=1e-8)
    own = rows[:2].expand(2, -1)  # for each network its own
    by_two = weighted.log_likelihood_and_grad(theta, own)[1]
    assert torch.allclose(by_two[0], parts[0][1][0])
    assert torch.allclose(by_two[1], parts[1][1][1])


def gaussian() -> tuple[bf.BayesianModel, bf.BayesianModel]:
    """Return a linear model of weighted rows, and the same of repeated ones."""
    net = built(lambda: nn.Linear(2, 1))
    rows = torch.arange(len(X)).repeat_interleave(COUNTS.long())
    given = net, priors.Normal(), likelihoods.Gaussian(0.3)
    return (
        bf.BayesianModel(*given, X, LINE, row_weights=COUNTS),
        bf.BayesianModel(*given, X[rows], LINE[rows]),
    )


@pytest.mark.parametrize(
    "method", [bf.Laplace(), bf.HMC(), bf.MCLMC(), bf.SMC(particles=500), bf.VI()]
)
def test_methods_find_the_posterior_of_repeated_rows(method: Method) -> None:
    weighted, repeated = gaussian()
    exact = bf.sample(repeated, bf.Laplace(), draws=10, seed=0).posterior
    draws = bf.sample(weighted, method, seed=0, progress=False)
    weights = torch.ones(len(draws.flat), dtype=F64)
    if draws.log_weights is not None:
        weights = draws.log_weights.flatten().exp()
    mean = (weights[:, None] * draws.flat).sum(0) / weights.sum()
    assert bool(((mean - exact.loc).abs() < 0.15 * exact.sample(2000, 1).std(0)).all())


def test_the_evidence_is_that_of_repeated_rows() -> None:
    ours, theirs = (bf.sample(m, bf.Laplace(), draws=10, seed=0) for m in gaussian())
    assert ours.log_evidence[0] == pytest.approx(theirs.log_evidence[0], abs=1e-6)


def test_weights_stay_with_their_rows() -> None:
    weighted, _ = pair("learned")
    theta = normal(3, weighted.dim, seed=3)
    rows = torch.tensor([5, 1, 1])
    part = weighted.subset(rows)
    assert part.row_weights.tolist() == [4, 3, 3]
    found = weighted.pointwise_log_likelihood(theta)[:, rows] @ COUNTS[rows]
    assert torch.allclose(part.log_likelihood(theta), found)
    more = weighted.extended(X[:2], LINE[:2], row_weights=[0.5, 0.25])
    assert more.row_weights.tolist() == [*COUNTS.tolist(), 0.5, 0.25]
    assert weighted.extended(X[:1], LINE[:1]).row_weights[-1] == 1
    assert pair("learned")[1].extended(X[:1], LINE[:1]).row_weights is None
    single = weighted.to(dtype=torch.float32)
    assert torch.allclose(
        single.log_joint(theta.float()), weighted.log_joint(theta), rtol=1e-4
    )
    values = weighted.linearised(theta[0]).log_joint(theta[:1])
    assert torch.allclose(values, weighted.log_joint(theta[:1]))


def test_weights_are_part_of_what_a_model_is() -> None:
    weighted, _ = pair("normal")
    likelihood, _, y = KINDS["normal"]
    plain = bf.BayesianModel(weighted.net, priors.Normal(), likelihood, X, y)
    other = bf.BayesianModel(
        weighted.net, priors.Normal(), likelihood, X, y, row_weights=COUNTS.flip(0)
    )
    assert len({m.fingerprint() for m in (weighted, plain, other)}) == 3
    draws = bf.sample(weighted, bf.HMC(), chains=2, warmup=20, draws=20, seed=0)
    weighted.check_draws(draws)
    with pytest.raises(ValueError, match="draws of another model"):
        plain.check_draws(draws)
    theirs = bf.sample(other, bf.HMC(), chains=2, warmup=20, draws=20, seed=0)
    with pytest.raises(ValueError, match="weigh their rows differently"):
        bf.compare({"a": (weighted, draws), "b": (other, theirs)})


def test_a_row_is_left_out_with_all_its_copies() -> None:
    """By weights, and by draws without the row."""
    weighted, _ = gaussian()
    draws = bf.sample(weighted, bf.HMC(), chains=4, warmup=200, draws=1000, seed=0)
    elpd = bf.compare({"a": (weighted, draws)}, progress=False).scores["a"].pointwise
    exact = []
    for row in range(len(X)):
        rest = torch.arange(len(X)) != row
        part = weighted.subset(rest.nonzero().squeeze(1))
        at = bf.sample(part, bf.Laplace(), draws=2000, seed=0)
        exact.append(
            float(bf.predict(part, at, X[row : row + 1]).log_prob(LINE[row : row + 1]))
        )
    assert torch.allclose(elpd, torch.tensor(exact, dtype=F64), atol=0.25)


def test_updates_see_changed_weights() -> None:
    weighted, repeated = gaussian()
    before = bf.BayesianModel(
        weighted.net, priors.Normal(), likelihoods.Gaussian(0.3), X, LINE
    )
    draws = bf.sample(before, bf.HMC(), chains=4, warmup=200, draws=500, seed=0)
    moved = bf.update(weighted, draws, before, seed=0, progress=False)
    exact = bf.sample(repeated, bf.Laplace(), draws=10, seed=0).posterior
    weights = moved.log_weights.flatten().double().softmax(0)
    mean = (weights[:, None] * moved.flat).sum(0)
    assert bool(((mean - exact.loc).abs() < 0.25 * exact.sample(2000, 1).std(0)).all())


def test_diagnosis_and_report_count_rows_as_often(tmp_path) -> None:
    weights = torch.rand(80, generator=torch.Generator().manual_seed(0)).double() + 0.2
    x = normal(80, 2, seed=5)
    y = x.sum(1) + 0.3 * normal(80, seed=6)
    net = built(lambda: nn.Linear(2, 1))
    model = bf.BayesianModel(
        net, priors.Normal(), likelihoods.Gaussian(), x, y, row_weights=weights
    )
    rows = model.some_rows(1000)
    kish = float(weights.sum()) ** 2 / float(weights.square().sum())
    assert len(rows) == math.floor(kish + 1e-9)
    draws = bf.sample(model, bf.HMC(), chains=4, warmup=200, draws=250, seed=0)
    found = bf.diagnose(model, draws)
    assert found.verdict == "trust", str(found)
    assert "May the predictions" in bf.report(model, draws, path=None).html()
    pyro = bf.sample(model, bf.PyroNUTS(), chains=1, warmup=50, draws=100, seed=0)
    gap = (pyro.flat.mean(0) - draws.flat.mean(0)).abs()
    assert bool((gap < 0.5 * draws.flat.std(0)).all())


def test_what_sees_no_weights_says_so() -> None:
    weighted, _ = pair("normal")
    with pytest.raises(ValueError, match="'kronecker' takes no row_weights"):
        bf.sample(weighted, bf.Laplace("kronecker"))
    draws = bf.sample(weighted, bf.HMC(), chains=2, warmup=10, draws=10, seed=0)
    exported = bf.to_arviz(weighted, draws)
    assert exported["constant_data"]["row_weights"].values.tolist() == COUNTS.tolist()


def test_weights_are_those_that_were_given() -> None:
    """What a caller does to them later changes nothing, and ones are no weights."""
    likelihood, _, y = KINDS["normal"]
    given = COUNTS.clone()
    net = built(lambda: nn.Linear(2, 1))
    model = bf.BayesianModel(net, priors.Normal(), likelihood, X, y, row_weights=given)
    before = model.fingerprint()
    given.mul_(2)
    model.row_weights.mul_(2)
    assert model.row_weights.tolist() == COUNTS.tolist()
    assert model.fingerprint() == before
    ones, none = (
        bf.BayesianModel(net, priors.Normal(), likelihood, X, y, row_weights=weights)
        for weights in (np.ones(len(X), int), None)
    )
    assert ones.row_weights is None
    assert ones.fingerprint() == none.fingerprint()
    with pytest.raises(
        ValueError, match=r"numbers that torch.float32 holds, got .* to 1e\+300"
    ):
        bf.BayesianModel(
            net.float(),
            priors.Normal(),
            likelihood,
            X,
            y,
            row_weights=np.r_[1e300, COUNTS[1:].numpy()],
        )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3), r"row_weights must be \(12,\), got \(3,\)"),
        (-np.ones(12), "row_weights must be positive, got -1"),
        (np.r_[np.ones(11), 0], "row_weights must be positive, got 0"),
        (np.r_[np.ones(11), np.nan], "row_weights"),
        (np.ones((12, 1)), r"row_weights must be \(12,\)"),
    ],
)
def test_what_weighs_nothing_is_refused(weights: np.ndarray, message: str) -> None:
    likelihood, _, y = KINDS["normal"]
    net = built(lambda: nn.Linear(2, 1))
    with pytest.raises(ValueError, match=message):
        bf.BayesianModel(net, priors.Normal(), likelihood, X, y, row_weights=weights)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "gamma"]
)  # has no compiled code
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_code_weighs_rows_as_torch_does(kind: str, dtype: torch.dtype) -> None:
    """Of more rows than a vector has lanes, with all of them and with mini-batches."""
    likelihood, out, _ = KINDS[kind]
    net = built(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, out)))
    times = torch.arange(37) % len(X)
    weights = torch.rand(37, generator=torch.Generator().manual_seed(0)) + 0.2
    model = bf.BayesianModel(
        net.to(dtype),
        priors.Normal(),
        likelihood,
        X[times].to(dtype),
        KINDS[kind][2][times],
        row_weights=weights,
    )
    assert model.is_compiled
    theta = 0.5 * normal(3, model.dim, seed=3).to(dtype)
    for rows in (None, torch.tensor([4, 36, 4, 11]), torch.arange(30).reshape(3, 10)):
        compiled = model.log_joint_and_grad(theta, rows)
        followed = model.log_joint_and_grad(theta.clone().requires_grad_(), rows)
        tolerance = 1e-9 if dtype == torch.float64 else 2e-4
        if (
            rows is None or kind != "log-normal"
        ):  # whose slope is known as a mean over rows only
            assert torch.allclose(compiled[0], followed[0], rtol=tolerance)
        assert torch.allclose(compiled[1], followed[1], rtol=tolerance, atol=tolerance)
