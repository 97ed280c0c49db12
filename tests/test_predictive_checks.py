"""Laws of the test of calibration: exact where the posterior is, and able to see what is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import likelihoods
from bnnflow.predictive import calibration_check, predict, stacked
from tests.problems import F64, built

N, TEST = 8, 40


def line(likelihood: likelihoods.Likelihood, x: Tensor, y: Tensor) -> bf.BayesianModel:
    return bf.BayesianModel(
        built(lambda: nn.Linear(2, 1)), bf.priors.Normal(1.0), likelihood, x, y
    )


def conjugate(
    seed: int, noise: float = 0.5
) -> tuple[bf.BayesianModel, Tensor, Tensor, Tensor]:
    """Return a model of rows that its prior made, exact draws, and rows that it has not seen."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N + TEST, 2, generator=g, dtype=F64)
    design = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
    theta = torch.randn(3, generator=g, dtype=F64)
    y = design @ theta + noise * torch.randn(len(x), generator=g, dtype=F64)
    precision = torch.eye(3, dtype=F64) + design[:N].T @ design[:N] / noise**2
    mean = torch.linalg.solve(precision, design[:N].T @ y[:N] / noise**2)
    root = torch.linalg.cholesky(torch.linalg.inv(precision))
    draws = mean + torch.randn(300, 3, generator=g, dtype=F64) @ root.T
    return line(likelihoods.Gaussian(noise), x[:N], y[:N]), draws, x[N:], y[N:]


def test_p_values_are_uniform_under_the_posterior() -> None:
    """With eight rows for three weights, whose predictions miss together."""
    p = []
    for seed in range(100):
        model, draws, x, y = conjugate(seed)
        found = calibration_check(predict(model, draws, x), y, replicates=59, seed=seed)
        p.append([found.p_value, found.p_values["mean PIT"]])
    for each in np.array(p).T:
        assert stats.kstest(each, "uniform").pvalue > 1e-3
    assert np.mean(np.array(p)[:, 0] <= 0.05) <= 0.12


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_noise_of_another_size_is_seen(factor: float) -> None:
    model, draws, x, y = conjugate(0)
    mean = predict(model, draws, x).mean
    wrong = mean + factor * (y - mean)
    found = calibration_check(predict(model, draws, x), wrong)
    assert found.p_value < 0.05
    name = "inside 50%"
    assert (found.found[name] < found.low[name]) == (factor > 1)


def test_counts_and_classes_are_looked_at() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(120, 2, generator=g, dtype=F64)
    rate = (0.5 * x[:, 0] + 1).exp()
    counts = torch.poisson(rate, generator=g)
    truth = torch.tensor([[0.5, 0.0, 1.0]], dtype=F64).expand(50, 3)
    model = line(likelihoods.Poisson(), x, counts)
    assert calibration_check(predict(model, truth, x), counts).p_value > 0.01
    assert calibration_check(predict(model, truth, x), counts * 2).p_value < 0.02
    p = torch.sigmoid(0.5 * x[:, 0] + 1)
    labels = (torch.rand(120, generator=g, dtype=F64) < p).long()
    model = line(likelihoods.Bernoulli(), x, labels)
    found = calibration_check(predict(model, truth, x), labels)
    assert found.p_value > 0.01
    assert found.rows == 120
    assert found.found["log probability"] == pytest.approx(
        float(torch.where(labels == 1, p, 1 - p).log().mean())
    )
    sure = truth.clone() * math.log(1e3)
    assert calibration_check(predict(model, sure, x), labels).p_value < 0.02


def test_a_stacked_prediction_can_be_checked_whatever_its_rows() -> None:
    model, draws, x, y = conjugate(0)
    many, seen = x.repeat(15, 1), y.repeat(15)
    parts = [predict(model, draws[:50], many), predict(model, draws[50:], many)]
    both = stacked(parts, torch.tensor([0.5, 0.5]))
    assert calibration_check(both, seen, replicates=20).rows == 500
    part, rows = both.subset(torch.tensor([3, 1])), [3, 1]
    assert torch.allclose(part.mean, both.mean[rows])
    for each in (both, parts[0]):
        assert each._repr_html_().count("<tr>") == 6
