"""Does the model fit the data? Scales, prior predictive, and posterior predictive checks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bnnflow import verdicts
from bnnflow.diagnosis.answers import Answer, Finding
from bnnflow.draws import Draws, evenly
from bnnflow.model import BayesianModel
from bnnflow.predictive import (
    Prediction,
    PredictiveCheck,
    predict,
    predictive_check,
    prior_p_value,
)

__all__ = ["QUESTION", "fit", "new_inputs"]

QUESTION = "Does the model fit the data?"
_ROWS = 300
_PRIOR_DRAWS = 200
_UNIT_DRAWS = 8
_CLASSES = 20  # of more, frequencies are not looked at one by one
_SATURATED = 0.999
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Sigmoid)


def fit(model: BayesianModel, draws: Draws, x: Tensor | None) -> Answer:
    """Judge a model on rows of training.

    Args:
        model: the model.
        draws: a few hundred, of equal weight.
        x: inputs at which it is to be used, if they are others.
    """
    figures: dict[str, Any] = {}
    theta = draws.flat
    findings = _inputs(model, x) + _ties(model) + _prior(model, theta, figures)
    findings += _units(model, theta, figures)
    likelihood = model.likelihood
    classes = likelihood.kind == "classification"
    if classes or (likelihood.has_sample and likelihood.has_cdf):
        rows = model.some_rows(_ROWS)
        prediction = predict(model, draws, model.x[rows])
        look = _of_labels if classes else _of_numbers
        check = predictive_check(prediction, model.y[rows], look)
        figures["checks"] = {
            name: {
                "found": check.found[name],
                "chance": (check.low[name], check.high[name]),
            }
            for name in check.found
        }
        figures["p_value"] = check.p_value
        if check.p_value <= verdicts.P_VALUE:
            findings += _misfits(check)
    else:
        findings.append(
            Finding(
                "not looked at",
                f"{likelihood.name} has no sample and cdf: its fit was not looked at",
                "write them, and it can be",
            )
        )
    good = "data drawn from it look like these (location, spread, skewness, extremes, residuals)"
    return Answer.of(QUESTION, findings, good, figures)


# ---------------------------------------- posterior predictive checks


def _of_numbers(
    prediction: Prediction, y: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return statistics of normal scores of sets of targets: residuals under any likelihood."""
    u = prediction.transforms(y, generator)
    z = torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12)).flatten(1)  # (sets, n * targets)
    mean = z.mean(1, keepdim=True)
    sd = z.std(1, keepdim=True).clamp(min=1e-9)
    scores = (z - mean) / sd
    targets = z.shape[1] // len(prediction)
    inputs = _columns(prediction.x).repeat_interleave(targets, 0).to(z)
    predicted = prediction.mean.reshape(1, -1).to(z)
    found = {
        "mean error": mean[:, 0],
        "spread of errors": sd[:, 0],
        "skewness of errors": scores.pow(3).mean(1),
        "largest error": z.abs().amax(1),
        "error beside the prediction": _correlation(z, predicted.T).amax(1),
        "spread beside the prediction": _correlation(z.abs(), predicted.T).amax(1),
    }
    if inputs.shape[1]:
        bent = (inputs - inputs.mean(0)).square()
        found["error beside an input"] = _correlation(z, torch.cat([inputs, bent], 1)).amax(
            1
        )
        found["spread beside an input"] = _correlation(z.abs(), inputs).amax(1)
    return found


def _of_labels(
    prediction: Prediction, y: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return statistics of what labels are beyond their probabilities."""
    probs = prediction.probs
    inputs = _columns(prediction.x).to(probs)
    found: dict[str, Tensor] = {}
    errors, slopes = [], []
    for label in range(min(_CLASSES, probs.shape[1])):
        gap = (y == label).double() - probs[:, label]
        errors.append(gap.mean(1).abs())
        if inputs.shape[1]:
            slopes.append(_correlation(gap, inputs).amax(1))
    found["frequency of a class"] = torch.stack(errors).amax(0)
    if slopes:
        found["error beside an input"] = torch.stack(slopes).amax(0)
    return found


def _columns(x: Tensor) -> Tensor:
    """Return inputs that are a table ``(n, columns)``; none of any others, or of very many."""
    table = x.dim() == 2 and x.is_floating_point() and x.shape[1] <= 200
    return x.double() if table else x.new_zeros((len(x), 0), dtype=torch.float64)


def _correlation(z: Tensor, columns: Tensor) -> Tensor:
    """Return absolute correlations of sets ``(sets, n)`` with columns, ``(sets, columns)``."""
    z = z - z.mean(1, keepdim=True)
    columns = columns - columns.mean(0)
    size = z.norm(dim=1, keepdim=True) * columns.norm(dim=0)
    return ((z @ columns) / size.clamp(min=1e-12)).abs()


# beyond what data of the model show: worth a word, and not to be used
_LIMITS = {
    "mean error": (0.3, 1.0),
    "skewness of errors": (0.75, math.inf),
    "error beside the prediction": (0.2, math.inf),
    "spread beside the prediction": (0.2, math.inf),
    "error beside an input": (0.2, math.inf),
    "spread beside an input": (0.2, math.inf),
    "frequency of a class": (0.08, math.inf),
}
_ADVICE = {
    "mean error": "standardise targets, or give the network a bias",
    "skewness of errors": "take likelihoods.LogNormal or Gamma for positive targets",
    "largest error": "look at the row, or take likelihoods.StudentT",
    "error beside the prediction": "take a wider network, another prior, or more draws",
    "spread beside the prediction": "let the noise vary: likelihoods.HeteroscedasticGaussian",
    "error beside an input": "take a wider network, transform the input, or take more draws",
    "spread beside an input": "let the noise vary: likelihoods.HeteroscedasticGaussian",
    "frequency of a class": "take a wider network, or more draws",
}


def _misfits(check: PredictiveCheck) -> list[Finding]:
    findings = []
    for name, found in check.found.items():
        expected = check.expected[name]
        if check.p_values[name] > 2 * verdicts.P_VALUE:
            continue
        chance = (
            f"{found:.2f} where data of the model have {check.low[name]:.2f} to "
            f"{check.high[name]:.2f}"
        )
        if name == "spread of errors":
            findings += _spread(found / max(expected, 1e-9), chance)
        elif name == "largest error":
            if found > 1.5 * expected and found > 5:
                findings.append(Finding("with care", f"{name}: {chance}", _ADVICE[name]))
        else:
            word, bad = _LIMITS[name]
            signed = name in ("mean error", "skewness of errors")
            gap = abs(found - expected) if signed else found - expected
            if gap > word:
                grade = "no" if gap > bad else "with care"
                findings.append(Finding(grade, f"{name}: {chance}", _ADVICE[name]))
    return findings


def _spread(ratio: float, chance: str) -> list[Finding]:
    """Judge the spread of residuals: rows of training lie closer than new ones, and only very
    small residuals speak against a model.
    """
    if ratio > 1.3:
        why = f"errors are {ratio:.1f} times as large as the model thinks ({chance})"
        advice = "learn the noise: likelihoods.Gaussian(), without a fixed scale"
        return [Finding("no" if ratio > 2 else "with care", why, advice)]
    if ratio < 1 / 3:
        why = f"the noise is {1 / ratio:.1f} times what errors show ({chance})"
        advice = "learn the noise, or give it a smaller prior scale"
        return [Finding("with care", why, advice)]
    return []


# ---------------------------------------- scales


def _inputs(model: BayesianModel, x: Tensor | None) -> list[Finding]:
    """Look for columns in other units than the rest, or than in training."""
    columns = _columns(model.x)
    if columns.shape[1] == 0:
        return []
    findings = []
    size = columns.square().mean(0).sqrt()
    usual = float(size[size > 0].median()) if bool((size > 0).any()) else 1.0
    large = (size > verdicts.COLUMN_SCALE * max(1.0, usual)).nonzero().flatten().tolist()
    if columns.shape[1] == 1 and float(size[0]) > verdicts.COLUMN_SCALE:
        large = [0]
    if large:
        column = large[0]
        why = (
            f"column {column} of x has values of size {float(size[column]):.3g}, where the others "
            f"have {usual:.2g}"
        )
        if columns.shape[1] == 1 or len(large) == columns.shape[1]:
            why = f"inputs are raw: values of size {float(size[column]):.3g}"
        findings.append(Finding("with care", why, "standardise the inputs"))
    if x is not None and _columns(x).shape[1] == columns.shape[1]:
        findings += new_inputs(columns, _columns(x))
    return findings


def new_inputs(columns: Tensor, used: Tensor) -> list[Finding]:
    """Look for a column that lies, or is spread, otherwise than in training ``(rows, column)``."""
    centre, spread = columns.quantile(0.5, 0), columns.std(0)
    away = ((used.quantile(0.5, 0) - centre) / spread.clamp(min=1e-12)).abs()
    far = (away > verdicts.COLUMN_SCALE) & (spread > 0)
    if bool(far.any()):
        column = int(far.nonzero()[0])
        why = (
            f"column {column} of the rows looked at lies {float(away[column]):.0f} standard "
            "deviations from where it was in training"
        )
        return [Finding("no", why, "give both in the same units")]
    from scipy.stats import ks_2samp

    there, here = (columns - centre).abs(), (used - centre).abs()
    ratio = here.quantile(0.5, 0) / there.quantile(0.5, 0)
    other = (ratio.log().abs() > math.log(verdicts.COLUMN_SPREAD)) & ratio.isfinite()
    for column in other.nonzero().flatten().tolist():
        new, old = (each[:, column].cpu().numpy() for each in (here, there))
        found: Any = ks_2samp(new, old, method="asymp")
        if found.pvalue * columns.shape[1] < verdicts.P_VALUE:
            why = (
                f"column {column} of the rows looked at lies {float(ratio[column]):.2g} times as "
                "far from its centre in training as it did there"
            )
            return [
                Finding("with care", why, "give both in the same units, if they are not")
            ]
    return []


def _ties(model: BayesianModel) -> list[Finding]:
    """Look for targets of few values under a continuous law."""
    likelihood = model.likelihood
    if likelihood.kind == "classification" or likelihood.discrete or len(model.y) < 20:
        return []
    for target in model.y.double().cpu().reshape(len(model.y), -1).T:
        values = len(target.unique())
        if values < 2 or values > (1 - verdicts.TIES) * len(target):
            continue
        if values <= 12 or values <= len(target) / 10:
            why = (
                f"targets have {values} values only, and the likelihood is continuous: its density "
                "can be made as large as one likes, and says little"
            )
            advice = "take likelihoods.Levels, Ordinal or a count, or compare by RMSE and coverage"
            return [Finding("with care", why, advice)]
    return []


def _prior(model: BayesianModel, theta: Tensor, figures: dict[str, Any]) -> list[Finding]:
    """Compare targets with the prior predictive, and the draws' log prior with the prior's own."""
    drawn = model.sample_prior(_PRIOR_DRAWS, seed=0)
    with torch.no_grad():
        of_prior = model.log_prior(drawn).double().cpu()
        ours = model.log_prior(theta.to(model.device, model.dtype)).double().cpu()
    findings = _family(model, figures) if model.is_transported else []
    findings += _scale(model, drawn, figures)
    low, middle, high = of_prior.quantile(of_prior.new_tensor([0.16, 0.5, 0.84])).tolist()
    below = (middle - float(ours.median())) / max((high - low) / 2, 1e-9)
    if math.isfinite(below):
        figures["log_prior_below"] = below
        if below > verdicts.PRIOR_CONFLICT:
            why = f"the data push weights {below:.0f} standard deviations out in the prior"
            advice = (
                "standardise inputs and targets, or take a wider prior (or "
                "priors.Hierarchical, which finds its scale)"
            )
            findings.append(Finding("with care", why, advice))
    return findings


def _family(model: BayesianModel, figures: dict[str, Any]) -> list[Finding]:
    """Ask whether the data are like those that a learned prior was learned from."""
    if not model.likelihood.can_draw:
        return []
    p = figures["prior_p_value"] = prior_p_value(model)
    if p > verdicts.PRIOR_P_VALUE:
        return []
    why = (
        "this task is not like those that the prior was learned from: of data sets that it draws "
        f"{p:.1%} are as unlikely"
    )
    advice = "mix it with the plain prior by bf.mix_priors"
    return [Finding("with care", why, advice)]


def _scale(model: BayesianModel, drawn: Tensor, figures: dict[str, Any]) -> list[Finding]:
    if model.likelihood.kind == "classification" or not model.likelihood.has_variance:
        return []
    rows = model.some_rows(100)
    with torch.no_grad():
        outputs = model.outputs(drawn, model.x[rows]).double()
        parameters = model.likelihood_parameters(drawn)
        mean = model.likelihood.mean(outputs, parameters).double()
        variance = model.likelihood.variance(outputs, parameters).double()
    # medians, for the moments of wide priors may not exist; of copies, for torch's median of an
    # expanded tensor is not written
    noise = variance.contiguous().median(0).values
    spread = (mean.std(0).square() + noise).sqrt().cpu()
    y = model.y[rows].double().cpu().reshape(len(rows), -1)
    away = ((y - mean.contiguous().median(0).values.cpu()) / spread).square().mean(0).sqrt()
    wide = spread.quantile(0.5, 0) / y.std(0).clamp(min=1e-300)
    if not bool(away.isfinite().all()) or len(y) < 2:
        return []
    far, wide_most = float(away.max()), float(wide.max())
    figures["targets_in_prior_sds"] = far
    advice = "standardise targets, or take a prior of their scale"
    if far > verdicts.PRIOR_SCALE.good:
        grade = "no" if far > verdicts.PRIOR_SCALE.bad else "with care"
        return [
            Finding(grade, f"targets lie {far:.0f} prior standard deviations away", advice)
        ]
    if wide_most > verdicts.PRIOR_WIDE:
        why = f"the prior predictive is {wide_most:.0f} times as wide as the targets"
        return [Finding("with care", why, advice)]
    return []


def _units(model: BayesianModel, theta: Tensor, figures: dict[str, Any]) -> list[Finding]:
    """Count hidden units that do not respond to the inputs."""
    if model.is_linearised:
        return []
    x = model.x[evenly(len(model.x), _ROWS).to(model.x.device)]
    still, ends, count = 0.0, 0.0, 0

    def look(module: nn.Module, given: Any, out: Tensor) -> None:
        nonlocal still, ends, count
        values = out.detach().reshape(len(out), -1)
        if len(values) != len(x):
            return
        count += values.shape[1]
        still += float((values.std(0) <= 1e-6 * (1 + values.abs().amax(0))).sum())
        if isinstance(module, nn.Tanh | nn.Sigmoid):
            centre, reach = (0.0, 1.0) if isinstance(module, nn.Tanh) else (0.5, 0.5)
            full = ((values - centre).abs() / reach > _SATURATED).double().mean(0)
            ends += float((full > 0.95).sum())

    for each in theta[:: max(1, len(theta) // _UNIT_DRAWS)][:_UNIT_DRAWS]:
        net = model.network_at(each)
        hooks = [
            module.register_forward_hook(look)
            for module in net.modules()
            if isinstance(module, _ACTIVATIONS)
        ]
        if not hooks:
            return []
        with torch.no_grad():
            net(x)
    if count == 0:
        return []
    figures["still_units"], figures["saturated_units"] = still / count, ends / count
    for share, what in ((still, "never change"), (ends, "are saturated")):
        if share / count > verdicts.UNITS:
            why = (
                f"{share / count:.0%} of the hidden units {what} over the rows of training"
            )
            return [
                Finding("with care", why, "standardise the inputs, or a narrower prior")
            ]
    return []
