"""The diagnosis is honest, the export is complete, and the page stands on its own."""

import importlib
import itertools
import math
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

import bnnflow as bf
from bnnflow.diagnostics import ess, import_arviz, is_datatree
from bnnflow.draws import Draws
from bnnflow.gaussian import Gaussian
from bnnflow.model import BayesianModel, likelihoods
from bnnflow.predictive import metrics, predict
from bnnflow.report import Report, diagnose, plots, report, style, to_arviz
from bnnflow.report.compare import compare
from tests.problems import built, normal, one_in

VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}
N_TEST = 40


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def targets_of(x, kind, seed):
    y = x.sum(1) + 0.3 * torch.randn(len(x), generator=generator(seed))
    return torch.bucketize(y, torch.tensor([-0.7, 0.7])) if kind == "classification" else y


def make_model(kind, features=2, hidden=3):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        out = 3 if kind == "classification" else 1
        net = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, out))
    x = torch.randn(30, features, generator=generator(1))
    likelihood = (
        likelihoods.Categorical() if kind == "classification" else likelihoods.Gaussian(0.3)
    )
    return BayesianModel(net, Normal(0.0, 1.0), likelihood, x, targets_of(x, kind, 7))


def test_data(model):
    x = torch.randn(N_TEST, model.x.shape[1], generator=generator(2))
    return x, targets_of(x, model.likelihood.kind, 4)


test_data.__test__ = False  # type: ignore[attr-defined]


@cache
def pool(fingerprint, model):
    """Draws of the posterior, as good as independent: every third of long chains, shuffled."""
    draws = bf.sample(
        model, bf.HMC(), chains=16, warmup=200, draws=420, seed=0, progress=False
    )
    flat = draws.theta[:, ::3].flatten(0, 1).unique(dim=0)
    return flat[torch.randperm(len(flat), generator=generator(9))]


def chains(model, chains=4, draws=200, *, centre=None, spread=0.3, seed=0):
    """Independent draws of the posterior dressed as Markov chains; or, around `centre`
    (chain, dim), of something else.
    """
    posterior = pool(model.fingerprint(), model)
    theta = posterior[: chains * draws].reshape(chains, draws, -1).clone()
    if centre is not None:
        theta = spread * torch.randn(chains, draws, model.dim, generator=generator(seed))
        theta = theta + centre[:, None]
    return dressed(model, theta)


def dressed(model, theta):
    """Return draws ``(chain, draw, dim)`` with the statistics of a sampler."""
    shape = theta.shape[:2]
    energy = torch.randn(*shape, generator=generator(1), dtype=torch.float64)
    stats = {
        "acceptance_rate": torch.full(shape, 0.8, dtype=torch.float64),
        "diverging": torch.zeros(shape, dtype=torch.bool),
        "energy": energy,
    }
    info = {
        "method": "HMC",
        "settings": "HMC(step_size=0.1)",
        "seconds": 12.5,
        "seed": 0,
        "gradients": 32000,
    }
    return Draws(theta, model.log_joint(theta), stats, info=info)


@pytest.fixture(scope="module", params=one_in(2, ["regression", "classification"]))
def model(request):
    return make_model(request.param)


@pytest.fixture
def undrawn(monkeypatch):
    """Leave pictures empty: for what is asked of tables and words alone."""
    figures = importlib.import_module("bnnflow.report.figures")
    monkeypatch.setattr(figures, "_svg", lambda figure, label: "<svg></svg>")


# ---------------------------------------- diagnosis


def test_chains_that_agree_are_trusted(model):
    d = diagnose(model, chains(model, draws=400))
    assert d.verdict == "trust"
    assert d.r_hat is not None
    assert d.ess_bulk is not None
    assert d.r_hat.shape == (30, 3 if model.likelihood.kind == "classification" else 1)
    assert d.r_hat.max() < 1.01
    assert d.ess_bulk.min() > 400
    assert d.acceptance == pytest.approx(0.8)
    assert d.divergences == 0
    assert str(d) == repr(d)
    assert str(d).startswith("HMC: trust\n")


def test_stuck_chains_are_not(model):
    stuck = model.sample_prior(4, seed=0)
    for spread in (0.0, 0.01):
        d = diagnose(model, chains(model, centre=stuck, spread=spread))
        assert d.verdict == "do not trust"
        assert d.r_hat is not None
        assert d.r_hat.max() > 1.05
        assert "longer warm-up" in str(d)


def test_chains_that_never_move_are_not(model):
    d = diagnose(model, chains(model, centre=torch.zeros(4, model.dim), spread=0.0))
    assert d.verdict == "do not trust"
    assert "never" not in d.verdict
    assert "no chain ever moved" in str(d)


def test_symmetric_chains_agree_in_function_space(model):
    """Flipping the sign of every hidden unit of two chains moves the weights and not the
    functions.
    """
    draws = chains(model, draws=400)
    flipped = draws.theta.clone()
    flipped[:2] = model.spec.flip(flipped[:2], {"h1": -torch.ones(3)})
    d = diagnose(model, draws.with_theta(flipped))
    assert d.verdict == "trust"


def test_slow_chains_are_told_how_many_draws_they_need(model):
    draws = chains(model, draws=200)
    slow = draws.theta[:, ::10].repeat_interleave(10, 1)
    d = diagnose(model, draws.with_theta(slow))
    assert d.verdict != "trust"
    assert re.search(r"take about \d+ times as many draws", str(d))


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.005, "trust with care"), (0.2, "do not trust")]
)
def test_divergences_count(model, share, verdict):
    draws = chains(model, draws=400)
    draws.stats["diverging"][:, : int(400 * share)] = True
    d = diagnose(model, draws)
    assert d.verdict == verdict
    assert "diverged" in str(d)


def test_energies_that_are_hardly_explored_are_mentioned(model):
    draws = chains(model, draws=400)
    draws.stats["energy"][:] = torch.linspace(0, 1, 400)
    assert "E-BFMI" in str(diagnose(model, draws))


def test_one_chain_is_not_enough(model):
    d = diagnose(model, chains(model, chains=1, draws=1000))
    assert d.verdict == "trust with care"
    assert "one chain" in str(d)
    assert diagnose(model, chains(model, draws=2)).verdict == "do not trust"


def test_approximations_are_never_trusted_on_their_own(model):
    """Draws that nothing is known of cannot vouch for themselves; rows that they have not seen can,
    for what they predict.
    """
    x, y = test_data(model)
    theta = chains(model, draws=250).flat
    flow_like = Draws(theta[None], model.log_joint(theta)[None], info={"method": "VI"})
    ensemble = Draws(
        theta[None, :10], model.log_joint(theta[:10])[None], info={"method": "DeepEnsemble"}
    )
    for draws in (theta, flow_like, ensemble):
        d = diagnose(model, draws)
        assert d.verdict == "approximate: compare with an exact sampler"
        assert "no chains to compare" in str(d)
        assert d.r_hat is None
    assert "10 members" in str(diagnose(model, ensemble))
    seen = diagnose(model, flow_like, x, y)
    assert seen.verdict == "trust predictions only"
    assert seen.looked_at == "held-out rows"


def test_draws_of_the_prior_are_told_from_those_of_the_posterior(model):
    theta = model.sample_prior(500, seed=0)
    for draws in (
        theta,
        (theta, torch.zeros(500)),
        dressed(model, theta.reshape(4, 125, -1)),
    ):
        d = diagnose(model, draws)
        assert d.verdict == "do not trust"
        assert "temperature" in str(d.draws.findings)


def test_weights_have_an_effective_sample_size(model):
    theta = chains(model, draws=250).flat
    even = diagnose(model, (theta, torch.zeros(1000)))
    assert even.ess_weights == pytest.approx(1000)
    assert even.verdict == "trust"
    uneven = torch.zeros(1000)
    uneven[0] = 20.0
    assert diagnose(model, (theta, uneven)).verdict == "do not trust"


def test_chains_without_an_accept_step_are_judged_by_what_their_bias_is(model):
    draws = chains(model, draws=400)
    draws.info["exact"] = False
    assert diagnose(model, draws).verdict == "trust"
    for temperature, advice in (
        (1.05, None),
        (0.3, "run longer"),
        (1.6, "smaller step size"),
    ):
        draws.stats["configurational_temperature"] = torch.full((4, 400), temperature)
        d = diagnose(model, draws)
        assert d.temperature == pytest.approx(temperature)
        assert f"temperature {temperature:.2f}" in str(d)
        assert "should be 1" not in str(d) if advice is None else advice in str(d)


def test_energy_errors_beyond_what_was_asked_are_not_trusted(model):
    draws = chains(model, draws=400)
    draws.info.update(exact=False, energy_variance=0.005)
    for variance, verdict in ((0.01, "trust"), (0.3, "do not trust")):
        draws.stats["energy_variance"] = torch.full((4, 400), variance)
        assert diagnose(model, draws).verdict == verdict
    assert "0.3 a dimension where 0.005 was asked" in str(diagnose(model, draws))


def test_particles_say_how_well_the_evidence_is_known(model):
    theta = chains(model, draws=250).flat.unflatten(0, (2, 500))
    even = torch.full((2, 500), -math.log(500), dtype=torch.float64)
    for error, verdict in ((0.2, "trust"), (3.0, "trust with care")):
        draws = Draws(
            theta,
            model.log_joint(theta),
            log_weights=even,
            log_evidence=(-12.0, error),
            info={"method": "SMC"},
        )
        d = diagnose(model, draws)
        assert d.verdict == verdict
        assert f"log evidence -12.00 ± {error:.2f}" in str(d)
        assert ("standard error of 3.0: take more particles" in str(d)) == (error == 3.0)


def test_the_report_knows_an_evidence_without_an_error(undrawn, model):
    x, y = test_data(model)
    theta = chains(model, draws=15).flat[None]
    info = {"method": "Laplace", "rates": [0.00123456789, 2.0], "gradients": 600.0}
    draws = Draws(theta, model.log_joint(theta), log_evidence=(-12.5, math.nan), info=info)
    made = report(model, {"Laplace": draws}, x, y, path=None)
    words = " ".join(Page(made.html()).text)
    assert "−12.50 (Laplace)" in words
    assert "0.001235, 2" in words
    assert " nan " not in words
    assert "600.0" not in words
    assert "linearised" in words, "a hint for readers of this approximation"


def test_diagnose_refuses_what_does_not_fit(model):
    x, y = test_data(model)
    with pytest.raises(ValueError, match="length"):
        diagnose(model, torch.zeros(3, model.dim + 1))
    with pytest.raises(ValueError, match="no draws"):
        diagnose(model, torch.zeros(0, model.dim))
    with pytest.raises(ValueError, match="y needs its x"):
        diagnose(model, chains(model), y=y)
    with pytest.raises(ValueError, match="x has 39 rows and y has 40"):
        diagnose(model, chains(model), x[1:], y)


# ---------------------------------------- ArviZ


def test_arviz_has_every_group_with_named_axes(model):
    draws = chains(model, draws=20)
    data = to_arviz(model, draws, aligned=False)
    posterior = data["posterior"]
    assert posterior["0.weight"].dims[:3] == ("chain", "draw", "h1")
    assert posterior["2.weight"].dims[3] == "h1"
    assert posterior["0.weight"].shape == (4, 20, 3, 2)
    assert np.array_equal(posterior["0.bias"], model.spec.unflatten(draws.theta)["0.bias"])
    assert {"lp", "energy", "diverging", "acceptance_rate"} <= set(
        data["sample_stats"].data_vars
    )
    assert np.allclose(data["sample_stats"]["lp"], draws.log_joint)
    expected = model.pointwise_log_likelihood(draws.theta)
    assert np.allclose(data["log_likelihood"]["y"], expected, atol=1e-5)
    functions = model.likelihood.mean(model.outputs(draws.theta))
    assert np.allclose(data["predictions"]["mean"], functions, atol=1e-5)
    assert data["observed_data"]["y"].shape == (len(model.y),)


def test_arviz_refuses_targets_without_their_rows(model):
    draws = chains(model, draws=10)
    x, y = test_data(model)
    with pytest.raises(ValueError, match="needs its x"):
        to_arviz(model, draws, y=y)
    with pytest.raises(ValueError, match="rows"):
        to_arviz(model, draws, x, y[:3])


def test_arviz_functions_accept_the_export(model):
    az = import_arviz()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loo = az.loo(to_arviz(model, chains(model, draws=100)))
    assert np.isfinite(float(loo.iloc[0] if hasattr(loo, "iloc") else loo.elpd))


def test_arviz_gets_its_own_container(model):
    """InferenceData with ArviZ 0.x, a DataTree of xarray with 1.x, where the old name is an
    alias.
    """
    import xarray

    data = to_arviz(model, chains(model, draws=10))
    assert isinstance(
        data, xarray.DataTree if is_datatree() else import_arviz().InferenceData
    )
    assert groups(data) == {
        "posterior",
        "sample_stats",
        "posterior_predictive",
        "prior",
        "prior_predictive",
        "predictions",
        "log_likelihood",
        "observed_data",
        "constant_data",
    }


def test_the_export_survives_netcdf(model, tmp_path):
    az = import_arviz()
    data = to_arviz(model, weighted(model))
    data.to_netcdf(str(tmp_path / "draws.nc"))
    back = az.from_netcdf(str(tmp_path / "draws.nc"))
    assert groups(back) == groups(data)
    for group in groups(data):
        for name, values in data[group].data_vars.items():
            assert np.array_equal(back[group][name], values), (group, name)
    assert back["posterior"].attrs["inference_library"] == "bnnflow"


def test_arviz_sees_the_weights_of_weighted_draws(model):
    """Draws of the prior, weighted as if their first weight had another mean: ArviZ's mean is the
    weighted one.
    """
    az = import_arviz()
    draws = weighted(model, shift=1.0)
    data = to_arviz(model, draws, aligned=False)
    weights = draws.log_weights.flatten().softmax(0)
    expected = float(weights @ draws.flat[:, 0].double())
    assert abs(expected - 1) < 0.2
    assert abs(float(draws.flat[:, 0].mean())) < 0.1
    found = az.summary(data, var_names=["0.weight"], round_to=4)["mean"].iloc[0]
    error = float(draws.flat[:, 0].std()) / np.sqrt(4000)
    assert abs(float(found) - expected) < 3 * error
    kept = data["weighted_posterior"]
    assert np.array_equal(kept["log_weight"], draws.log_weights)
    assert np.array_equal(kept["0.bias"], model.spec.unflatten(draws.theta)["0.bias"])


def test_copies_of_weighted_draws_do_not_count_twice(model):
    """One draw of four has nearly all the weight of its neighbours: a quarter of the draws are
    effective.
    """
    draws = weighted(model)
    few = torch.full_like(draws.log_weights, -20.0)
    few[:, ::4] = 0.0
    data = to_arviz(model, replace(draws, log_weights=few), aligned=False)
    first = data["posterior"]["0.weight"].to_numpy()[..., 0, 0]
    assert ess(first, "mean") < 0.35 * first.size


def groups(data) -> set[str]:
    """The names of the groups of an export, whatever the container."""
    names = data.children if is_datatree() else data.groups()
    return set(names)


def weighted(model, shift: float = 0.0) -> Draws:
    """Draws of the prior N(0, 1), (4, 1000), weighted as if the first weight had mean `shift`."""
    theta = model.sample_prior(4000, seed=3).reshape(4, 1000, model.dim)
    log_weights = (shift * theta[..., 0]).double()
    diverging = torch.zeros(4, 1000, dtype=torch.bool)
    return Draws(
        theta, model.log_joint(theta), {"diverging": diverging}, log_weights=log_weights
    )


def test_the_report_weighs_draws_whatever_holds_the_weights(undrawn, model):
    x, y = test_data(model)
    theta = model.sample_prior(50, seed=0)
    log_weights = 3 * theta[:, 0].double()
    held = (np.asarray, list, lambda values: values.float())
    others = {str(i): (theta.numpy(), hold(log_weights)) for i, hold in enumerate(held)}
    forms = {"none": theta, "tensor": (theta, log_weights)} | others
    none, tensor, *rest = (
        row["lppd"] for row in report(model, forms, x, y, path=None).table
    )
    assert rest == pytest.approx([tensor] * 3, rel=1e-6)
    assert none != pytest.approx(tensor, rel=1e-3)


# ---------------------------------------- the report


class Page(HTMLParser):
    """Collects tags, and fails on those that are not closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def stands_alone(text):
    page = Page(text)
    for _tag, name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "action", "data", "srcset"}:
            assert value.startswith("#"), value
    assert page.tags.count("script") == 1  # which sorts tables
    script = text[text.rindex("<script>") : text.rindex("</script>")]
    assert not re.search(r"https?:|fetch|import|XMLHttp|eval", script)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    return page


def methods(model):
    """One result of every form that is accepted."""
    theta = model.sample_prior(60, seed=3)
    return {
        "HMC": chains(model, draws=400),
        "VI <b>&": Draws(
            theta[None], model.log_joint(theta)[None], info={"method": "VI", "seconds": 1.0}
        ),
        "ensemble": Draws(
            theta[None, :10],
            model.log_joint(theta[:10])[None],
            info={"method": "DeepEnsemble"},
        ),
        "prior $x$": theta,
        "weighted": (theta, torch.zeros(60)),
        "Gaussian": Gaussian(torch.zeros(model.dim), 0.3 * torch.ones(model.dim)),
    }


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    x, y = test_data(model)
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    before = dict(matplotlib.rcParams)
    result = report(
        model, methods(model), x, y, path, title="A <title>", seconds={"Gaussian": 0.5}
    )
    assert dict(matplotlib.rcParams) == before
    return result, path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_nothing_else(made):
    result, text = made
    page = stands_alone(text)
    assert result.path is not None
    numbers = result.table[0].get("rmse") is not None
    # scores, calibration, predictions; residuals and transforms, or confusion
    of_all = 5 if numbers else 4
    expected = of_all + 3  # the prior, weights of draws, and one method's chains
    assert page.tags.count("svg") == page.tags.count("figure") == expected
    labels = [
        value
        for tag, name, value in page.attributes
        if tag == "svg" and name == "aria-label"
    ]
    assert sum("HMC" in label for label in labels) == of_all + 1
    assert sum("VI <b>&" in label for label in labels) == of_all
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {
        value[1:] for _, name, value in page.attributes if name in {"href", "xlink:href"}
    }
    assert targets <= set(ids)
    assert page.tags.count("summary") == page.tags.count("details")
    assert [tag for tag in page.tags if tag in {"h1", "h2", "h3", "h4"}][:3] == [
        "h1",
        "h2",
        "h3",
    ]


def test_a_report_needs_no_test_rows(model):
    made = report(model, {"HMC": chains(model, draws=400)}, path=None)
    page = stands_alone(made.html())
    assert "No rows were held out" in " ".join(page.text)
    (only,) = made.sections[0].comparison.evaluations
    assert only.diagnosis.looked_at == "leave-one-out"
    assert only.row["rows"] == len(model.x)


def test_labels_are_escaped_and_every_method_is_there(made, model):
    _, text = made
    words = " ".join(Page(text).text)
    assert "<b>&" not in text.replace("&lt;b&gt;&amp;", "")
    for name in methods(model):
        assert words.count(name) >= 5  # verdict, table, run, program, and a figure's panel
    assert "A <title>" in words


def test_the_table_holds_the_metrics(made, model):
    result, _ = made
    x, y = test_data(model)
    rows = {row["method"]: row for row in result.table}
    assert list(rows) == list(methods(model))
    p = predict(model, methods(model)["HMC"], x)
    assert rows["HMC"]["lppd"] == pytest.approx(metrics.lppd(p, y))
    if model.likelihood.kind == "classification":
        assert rows["HMC"]["brier"] == pytest.approx(metrics.brier(p, y))
        assert rows["HMC"]["ece"] == pytest.approx(metrics.ece(p, y))
    else:
        assert rows["HMC"]["crps"] == pytest.approx(metrics.crps(p, y))
        assert rows["HMC"]["coverage_90"] == pytest.approx(metrics.coverage(p, y, 0.9))
    draws = methods(model)["HMC"]
    assert rows["HMC"]["log_joint"] == pytest.approx(
        float(draws.log_joint.mean()), rel=1e-5
    )
    assert rows["HMC"]["log_likelihood"] == pytest.approx(
        float(model.log_likelihood(draws.flat).mean()), rel=1e-5
    )
    assert rows["HMC"]["seconds_per_1000_draws"] == pytest.approx(12.5 / 1.6)
    assert rows["HMC"]["gradients"] == 32000
    assert rows["Gaussian"]["draws"] == 4000
    assert rows["Gaussian"]["seconds"] == 0.5
    assert rows["prior $x$"]["seconds"] is None


def test_directions_that_the_inputs_say_nothing_of_are_seen_in_the_prior() -> None:
    """Two rows decide two directions of five: chains that never leave their place in the others
    predict alike there.
    """
    x = normal(2, 4, seed=1)
    net = built(lambda: torch.nn.Linear(4, 1))
    model = bf.BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(0.1), x, x.sum(1)
    )
    design = torch.cat([x, torch.ones(2, 1, dtype=torch.float64)], 1)
    seen = torch.linalg.pinv(design) @ design  # the projection to what the rows decide
    free = torch.randn(4, 200, 5, generator=generator(5), dtype=torch.float64)
    # the posterior of what the rows decide: noise .1, prior 1
    values, axes = torch.linalg.eigh(design.T @ design / 0.1**2 + torch.eye(5))
    mean = torch.linalg.solve(axes @ values.diag() @ axes.T, design.T @ x.sum(1) / 0.1**2)
    decided = (mean + (free / values.sqrt()) @ axes.T) @ seen.T
    unseen = torch.eye(5, dtype=torch.float64) - seen
    good = dressed(model, decided + free @ unseen)
    stuck = dressed(model, decided + (free[:, :1] + 0.05 * free) @ unseen)
    assert diagnose(model, good).draws.grade == "yes"
    found = diagnose(model, stuck)
    assert float(found.r_hat.max()) < 1.01
    assert found.verdict == "do not trust"
    assert "log prior" in str(found)


def test_equal_methods_are_marked_alike_and_beaten_ones_are_not(undrawn, model):
    x, y = test_data(model)
    theta = chains(model, draws=400).flat
    worse = 30 * model.sample_prior(2, seed=1)
    assert (
        report(model, chains(model, draws=50), x, y, path=None).table[0]["method"] == "HMC"
    )
    methods = [("a", theta), ("b", theta.clone()), ("c", worse)]
    table = [each.row for each in compare(methods, model, x, y).evaluations]
    assert table[0]["best"] == table[1]["best"]
    assert "lppd" in table[0]["best"]
    assert "lppd" not in table[2]["best"]


def test_the_reference_is_the_exact_sampler_that_converged(undrawn, model):
    x, y = test_data(model)
    good, stuck = (
        chains(model, draws=400),
        chains(model, centre=model.sample_prior(4, seed=0), spread=0.01),
    )
    found = compare([("stuck", stuck), ("good", good), ("prior", good.flat)], model, x, y)
    assert found.reference == "good"
    assert found.headline.startswith("Use good")
    alone = compare([("stuck", stuck)], model, x, y)
    assert alone.reference is None
    assert alone.headline == alone.evaluations[0].diagnosis.headline
    nothing = compare([("a", good.flat), ("b", stuck.flat)], model, x, y)
    assert "no exact sampler" in nothing.headline


def test_the_terminal_shows_an_aligned_table(made):
    result, _ = made
    lines = str(result).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("method"))
    assert {"method", "LPPD", "verdict"} <= set(lines[start].split())
    column = lines[start].index("verdict")
    assert all(
        line[column - 1] == " " and line[column] != " "
        for line in lines[start + 1 : start + 8]
    )


def test_several_experiments_in_one_file(tmp_path):
    parts = []
    for kind, features in (("classification", 2), ("regression", 1)):
        model = make_model(kind, features)
        x, y = test_data(model)
        parts.append(
            report(
                model,
                {"only": chains(model, draws=50)},
                x,
                y,
                path=None,
                title=f"about {kind}",
            )
        )
        assert parts[-1].path is None
    both = Report.combine(parts, tmp_path / "both.html", title="Both")
    page = stands_alone((tmp_path / "both.html").read_text(encoding="utf-8"))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert [row["experiment"] for row in both.table] == [
        "about classification",
        "about regression",
    ]
    assert "about regression" in str(both)
    with pytest.raises(ValueError, match="no reports"):
        Report.combine([], tmp_path / "none.html")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"results": {}}, "at least one"),
        ({"results": {"": torch.zeros(2, 13)}}, "must be text"),
        ({"results": {"a": 3}}, "expected Draws"),
        ({"results": {"a": torch.zeros(2, 5)}}, "weights must be"),
        ({"y_test": torch.zeros(3)}, "3"),
        ({"y_test": None}, "come together"),
        ({"x_test": None}, "come together"),
        ({"x_test": torch.zeros(4, 7)}, "as in training"),
        ({"seconds": {"b": 1.0}}, "no results: b"),
        ({"path": "."}, "folder"),
    ],
)
def test_bad_input_is_refused_before_any_work(change, message, monkeypatch):
    model = make_model("regression")
    x, y = test_data(model)
    monkeypatch.setattr(
        "bnnflow.report.html.compare", lambda *_: pytest.fail("work has started")
    )
    arguments = {
        "results": {"a": torch.zeros(2, model.dim)},
        "x_test": x,
        "y_test": y,
        "path": None,
    } | change
    with pytest.raises((TypeError, ValueError), match=message):
        report(model=model, **arguments)


# ---------------------------------------- names, and what is folded away


def test_targets_have_their_names_and_units(model) -> None:
    x, y = test_data(model)
    theta = model.sample_prior(30, seed=0)
    if model.likelihood.kind == "classification":
        names = {"targets": ["<b>kind"], "classes": ["a & b", "<i>", "$c$"]}
    else:
        names = {"targets": ["<b>price"], "units": ["EUR & $"]}
    made = report(model, {"prior": theta, "again": theta}, x, y, path=None, **names)
    text = made.html()
    words = " ".join(stands_alone(text).text)
    for each in itertools.chain(*names.values()):
        assert each in words
    assert "<b>kind" not in text
    assert "<b>price" not in text
    assert "<i>" not in text
    if model.likelihood.kind == "regression":
        assert "RMSE (EUR & $)" in words
        assert "<b>price (EUR & $)" in words  # along an axis


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        ("regression", {"targets": "price"}, "targets must be a list"),
        ("regression", {"targets": ["a", "b"]}, "targets has 2 names for 1"),
        ("regression", {"units": [""]}, "units has an empty name"),
        ("regression", {"targets": [3]}, "must be a string"),
        ("regression", {"classes": ["a"]}, "classes are those of labels"),
        ("classification", {"classes": ["a", "b"]}, "classes has 2 names for 3"),
        ("classification", {"classes": ["a", "b", "a"]}, "classes gives two the same name"),
        ("classification", {"units": ["m"]}, "units are those of numbers"),
    ],
)
def test_names_that_do_not_fit_are_refused(kind, names, message) -> None:
    model = make_model(kind)
    with pytest.raises((TypeError, ValueError), match=message):
        report(model, {"a": model.sample_prior(5, seed=0)}, path=None, **names)


def test_several_targets_are_told_one_by_one() -> None:
    net = built(lambda: nn.Linear(2, 2), torch.float32)
    x = torch.randn(40, 2, generator=generator(3))
    y = torch.stack([x[:, 0], 1000 * x[:, 1]], 1)
    model = BayesianModel(net, Normal(0.0, 1.0), likelihoods.Gaussian(0.3), x, y)
    theta = model.sample_prior(50, seed=0)
    names = {"targets": ["height", "weight"], "units": ["m", "kg"]}
    made = report(model, {"prior": theta}, x, y, path=None, **names)
    words = " ".join(stands_alone(made.html()).text)
    (row,) = made.sections[0].by_target
    p = predict(model, theta, x)
    expected = (p.mean - y.double()).square().mean(0).sqrt()
    assert [row["rmse 0"], row["rmse 1"]] == pytest.approx(expected.tolist())
    assert row["coverage 0"] == pytest.approx(
        float((((metrics.pit(p, y) - 0.5).abs() <= 0.45).double().mean(0))[0])
    )
    assert "height (m): RMSE" in words
    assert "weight (kg): 90% cover" in words
    assert "RMSE (m)" not in words, "there is no unit of both"


def test_the_program_of_a_report_makes_it_again(
    undrawn, model, tmp_path, monkeypatch
) -> None:
    x, y = test_data(model)
    method = bf.HMC(step_size=0.1, max_leapfrog=8)
    draws = bf.sample(model, method, chains=2, warmup=5, draws=6, seed=3, progress=False)
    given = {"<mine>": draws, "theta": draws.flat}
    made = report(model, given, x, y, path=None)
    program = made.sections[0].program
    assert program.replace("<", "&lt;") in made.html().replace("&#39;", "'").replace(
        "&gt;", ">"
    )
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "x_test": x, "y_test": y, "given": given}
    exec(program, names)
    assert torch.equal(names["results"]["<mine>"].theta, draws.theta)
    assert (tmp_path / "report.html").exists()
    assert f"torch {torch.__version__}" in program


def test_one_method_is_compared_with_none(undrawn, model) -> None:
    x, y = test_data(model)
    draws = bf.sample(
        model, bf.HMC(), chains=2, warmup=5, draws=6, seed=1_234_567, progress=False
    )
    words = " ".join(stands_alone(report(model, draws, x, y, path=None).html()).text)
    assert f"Posterior: {model.likelihood.kind}, {model.dim} weights" in words
    assert "1234567" in words, "a seed can be copied"
    assert re.search(r"\d%", words)
    assert not re.search(r"\d %", words)
    both = report(model, {"a": draws, "b": draws}, x, y, path=None)
    assert both.title.startswith("Posterior comparison")


def test_classes_of_the_prior_have_their_names() -> None:
    model = make_model("classification")
    prior = bf.predict(model, model.sample_prior(50, seed=0), model.x)
    names = [f"kind {i}" for i in range(prior.probs.shape[1])]
    figure = plots.prior_functions(prior, model.y, classes=names)
    labels = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert labels == names


def test_what_draws_a_flow_made_is_told(monkeypatch) -> None:
    monkeypatch.setattr("bnnflow.report.compare.TAKEN", 50)
    model = make_model("regression")
    x, y = test_data(model)
    training = bf.Training(steps=2, batch_size=16)
    draws = chains(model, draws=20)
    flow = bf.fit_flow(
        model, draws, velocity="weights", training=training, seed=0, progress=False
    )
    sampled = bf.sample(model, flow, draws=40, seed=1, progress=False)
    made = report(model, {"drawn": sampled, "itself": flow}, x, y, path=None)
    words = " ".join(stands_alone(made.html()).text)
    assert "Loss of flows" in words
    assert "training steps 2" in " ".join(words.split())
    assert "solver error" in words
    assert "bnnflow.correct(model, flow) weighs them" in words
    assert (
        "results['drawn'] = bf.sample(model, methods['drawn'], draws=40, seed=1)" in words
    )


def test_evidences_stand_side_by_side(undrawn, model) -> None:
    theta = chains(model, draws=100).flat[None]
    even = torch.zeros(theta.shape[:2], dtype=torch.float64)
    draws = Draws(
        theta, model.log_joint(theta), log_weights=even, log_evidence=(-12.3456, 0.25)
    )
    made = report(model, {"a": draws, "b": theta}, path=None)
    assert made.table[0]["log_evidence"] == -12.3456
    assert "log_evidence" not in made.table[1]
    words = " ".join(Page(made.html()).text)
    assert "−12.35 ± 0.25" in words
    assert "Weights of draws" in words


# ---------------------------------------- what cannot be told


def test_methods_whose_numbers_are_broken_are_left_out_by_name(model) -> None:
    x, y = test_data(model)
    theta = chains(model, draws=50).flat
    broken = theta.clone()
    broken[3, 0] = math.nan
    weights = torch.zeros(len(theta), dtype=torch.float64)
    weights[7] = math.nan
    methods = {"good": theta, "lost <draw>": broken, "lost weight": (theta, weights)}
    made = report(model, methods, x, y, path=None)
    assert [row["method"] for row in made.table] == ["good"]
    words = " ".join(" ".join(stands_alone(made.html()).text).split())
    assert "lost <draw> is left out: 1 of 200 draws have NaN or infinite weights" in words
    assert "lost weight is left out: log weights must not be NaN" in words
    assert "lost weight is left out" in str(made)
    with pytest.raises(ValueError, match="lost weight: log weights must not be NaN"):
        report(model, {"lost weight": (theta, weights)}, x, y, path=None)


def test_one_row_is_enough_for_a_report(model) -> None:
    x, y = test_data(model)
    made = report(model, {"HMC": chains(model, draws=50)}, x[:1], y[:1], path=None)
    stands_alone(made.html())
    assert made.table[0]["rows"] == 1


def test_no_rows_are_told_and_the_page_is_of_those_of_training(model) -> None:
    x, y = test_data(model)
    draws = chains(model, draws=50)
    made = report(model, draws, x[:0], y[:0], path=None)
    words = " ".join(stands_alone(made.html()).text)
    assert "x_test has no rows" in words
    assert "No rows were held out" in words
    assert made.table[0]["rows"] == len(model.x)
    with pytest.raises(ValueError, match="y_test"):
        report(model, draws, x, y[:0], path=None)


@pytest.mark.parametrize("case", ["one draw", "one chain", "equal draws"])
def test_few_draws_or_equal_ones_are_told(model, case) -> None:
    rows = () if case == "one draw" else test_data(model)
    shape = {"one draw": (1, 1), "one chain": (1, 40), "equal draws": (3, 5)}[case]
    theta = model.sample_prior(math.prod(shape), seed=0).reshape(*shape, -1)
    theta = theta[:1, :1].expand_as(theta).clone() if case == "equal draws" else theta
    made = report(model, dressed(model, theta), *rows, path=None)
    found = made.sections[0].comparison.evaluations[0].diagnosis
    assert found.draws.grade in ("no", "with care")
    words = " ".join(stands_alone(made.html()).text)
    assert found.draws.why[1:] in words


def test_a_likelihood_without_intervals_is_reported_without_them() -> None:
    class Cauchy(likelihoods.Likelihood):
        def validate(self, y, n_outputs):
            return y.reshape(len(y), -1)

        def log_prob(self, outputs, y, parameters):
            return -((y - outputs).square() + 1).log().sum(-1) - math.log(math.pi)

        def mean(self, outputs, parameters=None):
            return outputs

    x = torch.randn(30, 2, generator=generator(1))
    net = built(lambda: nn.Linear(2, 1), torch.float32)
    model = BayesianModel(net, Normal(0.0, 1.0), Cauchy(), x, x[:, 0])
    draws = bf.sample(
        model, bf.HMC(), chains=2, warmup=20, draws=20, seed=0, progress=False
    )
    for rows in ((), (x, x[:, 0])):
        made = report(model, {"a": draws, "b": draws.flat}, *rows, path=None)
        words = " ".join(stands_alone(made.html()).text)
        assert "Cauchy has no cdf and variance" in words
        assert "rmse" in made.table[0]
        assert not {"crps", "coverage_90"} & set(made.table[0])


# ---------------------------------------- plots


def test_bands_cover_what_they_should(model):
    if model.likelihood.kind == "classification":
        with pytest.raises(ValueError, match="expected regression"):
            plots.predictive_band({"a": predict(model, model.sample_prior(5, 0), model.x)})
        return
    single = make_model("regression", features=1)
    x = torch.linspace(-2, 2, 30)[:, None].flip(0)  # need not be sorted
    p = predict(single, single.sample_prior(50, seed=0), x)
    figure = plots.predictive_band(
        {"a": p, "b": p}, single.x, single.y, truth=x[:, 0], x_label="x (m)"
    )
    assert len(figure.axes) == 2
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    with pytest.raises(ValueError, match="one feature"):
        plots.predictive_band({"a": predict(model, model.sample_prior(5, 0), model.x)})


@pytest.mark.parametrize("count", [1, 4, 8])
def test_figures_come_out_for_any_number_of_methods(model, count):
    x, y = test_data(model)
    predictions = {
        f"m{i}": predict(model, model.sample_prior(20, seed=i), x) for i in range(count)
    }
    before = dict(matplotlib.rcParams)
    rest = plots.confusion if model.likelihood.kind == "classification" else plots.residuals
    for draw in (plots.reliability, plots.predictive, rest):
        figure = draw(predictions, y)
        shown = [ax for ax in figure.axes if ax.get_visible()]
        assert [ax.get_title(loc="left") for ax in shown] == list(predictions)
        assert all(ax.get_xlim() == shown[0].get_xlim() for ax in shown)
    assert dict(matplotlib.rcParams) == before
    assert len(plots.scores(predictions, y).axes[0].get_yticks()) == count


def test_twelve_methods_have_colours_that_are_told_apart() -> None:
    """By at least twelve units of CIELAB, where two and a half are just seen side by side, and by
    markers.
    """
    names = [f"m{i}" for i in range(12)]
    shades = [_lab(each) for each in plots.colours(names).values()]
    apart = [math.dist(a, b) for a, b in itertools.combinations(shades, 2)]
    assert min(apart) > 12
    assert len(set(style.markers(names).values())) == 12


def _lab(colour: str) -> tuple[float, float, float]:
    """Return the CIELAB coordinates of a colour of the screen (white point D65)."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts > 0.04045, ((parts + 0.055) / 1.055) ** 2.4, parts / 12.92)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(to_xyz) @ linear / [0.9505, 1.0, 1.089])
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_importing_predictions_reports_and_data_is_light():
    script = (
        "import sys, bnnflow.predictive, bnnflow.report, bnnflow.data;"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    assert not {"arviz", "matplotlib", "sklearn", "xarray", "pandas", "jinja2"} & set(
        loaded.split()
    )
