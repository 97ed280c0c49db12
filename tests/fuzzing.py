"""Every public callable with a base call, and the malformed values that the fuzzer puts in place of
its arguments.

An outcome is one of `OUTCOMES`. Those that are right: the call returned what the clean call returns
("equal"), a value of the right kind gave another result ("valid"), or the error names the argument
("clear"). Never right are a wrong result ("silent"), and an error for another form of a right value
("refused").
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import inspect
import io
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor, nn

import bnnflow as bf
from bnnflow import (
    comparison,
    data,
    equivariant,
    likelihoods,
    predictive,
    priors,
    symmetry,
    transport,
)
from bnnflow import inference as methods
from bnnflow.transport import Solver

OUTCOMES = ("equal", "valid", "clear", "obscure", "other", "silent", "refused")
ROWS, DIM = 8, 13


class Call(NamedTuple):
    """A public callable with arguments that it takes."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]


class World:
    """One tiny problem of each kind, and all that is made from it."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
            self.relu = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
            self.classifier = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        self.x = self.normal(ROWS, 2)
        self.y = self.x.sum(1)
        self.labels = torch.tensor([0, 1] * (ROWS // 2))
        prior = priors.Normal(1.0)
        self.model = bf.BayesianModel(
            self.net, prior, likelihoods.Gaussian(0.5), self.x, self.y
        )
        self.classes = bf.BayesianModel(
            self.classifier, prior, likelihoods.Categorical(), self.x, self.labels
        )
        self.spec, self.relu_spec = self.model.spec, bf.WeightSpec.of(self.relu)
        self.theta = self.model.sample_prior(12, 0)
        theta = self.theta.reshape(2, 6, DIM)
        self.draws = bf.Draws(theta, self.model.log_joint(theta), info={"method": "HMC"})
        self.prediction = bf.predict(self.model, self.draws, self.x)
        class_draws = self.classes.sample_prior(12, 0).reshape(2, 6, -1)
        self.class_prediction = bf.predict(self.classes, class_draws, self.x)
        self.field = self.built(
            lambda: transport.WeightsVelocity(self.spec, width=2, depth=1)
        )
        self.flow = transport.Flow.of(self.field, self.model, solver=Solver(steps=2))
        self.source = self.flow.source
        self.folder = Path(tempfile.mkdtemp())
        self.draws.save(self.folder / "draws.npz")
        self.flow.save(self.folder / "flow.npz")
        spheres = symmetry.Spheres(self.relu_spec)
        tangent = self.built(
            lambda: transport.TangentVelocity(self.relu_spec, width=2, depth=1)
        )
        self.manifold = transport.ManifoldFlow(
            tangent.eval(), spheres, solver=Solver(steps=2)
        )
        self.completed = self.manifold.complete(self.normal(9, DIM))

    @staticmethod
    def built(make: Callable[[], Any]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return make()

    @staticmethod
    def normal(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def loss(self, theta: Tensor) -> Tensor:
        return -self.model.log_joint(theta)

    def decay(self, t: Tensor, x: Tensor) -> Tensor:
        return -x

    def pairs(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(2, n, DIM, generator=generator)
        return x[0], x[1]


def calls(w: World) -> Iterator[Call]:
    """Yield a base call of everything public."""
    yield from _data_and_models(w)
    yield from _sampling(w)
    yield from _networks(w)
    yield from _transport(w)


def _data_and_models(w: World) -> Iterator[Call]:
    x, y, theta, model, spec = w.x, w.y, w.theta, w.model, w.spec
    yield Call(
        "data.load",
        data.load,
        {"name": "iris", "split": 0, "folder": None, "test_fraction": 0.2, "seed": 0},
    )
    yield Call(
        "data.load_images",
        data.load_images,
        {"name": "digits", "folder": None, "test_fraction": 0.2, "seed": 0},
    )
    yield Call("data.gap_function", data.gap_function, {"x": x[:, 0]})
    yield Call(
        "data.gap_regression",
        data.gap_regression,
        {"seed": 0, "n": 10, "noise": 0.1, "n_test": 5},
    )
    yield Call("data.standardise", data.standardise, {"train": x})
    yield Call("data.Standardiser", data.Standardiser, {"mean": x.mean(0), "sd": x.std(0)})
    scaler = data.Standardiser.fit(x)
    yield Call("data.Standardiser.fit", data.Standardiser.fit, {"rows": x})
    yield Call("data.Standardiser.transform", scaler.transform, {"rows": x})
    yield Call("data.Standardiser.inverse", scaler.inverse, {"rows": x})
    given = {
        "net": w.net,
        "prior": priors.Normal(1.0),
        "likelihood": likelihoods.Gaussian(0.5),
        "x": x,
        "y": y,
    }
    yield Call("BayesianModel", bf.BayesianModel, given | {"temperature": 1.0})
    given = {
        "net": w.classifier,
        "prior": priors.Normal(1.0),
        "likelihood": likelihoods.Categorical(),
        "x": x,
    }
    yield Call("BayesianModel of classes", bf.BayesianModel, given | {"y": w.labels})
    one = {"net": w.net, "prior": priors.Normal(1.0), "x": x}
    yield Call(
        "BayesianModel of two",
        bf.BayesianModel,
        one | {"likelihood": likelihoods.Bernoulli(), "y": w.labels},
    )
    yield Call(
        "BayesianModel of counts",
        bf.BayesianModel,
        one | {"likelihood": likelihoods.Poisson(), "y": w.labels},
    )
    yield Call("BayesianModel.to", model.to, {"device": "cpu", "dtype": torch.float64})
    yield Call("BayesianModel.linearised", model.linearised, {"theta": theta[0]})
    yield Call("BayesianModel.outputs", model.outputs, {"theta": theta, "x": x})
    for name in ("log_prior", "log_likelihood", "log_joint", "network_at"):
        yield Call(f"BayesianModel.{name}", getattr(model, name), {"theta": theta[0]})
    for name in ("log_likelihood_and_grad", "log_likelihood_grad", "log_joint_and_grad"):
        yield Call(f"BayesianModel.{name}", getattr(model, name), {"theta": theta})
    yield Call("BayesianModel.subset", model.subset, {"rows": torch.arange(3)})
    yield Call("BayesianModel.extended", model.extended, {"x": w.x, "y": w.y})
    yield Call("BayesianModel.transported", model.transported, {"flow": w.flow})
    yield Call("BayesianModel.at", model.at, {"theta": theta})
    given = {"theta": theta, "x": x, "y": y}
    yield Call(
        "BayesianModel.pointwise_log_likelihood", model.pointwise_log_likelihood, given
    )
    yield Call("BayesianModel.sample_prior", model.sample_prior, {"n": 3, "seed": 0})
    yield Call("BayesianModel.theta_of", model.theta_of, {"net": w.net})
    yield Call("WeightSpec.of", bf.WeightSpec.of, {"net": w.net})
    yield Call("WeightSpec.unlabelled", bf.WeightSpec.unlabelled, {"net": w.net})
    yield Call("WeightSpec.extend", spec.extend, {"extras": {"scale": (1,)}})
    yield Call("WeightSpec.unflatten", spec.unflatten, {"theta": theta})
    yield Call("WeightSpec.flatten", spec.flatten, {"params": spec.unflatten(theta)})
    yield Call(
        "WeightSpec.permute",
        spec.permute,
        {"theta": theta, "perms": {"h1": torch.tensor([2, 0, 1])}},
    )
    yield Call(
        "WeightSpec.flip",
        spec.flip,
        {"theta": theta, "signs": {"h1": torch.tensor([1.0, -1.0, 1.0])}},
    )
    scales = {"h1": torch.tensor([2.0, 1.0, 0.5])}
    yield Call(
        "WeightSpec.rescale", w.relu_spec.rescale, {"theta": theta, "scales": scales}
    )
    yield Call("priors.Normal.symmetries", priors.Normal(1.0).symmetries, {"spec": spec})
    yield Call(
        "WeightSpec.random_symmetry",
        spec.random_symmetry,
        {"theta": theta, "seed": 0, "group": None},
    )
    yield Call("WeightSpec.unit_axes", spec.unit_axes, {"name": "0.weight"})
    yield Call("WeightSpec.scale_exponents", spec.scale_exponents, {"name": "0.weight"})
    yield Call("likelihoods.Gaussian", likelihoods.Gaussian, {"scale": 0.1})
    yield Call(
        "likelihoods.HeteroscedasticGaussian",
        likelihoods.HeteroscedasticGaussian,
        {"min_scale": 1e-3},
    )
    yield Call(
        "likelihoods.HeteroscedasticStudentT",
        likelihoods.HeteroscedasticStudentT,
        {"df": 4.0, "min_scale": 1e-3},
    )
    yield Call("likelihoods.StudentT", likelihoods.StudentT, {"df": 4.0, "scale": 0.1})
    yield Call(
        "likelihoods.NegativeBinomial", likelihoods.NegativeBinomial, {"dispersion": 0.5}
    )
    yield Call("likelihoods.Ordinal", likelihoods.Ordinal, {"n_classes": 3})
    yield Call("likelihoods.Gamma", likelihoods.Gamma, {"dispersion": 0.5})
    yield Call("likelihoods.Levels", likelihoods.Levels, {"levels": (1, 2, 4)})
    yield Call(
        "likelihoods.Standardised",
        likelihoods.Standardised,
        {"base": likelihoods.Gaussian(0.5), "loc": 1.0, "scale": 2.0},
    )
    yield Call(
        "likelihoods.LogNormal", likelihoods.LogNormal, {"base": likelihoods.Gaussian(0.5)}
    )
    yield Call("priors.Normal", priors.Normal, {"scale": 1.0, "loc": 0.0})
    yield Call("priors.Laplace", priors.Laplace, {"scale": 1.0, "loc": 0.0})
    yield Call("priors.StudentT", priors.StudentT, {"df": 4.0, "scale": 1.0, "loc": 0.0})
    yield Call("priors.FanIn", priors.FanIn, {"scale": 1.0, "bias_scale": 1.0})
    yield Call(
        "priors.Independent",
        priors.Independent,
        {"distribution": torch.distributions.Normal(0.0, 1.0)},
    )
    by_name = {"0.weight": torch.distributions.Normal(0.0, 1.0)}
    default = torch.distributions.Normal(0.0, 2.0)
    yield Call(
        "priors.PerTensor", priors.PerTensor, {"by_name": by_name, "default": default}
    )
    yield Call("priors.Hierarchical", priors.Hierarchical, {"fan_in": True})
    horseshoe = {
        "global_scale": 0.1,
        "slab_scale": 1.0,
        "slab_df": 4.0,
        "local": "unit",
        "bias_scale": 1.0,
    }
    yield Call("priors.Horseshoe", priors.Horseshoe, horseshoe)
    yield Call("priors.OutputScales", priors.OutputScales, {"scale": 1.0})
    empirical = {
        "weights": theta,
        "per": "tensor",
        "zero_mean": True,
        "min_scale": 1e-3,
        "extras": 0,
    }
    yield Call("priors.Empirical", priors.Empirical, empirical)
    yield Call(
        "priors.as_prior", priors.as_prior, {"prior": torch.distributions.Normal(0.0, 1.0)}
    )


def _sampling(w: World) -> Iterator[Call]:
    model, draws, theta, x, y = w.model, w.draws, w.theta, w.x, w.y
    for name in (
        "HMC",
        "MCLMC",
        "SGHMC",
        "SGLD",
        "SGNHT",
        "SMC",
        "SWAG",
        "VI",
        "AdjustedMCLMC",
        "DeepEnsemble",
        "Laplace",
        "MCDropout",
        "NormalizingFlowVI",
        "ParallelTempering",
        "PyroNUTS",
        "Cyclical",
        "Polynomial",
    ):
        method = getattr(methods, name)
        defaults = {f.name: getattr(method(), f.name) for f in dataclasses.fields(method)}
        yield Call(name, method, defaults)
    some = {
        "chains": 2,
        "warmup": 2,
        "draws": 3,
        "seed": 0,
        "init": None,
        "device": "cpu",
        "dtype": torch.float32,
    }
    some |= {"checkpoint": None, "progress": False}
    yield Call(
        "sample", bf.sample, {"model": model, "method": bf.HMC(max_leapfrog=2)} | some
    )
    start = {
        "model": model,
        "method": bf.HMC(max_leapfrog=2),
        "chains": 2,
        "warmup": 2,
        "draws": 3,
        "init": theta[:2],
    }
    yield Call("sample from weights", bf.sample, start | {"progress": False})
    smc = bf.SMC(particles=10, moves=1, max_leapfrog=2)
    yield Call(
        "evidence",
        bf.evidence,
        {"draws": draws, "model": model, "smc": smc, "seed": 0, "progress": False},
    )
    few = {
        "theta": draws.theta,
        "log_joint": draws.log_joint,
        "log_weights": torch.zeros(2, 6, dtype=torch.float64),
    }
    few |= {
        "stats": {"energy": torch.zeros(2, 6)},
        "log_evidence": (0.0, 1.0),
        "posterior": None,
        "info": {},
    }
    yield Call("Draws", bf.Draws, few)
    yield Call("Draws.with_theta", draws.with_theta, {"theta": draws.theta})
    yield Call("Draws.save", draws.save, {"path": w.folder / "saved.npz"})
    yield Call("Draws.load", bf.Draws.load, {"path": w.folder / "draws.npz"})
    yield Call("load", bf.load, {"path": w.folder / "flow.npz", "model": model})
    yield Call("Gaussian", bf.Gaussian, {"loc": torch.zeros(3), "scale_tril": torch.eye(3)})
    yield Call("Gaussian.fit", bf.Gaussian.fit, {"theta": theta, "shrinkage": 0.1})
    normal = bf.Gaussian(torch.zeros(3), torch.eye(3))
    yield Call("Gaussian.sample", normal.sample, {"n": 3, "seed": 0})
    yield Call("Gaussian.log_prob", normal.log_prob, {"theta": torch.ones(2, 3)})
    given = {"model": model, "draws": draws, "x": x, "chunk_size": 2}
    yield Call("predict", bf.predict, given)
    yield Call("predict of weights", bf.predict, given | {"draws": theta})
    weighted = (theta, torch.linspace(-1, 0, 12))
    yield Call("predict of weighted draws", bf.predict, given | {"draws": weighted})
    for name in ("lppd", "rmse", "crps", "rowwise"):
        metric = getattr(predictive.metrics, name)
        yield Call(f"metrics.{name}", metric, {"prediction": w.prediction, "y": y})
    yield Call(
        "metrics.pit",
        predictive.metrics.pit,
        {"prediction": w.prediction, "y": y, "seed": 0},
    )
    yield Call(
        "metrics.coverage",
        predictive.metrics.coverage,
        {"prediction": w.prediction, "y": y, "level": 0.9},
    )
    labelled = {"prediction": w.class_prediction, "y": w.labels}
    for name in ("accuracy", "brier"):
        yield Call(f"metrics.{name}", getattr(predictive.metrics, name), labelled)
    for name in ("ece", "reliability"):
        yield Call(
            f"metrics.{name}", getattr(predictive.metrics, name), labelled | {"bins": 3}
        )
    for name in ("log_prob", "cdf", "targets"):
        yield Call(f"Prediction.{name}", getattr(w.prediction, name), {"y": y})
    yield Call("Prediction.quantile", w.prediction.quantile, {"q": 0.9})
    yield Call("Prediction.quantile of several", w.prediction.quantile, {"q": [0.1, 0.9]})
    yield Call("Prediction.interval", w.prediction.interval, {"level": 0.9})
    yield Call("Prediction.sample", w.prediction.sample, {"n": 3, "seed": 0})
    yield Call("diagnose", bf.diagnose, {"draws": draws, "model": model, "x": x, "y": y})
    checked = {"prediction": w.prediction, "y": y, "replicates": 20, "seed": 0}
    yield Call("calibration_check", predictive.calibration_check, checked)

    def means(prediction: bf.predictive.Prediction, y: torch.Tensor, generator: Any) -> Any:
        return {"mean": y.flatten(1).mean(1)}

    yield Call(
        "predictive_check", predictive.predictive_check, checked | {"statistics": means}
    )
    both = {"draws": draws, "model": model, "x": x, "superchains": 2, "reference": theta[0]}
    yield Call("weight_convergence", bf.weight_convergence, both)
    exported = {"draws": draws, "model": model, "x": x, "y": y, "seed": 0}
    yield Call(
        "to_arviz", bf.to_arviz, exported | {"aligned": True, "coords": {"h1": [3, 1, 2]}}
    )
    yield Call("summary", bf.summary, {"draws": draws, "model": model, "aligned": True})
    parts = [w.prediction, bf.predict(model, theta[:3], x)]
    shares = torch.tensor([0.3, 0.7])
    yield Call("stacked", predictive.stacked, {"predictions": parts, "weights": shares})
    flat = w.class_prediction.theta.reshape(2, 6, -1)
    of_classes = bf.Draws(flat, w.classes.log_joint(flat), info={"method": "HMC"})
    calibrated = {"model": w.classes, "draws": of_classes}
    yield Call("calibrate", predictive.calibrate, calibrated)
    densities = {"log_densities": w.normal(ROWS, 2)}
    yield Call("stacking", comparison.stacking, densities)
    yield Call("pseudo_bma", comparison.pseudo_bma, densities | {"seed": 0})
    compared = {"models": {"a": (model, draws)}, "margin": 4.0, "seed": 0}
    yield Call("compare", bf.compare, compared | {"refits": 0, "progress": False})
    few = bf.SMC(particles=10, moves=1, max_leapfrog=2)
    mixed = {"model": model, "prior": w.flow, "share": 0.4, "smc": few, "seed": 0}
    yield Call("mix_priors", bf.mix_priors, mixed | {"progress": False})
    surprise = {"draws": 20, "replicates": 9, "seed": 0}
    yield Call(
        "predictive.prior_p_value",
        bf.predictive.prior_p_value,
        {"model": model} | surprise,
    )
    yield Call("compare by folds", bf.compare, compared | {"folds": 2, "refit": None})
    report = {
        "results": {"HMC": draws},
        "model": model,
        "x_test": x,
        "y_test": y,
        "path": None,
        "title": "A",
    }
    report |= {"targets": ["a"], "seconds": {"HMC": 1.0}}
    yield Call("report", bf.report.report, report)


def _networks(w: World) -> Iterator[Call]:
    model, draws, theta, spec, relu = w.model, w.draws, w.theta, w.spec, w.relu_spec
    yield Call(
        "align",
        bf.align,
        {"draws": draws, "model": model, "rounds": 1, "method": "weights"},
    )
    yield Call(
        "align to weights",
        bf.align,
        {"draws": theta, "model": model, "reference": theta[0]},
    )
    yield Call(
        "symmetry.frechet_mean",
        symmetry.frechet_mean,
        {"theta": theta, "spec": spec, "rounds": 1},
    )
    yield Call(
        "symmetry.sort_units",
        symmetry.sort_units,
        {"theta": theta, "spec": spec, "group": None},
    )
    yield Call(
        "symmetry.normalise_scale", symmetry.normalise_scale, {"theta": theta, "spec": relu}
    )
    yield Call(
        "symmetry.normalise_sign", symmetry.normalise_sign, {"theta": theta, "spec": spec}
    )
    pair = {"theta_a": theta[0], "theta_b": theta[1], "loss": w.loss}
    yield Call("symmetry.barrier", symmetry.barrier, pair | {"points": 3})
    curve = symmetry.Geodesic(theta[0], theta[1], relu)
    yield Call(
        "symmetry.Geodesic",
        symmetry.Geodesic,
        {"theta_a": theta[0], "theta_b": theta[1], "spec": relu},
    )
    yield Call("symmetry.Geodesic.at", curve.at, {"t": torch.tensor([0.0, 0.5])})
    yield Call("symmetry.Curve", symmetry.Curve, {"control": theta[:3], "kind": "bezier"})
    yield Call(
        "symmetry.Curve.at", symmetry.Curve(theta[:3]).at, {"t": torch.tensor([0.0, 0.5])}
    )
    yield Call(
        "symmetry.barrier_along",
        symmetry.barrier_along,
        {"path": curve, "loss": w.loss, "points": 3},
    )
    fit = {
        "kind": "bezier",
        "bends": 1,
        "steps": 2,
        "learning_rate": 0.1,
        "samples": 2,
        "seed": 0,
        "progress": False,
    }
    yield Call("symmetry.fit_curve", symmetry.fit_curve, pair | fit)
    yield Call(
        "symmetry.loss_plane",
        symmetry.loss_plane,
        pair | {"theta_c": theta[2], "points": 3, "margin": 0.2},
    )
    one = {"theta": theta, "spec": spec, "reference": theta[0]}
    yield Call("symmetry.match", symmetry.match, one | {"sweeps": 1})
    yield Call("symmetry.match_activations", symmetry.match_activations, one | {"x": w.x})
    steps = {
        "steps": 2,
        "learning_rate": 0.1,
        "temperature": 1.0,
        "iterations": 2,
        "seed": 0,
    }
    yield Call("symmetry.sinkhorn_rebasin", symmetry.sinkhorn_rebasin, one | steps)
    yield Call("symmetry.Spheres", symmetry.Spheres, {"spec": relu})
    spheres = symmetry.Spheres(relu)
    yield Call("symmetry.Spheres.project", spheres.project, {"theta": theta})
    yield Call("symmetry.Spheres.sample", spheres.sample, {"n": 3, "seed": 0})
    sizes = {"spec": spec, "in_features": 1, "out_features": 2}
    yield Call("equivariant.DWSLayer", equivariant.DWSLayer, sizes | {"bias": True})
    yield Call("equivariant.DWSInvariant", equivariant.DWSInvariant, sizes | {"bias": True})
    net = sizes | {"width": 4, "depth": 1, "time": False, "heads": 1}
    yield Call("equivariant.SignedDWSNet", equivariant.SignedDWSNet, net)
    wired = sizes | {
        "width": 4,
        "depth": 1,
        "time": False,
        "invariant": False,
        "context": 0,
    }
    yield Call(
        "equivariant.DWSNet",
        equivariant.DWSNet,
        wired | {"wiring": equivariant.Wiring(heads=1)},
    )
    wiring = {"heads": 1, "edge_width": 4, "frequency": 1.0, "shared": False}
    yield Call("equivariant.Wiring", equivariant.Wiring, wiring)
    yield Call(
        "equivariant.GraphNet",
        equivariant.GraphNet,
        net | {"invariant": False, "context": 0},
    )
    yield Call("equivariant.TensorScaler", equivariant.TensorScaler, {"spec": spec})
    yield Call(
        "equivariant.TensorScaler.fit",
        equivariant.TensorScaler.fit,
        {"theta": theta, "spec": spec},
    )
    siren = {"in_features": 2, "out_features": 1, "hidden": (3,), "w0": 10.0, "seed": 0}
    yield Call("equivariant.siren", equivariant.siren, siren)
    image = {
        "steps": 2,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "chunk": 2,
        "seed": 0,
        "progress": False,
    }
    small = equivariant.siren(2, 1, (3,), seed=0)
    yield Call(
        "equivariant.fit_images",
        equivariant.fit_images,
        {"images": torch.rand(2, 3, 3), "net": small} | image,
    )
    grid = equivariant.image_grid(3, 3)
    values = w.normal(2, 9, 1)
    yield Call(
        "equivariant.fit_inrs",
        equivariant.fit_inrs,
        {"x": grid, "y": values, "net": small} | image,
    )
    yield Call("equivariant.image_grid", equivariant.image_grid, {"height": 3, "width": 3})
    render = {"theta": theta, "spec": bf.WeightSpec.of(small), "height": 3, "width": 3}
    yield Call("equivariant.render", equivariant.render, render)
    warp = {
        "theta": theta,
        "spec": bf.WeightSpec.of(small),
        "matrix": torch.eye(2),
        "shift": torch.zeros(2),
    }
    yield Call("equivariant.warp", equivariant.warp, warp)


def _transport(w: World) -> Iterator[Call]:
    t, model, spec, theta, draws, flow = (
        transport,
        w.model,
        w.spec,
        w.theta,
        w.draws,
        w.flow,
    )
    training = {
        "budget": 1.0,
        "steps": 2,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "optimiser": "adamw",
        "patience": 2,
    }
    yield Call("Training", bf.Training, training | {"autocast": False, "compile": False})
    yield Call("Checkpoint", bf.Checkpoint, {"path": w.folder / "run", "resume": True})
    matching = {
        "coupling": t.Independent(),
        "path": None,
        "times": t.LogUniformNearEnd(),
        "targets": "pairs",
        "reuse": 1,
    }
    yield Call("transport.Matching", t.Matching, matching)
    yield Call("transport.Reuse", t.Reuse, {"steps": 1, "moves": None})
    yield Call(
        "transport.Density",
        t.Density,
        {"trace": "exact", "probes": 2, "noise": "rademacher"},
    )
    yield Call(
        "transport.Solver",
        t.Solver,
        {"rule": "euler", "steps": 2, "rtol": 1e-3, "atol": 1e-3},
    )
    times = torch.tensor([0.0, 0.5, 1.0])
    yield Call("transport.Solver at times", t.Solver, {"rule": "euler", "steps": times})
    small = {
        "training": bf.Training(steps=2, batch_size=4, learning_rate=1e-3),
        "seed": 0,
        "progress": False,
    }
    fit = {
        "velocity": w.field,
        "source": None,
        "matching": t.Matching(targets="pairs"),
        "held_out": None,
    }
    yield Call(
        "fit_flow",
        bf.fit_flow,
        {"model": model, "draws": draws, "checkpoint": None} | small | fit,
    )
    train = {
        "field": w.field,
        "pairs": w.pairs,
        "path": None,
        "times": None,
        "reuse": None,
        "held_out": None,
    }
    yield Call("transport.train", t.train, train | small | {"checkpoint": None})
    yield Call(
        "transport.fit_gaussian",
        t.fit_gaussian,
        {"model": model, "draws": draws, "matched": False, "seed": 0},
    )
    baseline = {"model": model, "draws": draws, "matched": False, "held_out": None} | small
    yield Call(
        "transport.fit_coupling", t.fit_coupling, baseline | {"couplings": 2, "hidden": 4}
    )
    yield Call("transport.fit_cnf", t.fit_cnf, baseline | {"width": 4, "solver_steps": 2})
    distil = {"flow": flow, "evaluations": 1, "trajectories": 4} | small
    yield Call("transport.distil", t.distil, distil)
    bootstrap = {
        "model": model,
        "rounds": 1,
        "targets": 4,
        "refine_steps": 1,
        "proximal_step": None,
    }
    yield Call(
        "transport.fit_flow_without_draws", t.fit_flow_without_draws, bootstrap | small
    )
    given = {
        "spec": w.relu_spec,
        "draws": theta,
        "velocity": None,
        "coupling": None,
        "checkpoint": None,
    }
    yield Call("transport.fit_manifold_flow", t.fit_manifold_flow, given | small)
    two_steps = Solver(steps=2)
    gauss = {
        "model": model,
        "proximal_step": None,
        "source": None,
        "path": None,
        "solver": two_steps,
    }
    yield Call("GaussNewtonFlow", bf.GaussNewtonFlow, gauss)
    yield Call(
        "Flow",
        t.Flow,
        {
            "velocity": flow.velocity,
            "source": flow.source,
            "spec": spec,
            "fingerprint": "a",
            "solver": two_steps,
            "info": {},
        },
    )
    yield Call("Flow.of", t.Flow.of, {"velocity": w.field, "model": model, "source": None})
    for name in ("bind", "transfer"):
        yield Call(f"Flow.{name}", getattr(flow, name), {"model": model})
    yield Call(
        "Flow.guided",
        flow.guided,
        {"guide": w.loss, "strength": 1.0, "steps": 1, "max_norm": 2.0},
    )
    informed = bf.GaussNewtonFlow(model, solver=Solver(steps=1))
    yield Call("Flow.on_batch", informed.on_batch, {"size": 4, "seed": 0})
    yield Call("Flow.to", flow.to, {"device": "cpu", "dtype": torch.float64})
    draw = {"n": 3, "seed": 0, "solver": Solver("euler", 2), "chunk_size": 2}
    yield Call("Flow.sample", flow.sample, draw | {"diffusion": 0.0})
    yield Call("Flow.sample with noise", flow.sample, draw | {"diffusion": 0.1})
    density = {"density": t.Density(), "solver": Solver("euler", 2), "chunk_size": 4}
    yield Call(
        "Flow.sample_with_log_prob",
        flow.sample_with_log_prob,
        {"n": 3, "seed": 0} | density,
    )
    yield Call("Flow.log_prob", flow.log_prob, {"theta": theta, "seed": 0} | density)
    yield Call(
        "Flow.forward_with_log_prob",
        flow.forward_with_log_prob,
        {"x0": theta, "seed": 0} | density,
    )
    yield Call(
        "Flow.inverse_with_log_prob",
        flow.inverse_with_log_prob,
        {"theta": theta, "seed": 0} | density,
    )
    yield Call("Flow.forward", flow.forward, {"x0": theta, "solver": Solver("euler", 2)})
    yield Call("Flow.start", flow.start, {"n": 3, "seed": 0})
    yield Call(
        "Flow.solver_error",
        flow.solver_error,
        {"n": 3, "seed": 0, "solver": two_steps, "density": False},
    )
    yield Call("Flow.largest_chunk", flow.largest_chunk, {"memory": 10**6, "density": None})
    yield Call("Flow.save", flow.save, {"path": w.folder / "again.npz"})
    yield Call("Flow.load", t.Flow.load, {"path": w.folder / "flow.npz", "model": model})
    refine = {
        "draws": draws,
        "model": model,
        "steps": 1,
        "n_leapfrog": 1,
        "target_acceptance": 0.8,
        "seed": 0,
    }
    yield Call("refine", bf.refine, refine | {"chunk_size": 4, "progress": False})
    fewer = w.model.subset(torch.arange(ROWS - 1))
    few = bf.SMC(particles=10, moves=1, max_leapfrog=2)
    yield Call(
        "update",
        bf.update,
        {
            "model": fewer,
            "draws": w.draws,
            "previous": w.model,
            "smc": few,
            "seed": 0,
            "progress": False,
        },
    )
    given = {"model": w.model, "n": 16, "seed": 0, "progress": False}
    yield Call("PriorBank.of", bf.PriorBank.of, given)
    bank = bf.PriorBank.of(**given)
    yield Call("PriorBank.log_likelihood", bank.log_likelihood, {"model": w.model})
    yield Call(
        "update from a bank", bf.update, {"model": w.model, "draws": bank, "smc": few}
    )
    yield Call(
        "fit_prior",
        bf.fit_prior,
        {
            "tasks": [w.model, fewer],
            "draws": [w.draws, w.draws],
            "rounds": 1,
            "draws_per_task": 4,
            "velocity": w.field,
            "training": bf.Training(steps=1, batch_size=2),
            "held_out": 0.5,
            "seed": 0,
            "progress": False,
        },
    )
    reader = w.built(lambda: t.AmortisedVelocity(w.spec, width=2, depth=1))
    learned = replace(w.flow, info={"held_out_tasks": [1], "tasks": 1})
    yield Call(
        "transport.sharpen",
        transport.sharpen,
        {
            "prior": transport.FlowMap(
                learned.velocity, learned.source, learned.spec, torch.tensor([0.0, 1.0])
            ),
            "flow": learned,
            "tasks": [w.model, fewer],
            "draws": [w.draws, w.draws],
            "training": bf.Training(steps=1, batch_size=2),
            "seed": 0,
            "progress": False,
        },
    )
    yield Call(
        "fit_amortised",
        bf.fit_amortised,
        {
            "model": w.model,
            "rows": (2, 3),
            "noise": (0.2, 0.5),
            "widths": (2, 3),
            "velocity": reader,
            "training": bf.Training(steps=1, batch_size=2),
            "seed": 0,
            "progress": False,
        },
    )
    correct = {
        "flow": flow,
        "model": model,
        "n": 50,
        "method": "importance",
        "seed": 0,
        "held_out": draws,
    }
    yield Call(
        "correct",
        bf.correct,
        correct | {"density": t.Density(), "force": True, "progress": False},
    )
    draw.pop("chunk_size")
    yield Call("transport.ManifoldFlow.sample", w.manifold.sample, draw | {"chunk_size": 2})
    yield Call("transport.ManifoldFlow.start", w.manifold.start, {"n": 3, "seed": 0})
    yield Call("transport.ManifoldFlow.complete", w.manifold.complete, {"theta": theta})
    yield Call("transport.CompletedFlow.sample", w.completed.sample, draw)
    yield Call(
        "transport.CompletedFlow.log_prob",
        w.completed.log_prob,
        {"theta": theta, "seed": 0} | density,
    )
    yield Call("transport.AffinePath", t.AffinePath, {"schedule": "linear", "sigma": 0.0})
    yield Call("transport.Beta", t.Beta, {"a": 2.0, "b": 1.0})
    yield Call("transport.LogitNormal", t.LogitNormal, {"loc": 0.0, "scale": 1.0})
    yield Call(
        "transport.LogUniformNearEnd", t.LogUniformNearEnd, {"share": 0.3, "decades": 2.0}
    )
    yield Call("transport.MiniBatchOT", t.MiniBatchOT, {"matched": False})
    sinkhorn = {"regularisation": 0.1, "tolerance": 1e-3, "max_iterations": 10}
    yield Call("transport.SinkhornOT", t.SinkhornOT, sinkhorn)
    yield Call(
        "transport.GaussNewton",
        t.GaussNewton,
        {"steps": 1, "max_norm": 2.0, "iterations": None},
    )
    yield Call(
        "transport.GradientSteps",
        t.GradientSteps,
        {"steps": 1, "max_norm": 2.0, "memory": 0.5},
    )
    yield Call(
        "transport.Source",
        t.Source,
        {"prior": model.flat_prior, "loc": torch.zeros(DIM), "root": 1.5},
    )
    yield Call("transport.Source.scaled", t.Source.scaled, {"model": model, "scale": 2.0})
    yield Call(
        "transport.Source.gaussian",
        t.Source.gaussian,
        {"model": model, "theta": theta, "shrinkage": 0.1},
    )
    size = {"spec": spec, "width": 2, "depth": 1, "path": None}
    yield Call(
        "transport.WeightsVelocity",
        t.WeightsVelocity,
        size | {"architecture": "dws", "parametrisation": "x1"},
    )
    yield Call(
        "transport.InformedVelocity",
        t.InformedVelocity,
        size | {"architecture": "dws", "proximal_step": None},
    )
    gaussian = t.GaussianVelocity(torch.zeros(DIM), torch.eye(DIM))
    size.pop("path")
    yield Call(
        "transport.ResidualVelocity", t.ResidualVelocity, size | {"gaussian": gaussian}
    )
    yield Call(
        "transport.ResidualVelocity.fit",
        t.ResidualVelocity.fit,
        size | {"x": theta, "shrinkage": 0.1},
    )
    cloud = {"mean": torch.zeros(3), "covariance": torch.eye(3), "path": None}
    yield Call("transport.GaussianVelocity", t.GaussianVelocity, cloud)
    yield Call(
        "transport.ScoreVelocity", t.ScoreVelocity, {"proximal_step": None, "path": None}
    )
    two = {"dim": DIM, "width": 3, "base": None, "path": None}
    yield Call("transport.TwoLayerVelocity", t.TwoLayerVelocity, two)
    reader = {"spec": w.spec, "width": 2, "depth": 1, "newton": 1}
    yield Call("transport.AmortisedVelocity", t.AmortisedVelocity, reader)
    yield Call("transport.TangentVelocity", t.TangentVelocity, size | {"spec": w.relu_spec})
    bent = {
        "field": w.field,
        "guide": w.loss,
        "source": w.source,
        "strength": 1.0,
        "steps": 1,
        "max_norm": 2.0,
    }
    yield Call("transport.GuidedVelocity", t.GuidedVelocity, bent)
    yield Call(
        "transport.RiemannianPath",
        t.RiemannianPath,
        {"spheres": symmetry.Spheres(w.relu_spec)},
    )
    x, grid = w.normal(4, 3), torch.tensor([0.0, 0.5, 1.0])
    ode = {"field": lambda t, state: (-state[0],), "state": (x,), "grid": grid}
    tolerances = {"rule": "euler", "rtol": 1e-3, "atol": 1e-3, "max_evaluations": 100}
    yield Call("transport.integrate", t.integrate, ode | tolerances)
    yield Call(
        "transport.integrate_with_error", t.integrate_with_error, ode | {"rule": "euler"}
    )
    sde = {
        "field": lambda t, x: (-x, -x),
        "noise": 0.1,
        "x": x,
        "grid": grid,
        "seed": 0,
        "rule": "euler",
    }
    yield Call("transport.integrate_sde", t.integrate_sde, sde)
    yield Call(
        "transport.largest_chunk",
        t.largest_chunk,
        {"memory": 10**6, "work": torch.sin, "x": x},
    )
    yield Call(
        "transport.time_grid", t.time_grid, {"steps": 3, "power": 1.0, "device": "cpu"}
    )


# ---------------------------------------- malformed values

FOREIGN: dict[str, Any] = {
    "a word": "wrod",
    "an empty string": "",
    "bytes": b"abc",
    "an object": object(),
    "a class": bf.HMC,
    "the class of a likelihood": likelihoods.Gaussian,
    "a function of the language": len,
    "an empty dict": {},
    "a set": {1.0},
    "an empty list": [],
    "a ragged list": [[1.0], [1.0, 2.0]],
    "a list of words": ["a", "b"],
    "a complex number": 1j,
    "a date": datetime.date(2020, 1, 1),
    "a slice": slice(3),
    "a module": math,
    "an array of words": np.array(["a", "b"]),
    "an array of objects": np.array([None, 1.0]),
    "an array of dates": np.array(["2020-01-01"], "datetime64[D]"),
    "a sparse matrix": sparse.eye_array(3).tocsr(),
    "a frame of words": pd.DataFrame({"a": [1.0, 2.0], "b": ["u", "v"]}),
    "NumPy's complex number": np.complex64(1j),
    "bytes that may change": bytearray(b"ab"),
    "a function without arguments": lambda: 1.0,
    "a tensor of the device nowhere": torch.ones(2, device="meta"),
    "a network": nn.Linear(1, 1),
    "a network of nothing": nn.Sequential(),
    "a distribution": torch.distributions.Uniform(0.0, 1.0),
}
NUMBERS: dict[str, Any] = {
    "NaN": math.nan,
    "NumPy's NaN": np.float64("nan"),
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "minus one": -1,
    "minus a half": -0.5,
    "10 ** 400": 10**400,
    "two numbers": [1.0, 2.0],
    "a tensor of NaN": torch.tensor(math.nan),
}


def _of_tensor(value: Tensor) -> Iterator[tuple[str, Any]]:
    """Yield tensors that are wrong in one way."""
    array = value.numpy()
    first = (0,) * value.dim()
    if value.is_floating_point():
        for name, number in {
            "a NaN in it": math.nan,
            "an infinity in it": math.inf,
            "1e300 in it": 1e300,
        }.items():
            broken = array.astype(np.float64)
            broken[first] = number
            yield name, broken
        yield "a NaN in a list", torch.full_like(value, math.nan).tolist()
    yield "masked", np.ma.masked_equal(array, array[first])
    yield "complex", array * 1j
    yield "a complex tensor", torch.complex(value.double(), value.double())
    yield "objects", array.astype(object)
    yield "words", array.astype(str)
    yield "a sparse tensor", value.to_sparse()
    yield "no rows", value[:0]
    yield "one more axis", value[..., None, None].expand(*value.shape, 4, 1)
    yield "one column less", value[..., :-1]
    yield "one column more", torch.cat([value, value[..., :1]], -1)
    yield "on the meta device", value.to("meta")
    if value.dim() > 1:
        yield (
            "transposed",
            value.movedim(0, -1) if value.shape[0] != value.shape[-1] else value[:, :-1],
        )


def _forms_of_tensor(value: Tensor) -> Iterator[tuple[str, Any]]:
    """Yield other forms of the same numbers."""
    array = value.numpy()
    yield "a list", value.tolist()
    yield "an array", array
    yield "an array in Fortran's order", np.asfortranarray(array)
    yield "an array of the other byte order", array.astype(array.dtype.newbyteorder())
    if value.dim() <= 2:
        yield (
            "a frame or series",
            pd.DataFrame(array) if value.dim() == 2 else pd.Series(array),
        )
    if value.is_floating_point():
        yield "float64", value.double()
        yield "float64 in an array", array.astype(np.float64)
        yield "tracked", value.clone().requires_grad_()


def forms(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield other ways to say the same: the result must be that of the canonical one."""
    if isinstance(value, Tensor) and value.dim():
        yield from _forms_of_tensor(value)
    elif isinstance(value, bool):
        yield "NumPy's bool", np.bool_(value)
    elif isinstance(value, int):
        yield "NumPy's integer", np.int64(value)
        yield "a tensor of one integer", torch.tensor(value)
    elif isinstance(value, float):
        yield "NumPy's float", np.float64(value)
        yield "an array of one float", np.array(value)
        yield "a tensor of one float", torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, Path):
        yield "a path in a string", str(value)


def malformed(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield values that should not stand in the place of ``value``."""
    if not isinstance(value, bf.Training | None):  # without one, a flow trains for minutes
        yield "None", None
    if not isinstance(value, bool):
        yield "True", True
    yield from FOREIGN.items()
    yield from NUMBERS.items()
    if isinstance(value, Tensor) and value.dim():
        yield from _of_tensor(value)


def swapped(call: Call, name: str, w: World) -> Iterator[tuple[str, Any]]:
    """Yield what stands in other places of the street: the wrong order of arguments."""
    for what, other in {
        "the draws": w.draws,
        "the model": w.model,
        "a flow": w.flow,
        "a prediction": w.prediction,
    }.items():
        if other is not call.arguments[name]:
            yield what, other


# ---------------------------------------- outcomes


def outcome(
    call: Call, name: str, value: Any, clean: Any, *, form: bool = False
) -> tuple[str, str]:
    """Make the call with another value for one argument.

    Return what came of it, and the message.
    """
    try:
        result = run(call, call.arguments | {name: value})
    except Exception as error:
        text = str(error)
        if form:
            return "refused", f"{type(error).__name__}: {text}"
        if not isinstance(error, TypeError | ValueError):
            return "other", f"{type(error).__name__}: {text}"
        return (
            "clear" if _named(name, text) else "obscure"
        ), f"{type(error).__name__}: {text}"
    if same(result, clean):
        return "equal", ""
    if form:
        return ("valid" if (call.name, name) in FOLLOW_THE_TYPE else "silent"), repr(
            result
        )[:200]
    if call.name in HOLD_WHAT_THEY_ARE_GIVEN and isinstance(
        value, Tensor | np.ndarray | list | float
    ):
        return "valid", ""
    if (call.name, name) in RIGHT:
        return "valid", ""
    return (
        "silent" if not _plausible(call, name, value) or _broken(result) else "valid"
    ), repr(result)[:200]


def run(call: Call, arguments: dict[str, Any]) -> Any:
    """Make a call in silence; return numbers to compare."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        own = {
            name: copy.deepcopy(v) if isinstance(v, nn.Module) else v
            for name, v in arguments.items()
        }
        return numbers(call.function(**own))


def _named(name: str, text: str) -> bool:
    """Say whether a message names an argument.

    One letter counts at the beginning or in quotes only.
    """
    word = re.escape(name)
    if len(name) == 1:
        return re.match(rf"{word}\b", text) is not None or f"'{name}'" in text
    return re.search(rf"(?<![\w.]){word}(?!\w)", text) is not None


def _plausible(call: Call, name: str, value: Any) -> bool:
    """Say whether a value that changes the result is one of the right kind, by the annotation."""
    wanted = str(_annotation(call, name))
    if value is None:
        return "None" in wanted
    if isinstance(value, bool):
        return "bool" in wanted
    if isinstance(value, np.floating):
        value = float(value)
    if isinstance(value, float | int):
        signed = value >= 0 or name in SIGNED or "Tensor" in wanted
        infinite = "Limit" in wanted or "Estimate" in wanted or name == "log_evidence"
        return value == value and signed and (abs(value) != math.inf or infinite)
    if isinstance(value, str):
        return value != "" and "str" in wanted
    if isinstance(value, dict):
        return "dict" in wanted or "Mapping" in wanted
    if isinstance(value, Tensor | np.ndarray | list):
        kinds = ("Tensor", "Sequence", "Steps", "Loss", "Path")
        return any(kind in wanted for kind in kinds) and _finite(value)
    if isinstance(value, type):
        return False
    return (
        callable(value)
        or any(kind.__name__ in wanted for kind in type(value).__mro__)
        or "Posterior" in wanted
    )


SIGNED = {"seed", "loc", "margin", "strength"}
"""Numbers that may be negative."""

HOLD_WHAT_THEY_ARE_GIVEN = (
    "Draws",
    "Draws.with_theta",
    "Gaussian",
    "Gaussian.log_prob",
    "data.Standardiser",
    "symmetry.Curve",
    "BayesianModel.linearised",
    "BayesianModel.outputs",
    "BayesianModel.log_prior",
    "BayesianModel.log_likelihood",
    "BayesianModel.log_likelihood_and_grad",
    "BayesianModel.log_likelihood_grad",
    "BayesianModel.log_joint_and_grad",
    "BayesianModel.at",
    "BayesianModel.log_joint",
    "BayesianModel.network_at",
    "BayesianModel.pointwise_log_likelihood",
    "WeightSpec.unflatten",
    "WeightSpec.flatten",
    "WeightSpec.permute",
    "WeightSpec.flip",
    "WeightSpec.rescale",
    "WeightSpec.random_symmetry",
    "symmetry.sort_units",
    "symmetry.normalise_sign",
    "symmetry.normalise_scale",
    "symmetry.Spheres.project",
    "equivariant.render",
    "equivariant.warp",
    "transport.Source",
)
"""Containers, and functions that take one network after the other: of NaN they make NaN, and the
rest is right.
"""

RIGHT = {
    ("likelihoods.Levels", "levels"): "two numbers are two levels",
    ("likelihoods.Standardised", "loc"): "a number for each target",
    ("likelihoods.Standardised", "scale"): "a number for each target",
    ("report", "title"): "a report may have no title",
    ("Flow", "fingerprint"): "any string names a model; the empty one is that of none",
    (
        "transport.fit_coupling",
        "held_out",
    ): "draws are what it takes, though its annotation is among the options",
    (
        "transport.fit_cnf",
        "held_out",
    ): "draws are what it takes, though its annotation is among the options",
    (
        "transport.largest_chunk",
        "x",
    ): "the bytes of the rows are measured, whatever numbers are in them",
}
"""Arguments for which a value that looks wrong is right, and why."""

FOLLOW_THE_TYPE = {
    ("transport.fit_manifold_flow", "draws"),
    ("transport.largest_chunk", "x"),
}
"""What is computed in the floating-point type of an argument, or measures it."""


def _finite(value: Any) -> bool:
    try:
        return bool(torch.as_tensor(np.asarray(value, dtype=float)).isfinite().all())
    except (TypeError, ValueError):
        return False


def _annotation(call: Call, name: str) -> Any:
    parameters = inspect.signature(call.function).parameters
    return (
        parameters[name].annotation
        if name in parameters
        else "float | int | str | None | Sequence"
    )


def numbers(result: Any, depth: int = 0) -> Any:
    """Return what is in a result as plain values and arrays."""
    if isinstance(result, Tensor):
        return result.detach().double().numpy() if result.device.type != "meta" else "meta"
    if isinstance(result, nn.Module):
        return {name: numbers(value) for name, value in result.state_dict().items()}
    if isinstance(result, bf.BayesianModel):
        theta = result.sample_prior(2, 0)
        return [
            numbers(result.x),
            numbers(result.y),
            numbers(result.log_joint(theta)),
            repr(result),
        ]
    if isinstance(result, predictive.Prediction):
        return [numbers(result.mean), numbers(result.sd)]
    if isinstance(result, dict):
        timed = ("seconds", "cpu_seconds", "path", "settings", "date")
        return {
            str(key): numbers(value, depth + 1)
            for key, value in result.items()
            if key not in timed
        }
    if isinstance(result, tuple | list):
        return [numbers(value, depth + 1) for value in result]
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        if isinstance(result, bf.report.Report):
            return numbers(result.table)
        if depth > 5:
            return type(result).__name__
        return {
            f.name: numbers(getattr(result, f.name), depth + 1)
            for f in dataclasses.fields(result)
        }
    if isinstance(result, np.ndarray | np.generic | float | int | str | bool | None):
        return result
    if isinstance(result, torch.distributions.Distribution):
        return {name: numbers(getattr(result, name)) for name in result.arg_constraints}
    return type(result).__name__


def same(a: Any, b: Any) -> bool:
    """Say whether two results agree to rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray | float | int | np.generic) and isinstance(
        b, np.ndarray | float | int | np.generic
    ):
        a, b = np.asarray(a), np.asarray(b)
        return a.shape == b.shape and np.allclose(
            a, b, rtol=1e-4, atol=1e-5, equal_nan=True
        )
    return type(a) is type(b) and a == b


def _broken(values: Any) -> bool:
    """Say whether there is a NaN anywhere."""
    if isinstance(values, dict):
        return any(map(_broken, values.values()))
    if isinstance(values, list):
        return any(map(_broken, values))
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        return bool(np.isnan(values).any())
    return isinstance(values, float) and math.isnan(values)
