"""Every engine's draws go to ArviZ, of both generations: complete, named, aligned, and said to be
what they are.
"""

import importlib.util
import json
import warnings
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.diagnostics import ess, import_arviz, is_datatree, rhat
from tests.problems import built, chain, normal, one_in

SIZES = {"chains": 2, "warmup": 100, "draws": 100}
ENGINES = {
    "HMC": (bf.HMC(), SIZES),
    "AdjustedMCLMC": (bf.AdjustedMCLMC(), SIZES),
    "MCLMC": (bf.MCLMC(), SIZES),
    "SGLD": (bf.SGLD(), {"chains": 2, "draws": 100}),
    "SGHMC": (bf.SGHMC(), {"chains": 2, "draws": 100}),
    "ParallelTempering": (bf.ParallelTempering(levels=5, max_leapfrog=8), SIZES),
    "SMC": (bf.SMC(particles=200), {"chains": 2}),
    "PyroNUTS": (bf.PyroNUTS(max_tree_depth=4), {"chains": 2, "warmup": 30, "draws": 40}),
    "VI": (bf.VI(steps=300), {"draws": 100}),
    "Laplace": (bf.Laplace(), {"draws": 100}),
    "SWAG": (bf.SWAG(steps=300), {"draws": 100}),
    "DeepEnsemble": (bf.DeepEnsemble(members=30, steps=200), {}),
    "MCDropout": (bf.MCDropout(steps=300), {"draws": 100}),
    "flow": (None, {"draws": 100}),
}
ORIGINS = dict.fromkeys(("VI", "Laplace", "SWAG", "flow"), "an approximation")
ORIGINS |= dict.fromkeys(("DeepEnsemble", "MCDropout"), "no posterior")
KINDS = {
    "normal": (lambda: likelihoods.Gaussian(), 1, lambda x: x.sum(1)),
    "several": (lambda: likelihoods.Gaussian(), 2, lambda x: x + 0.1),
    "varying": (lambda: likelihoods.HeteroscedasticGaussian(), 2, lambda x: x.sum(1)),
    "raw units": (
        lambda: likelihoods.Standardised(likelihoods.Gaussian(), 900.0, 50.0),
        1,
        lambda x: 900 + 50 * x.sum(1),
    ),
    "counts": (lambda: likelihoods.Poisson(), 1, lambda x: torch.arange(len(x)) % 4),
    "levels": (
        lambda: likelihoods.Levels((1.0, 2.0, 4.0)),
        1,
        lambda x: torch.tensor([1.0, 2.0, 4.0]).repeat(len(x))[: len(x)],
    ),
    "classes": (lambda: likelihoods.Categorical(), 3, lambda x: torch.arange(len(x)) % 3),
    "two classes": (lambda: likelihoods.Bernoulli(), 1, lambda x: torch.arange(len(x)) % 2),
    "ordered": (lambda: likelihoods.Ordinal(3), 1, lambda x: torch.arange(len(x)) % 3),
}
GROUPS = {
    "posterior",
    "sample_stats",
    "log_likelihood",
    "posterior_predictive",
    "observed_data",
    "constant_data",
    "prior",
    "prior_predictive",
    "predictions",
}


def make(kind="normal", prior=None, hidden=3):
    likelihood, outputs, targets = KINDS[kind]
    x = normal(20, 2, seed=1, dtype=torch.float32)
    net = built(lambda: chain(2, hidden, outputs, activation=nn.Tanh), torch.float32)
    return bf.BayesianModel(net, prior or priors.Normal(1.0), likelihood(), x, targets(x))


def drawn(model, engine):
    method, sizes = ENGINES[engine]
    method = bf.GaussNewtonFlow(model) if method is None else method
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # short runs are warned of
        return bf.sample(model, method, seed=0, progress=False, **sizes)


def independent(model, chains=2, draws=50):
    """Draws of the prior, dressed as chains."""
    theta = model.sample_prior(chains * draws, seed=0).reshape(chains, draws, -1)
    stats = {"diverging": torch.zeros(chains, draws, dtype=torch.bool)}
    return bf.Draws(theta, model.log_joint(theta), stats)


def groups(data):
    return set(data.children if is_datatree() else data.groups())


def everything_of_arviz(data, folder):
    """Call what a user calls first; what fails raises."""
    az = import_arviz()
    matplotlib.use("Agg")
    some = next(iter(data["posterior"].data_vars))
    newer = is_datatree()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ArviZ, about k-hats and single chains
        assert len(az.summary(data, var_names=[some])) == data["posterior"][some][0, 0].size
        az.rhat(data)
        az.ess(data)
        loo = az.loo(data, pointwise=True)
        az.compare({"a": data, "b": data})
        one = data.sel(target=0) if "target" in data["observed_data"]["y"].dims else data
        az.loo_pit(one) if newer else az.loo_pit(one, y="y")
        az.plot_trace(data, var_names=[some])
        (az.plot_ppc_dist if newer else az.plot_ppc)(data)
        matplotlib.pyplot.close("all")
    data.to_netcdf(str(folder / "draws.nc"))
    assert groups(az.from_netcdf(str(folder / "draws.nc"))) == groups(data)
    return float(loo.elpd if newer else loo["elpd_loo"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", one_in(2, ENGINES))
def test_every_engine_is_exported_whole(engine, tmp_path):
    kind = list(KINDS)[list(ENGINES).index(engine) % len(KINDS)]
    kind = {"PyroNUTS": "classes", "flow": "normal", "Laplace": "classes"}.get(engine, kind)
    model = make(kind)
    data = bf.to_arviz(model, drawn(model, engine))
    assert groups(data) >= GROUPS
    said = data["posterior"].attrs["draws_of"]
    assert said.startswith(ORIGINS.get(engine, "the posterior"))
    elpd = everything_of_arviz(data, tmp_path)
    assert np.isfinite(elpd)


@pytest.mark.parametrize("kind", one_in(2, KINDS))
def test_every_kind_of_targets_is_exported_whole(kind, tmp_path):
    model = make(kind)
    data = bf.to_arviz(model, independent(model))
    assert groups(data) == GROUPS
    everything_of_arviz(data, tmp_path)
    several = kind == "several"
    shape = (2, 50, 20, 2) if several else (2, 50, 20)
    assert data["posterior_predictive"]["y"].shape == shape
    assert data["observed_data"]["y"].shape == shape[2:]
    assert data["log_likelihood"]["y"].shape == (2, 50, 20)


# ---------------------------------------- names


def test_axes_are_called_by_what_they_are():
    columns = ["age", "height"]
    pandas = pytest.importorskip("pandas")
    x = normal(20, 2, seed=1, dtype=torch.float32)
    net = built(lambda: chain(2, 3, 3, activation=nn.Tanh), torch.float32)
    frame = pandas.DataFrame(x.numpy(), columns=columns)
    parts = priors.Normal(1.0), likelihoods.Categorical()
    model = bf.BayesianModel(net, *parts, frame, torch.arange(20) % 3)
    classes = ["cat", "dog", "hen"]
    data = bf.to_arviz(
        model, independent(model), coords={"class": classes, "h1": list("abc")}
    )
    posterior = data["posterior"]
    assert posterior["0.weight"].dims == ("chain", "draw", "h1", "input")
    assert posterior["2.weight"].dims == ("chain", "draw", "class", "h1")
    assert posterior["2.bias"].dims == ("chain", "draw", "class")
    assert posterior["input"].to_numpy().tolist() == columns
    assert posterior["class"].to_numpy().tolist() == classes
    assert posterior["h1"].to_numpy().tolist() == ["a", "b", "c"]
    assert data["constant_data"]["x"].sel(input="age").shape == (20,)
    assert data["predictions"]["mean"].dims == ("chain", "draw", "row", "class")
    names = import_arviz().summary(data, var_names=["2.bias"]).index
    assert "2.bias[dog]" in names


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Linear(2, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.last(hidden + torch.tanh(self.middle(hidden)))


def test_inputs_and_outputs_of_other_networks_have_names_where_they_are_known():
    x, labels = normal(12, 2, seed=1, dtype=torch.float32), torch.arange(12) % 3
    parts = priors.Normal(1.0), likelihoods.Categorical()
    model = bf.BayesianModel(built(Residual, torch.float32), *parts, x, labels)
    posterior = bf.to_arviz(model, independent(model))["posterior"]
    assert posterior["first.weight"].dims[2:] == ("h1", "input")
    assert posterior["middle.weight"].dims[2:] == ("h1", "middle.weight_dim_1")
    assert posterior["last.weight"].dims[2:] == ("class", "h1")
    assert posterior["last.bias"].dims[2:] == ("class",)
    images = normal(12, 1, 6, 6, seed=1, dtype=torch.float32)
    net = built(
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
        ),
        torch.float32,
    )
    model = bf.BayesianModel(net, *parts, images, labels)
    data = bf.to_arviz(model, independent(model))
    assert data["posterior"]["3.bias"].dims[2:] == ("class",)
    assert data["posterior"]["0.weight"].dims[2:4] == ("h1", "0.weight_dim_1")
    assert data["constant_data"]["x"].dims == ("row", "x_dim_1", "x_dim_2", "x_dim_3")
    head = built(lambda: chain(2, 2, 3, activation=nn.Tanh), torch.float32)
    head[0].requires_grad_(False)  # what the rest reads are no inputs, though as many
    model = bf.BayesianModel(head, *parts, x, labels)
    posterior = bf.to_arviz(model, independent(model))["posterior"]
    assert posterior["2.weight"].dims[2:] == ("2.weight_dim_0", "2.weight_dim_1")


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        ({"class": ["a", "b"]}, "2 names for 3 of 'class'"),
        ({"target": ["a"]}, "'target', which is no axis"),
        ({"chain": [1, 2]}, "'chain', which is no axis"),
        ({"input": ["a", "a"]}, "two of 'input' the same name"),
    ],
)
def test_names_that_do_not_fit_are_refused(coords, message):
    model = make("classes")
    with pytest.raises(ValueError, match=message):
        bf.to_arviz(model, independent(model), coords=coords)


class Awkward(nn.Module):
    """Parameters called as the axes of the export are."""

    def __init__(self):
        super().__init__()
        for name in ("chain", "draw", "input", "row", "target"):
            self.register_parameter(name, nn.Parameter(torch.zeros(2)))

    def forward(self, x):
        weights = self.chain + self.draw + self.input + self.row + self.target
        return (x * weights).sum(-1, keepdim=True)


def test_parameters_may_be_called_like_axes(tmp_path):
    x = normal(20, 2, seed=1, dtype=torch.float32)
    parts = priors.Normal(1.0), likelihoods.Gaussian(0.3)
    model = bf.BayesianModel(Awkward(), *parts, x, x.sum(1))
    data = bf.to_arviz(model, independent(model))
    assert {"chain_", "draw_"} <= set(data["posterior"].data_vars)
    assert len(data["posterior"].data_vars) == 5
    data.to_netcdf(str(tmp_path / "draws.nc"))


def test_parameters_of_prior_and_likelihood_are_themselves_and_their_logarithms():
    model = make(prior=priors.Hierarchical())
    posterior = bf.to_arviz(model, independent(model))["posterior"]
    found = [
        name for name in posterior.data_vars if name.startswith(("prior.", "likelihood."))
    ]
    logs = [name for name in found if ".log_" in name]
    assert len(found) == 2 * len(logs) >= 4
    for name in logs:
        np.testing.assert_allclose(
            posterior[name.replace(".log_", ".")], np.exp(posterior[name]), rtol=1e-5
        )


# ---------------------------------------- what was done is said


def test_aligned_weights_are_other_coordinates_of_the_same_functions():
    model = make(hidden=4)
    draws = independent(model)
    data, plain = bf.to_arviz(model, draws), bf.to_arviz(model, draws, aligned=False)
    as_drawn = model.spec.unflatten(draws.theta)
    assert np.array_equal(plain["posterior"]["0.weight"], as_drawn["0.weight"])
    assert plain["posterior"].attrs["aligned"].startswith("no: left as they were drawn")
    assert data["posterior"].attrs["aligned"].startswith("yes: ")
    assert "h1" in data["posterior"].attrs["aligned"]
    moved = {
        name: torch.from_numpy(data["posterior"][name].to_numpy())
        for name in model.spec.names
    }
    theta = model.spec.flatten(moved)
    assert not torch.equal(theta, draws.theta)
    torch.testing.assert_close(model.outputs(theta), model.outputs(draws.theta))
    assert theta.var((0, 1)).sum() < draws.theta.var((0, 1)).sum()
    for group in ("predictions", "log_likelihood"):
        for name in data[group].data_vars:
            np.testing.assert_array_equal(data[group][name], plain[group][name])


def test_what_cannot_be_aligned_is_said():
    linear = built(lambda: nn.Linear(2, 1), torch.float32)
    x = normal(20, 2, seed=1, dtype=torch.float32)
    parts = priors.Normal(1.0), likelihoods.Gaussian(0.3)
    model = bf.BayesianModel(linear, *parts, x, x.sum(1))
    attrs = bf.to_arviz(model, independent(model))["posterior"].attrs
    assert attrs["aligned"] == "no: the posterior has no symmetries"
    unknown = bf.BayesianModel(Awkward(), *parts, x, x.sum(1))
    attrs = bf.to_arviz(unknown, independent(unknown))["posterior"].attrs
    assert attrs["aligned"].startswith("no: the symmetries are not known")


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"method": "DeepEnsemble"}, "no posterior: trained networks"),
        ({"method": "MCDropout"}, "no posterior: trained networks"),
        ({"method": "VI"}, "an approximation of the posterior"),
        ({"method": "Flow"}, "an approximation of the posterior"),
        ({"method": "HMC"}, "the posterior"),
        ({}, "an unknown origin"),
        ({"method": "refine"}, "the posterior"),
        ({"method": "MCLMC", "exact": False}, "the posterior, up to a bias"),
    ],
)
def test_draws_that_are_no_posterior_say_so(info, said):
    model = make()
    draws = replace(independent(model), stats={}, info=info)
    attrs = bf.to_arviz(model, draws)["posterior"].attrs
    assert attrs["draws_of"].startswith(said)
    assert json.loads(attrs["info"]) == info


def test_chains_are_draws_of_the_posterior():
    model = make()
    attrs = bf.to_arviz(model, independent(model))["posterior"].attrs
    assert attrs["draws_of"] == "the posterior"
    assert "resampled" not in attrs


def test_resampling_is_said():
    model = make()
    even = torch.zeros(2, 50, dtype=torch.float64)
    draws = replace(independent(model), log_weights=even)
    data = bf.to_arviz(model, draws)
    assert data["posterior"].attrs["resampled"].startswith("100 weighted draws, worth 100,")
    assert np.array_equal(data["sample_stats"]["lp"], draws.log_joint)
    assert {"log_weight", "lp", "0.weight"} <= set(data["weighted_posterior"].data_vars)


# ---------------------------------------- rows


def test_training_rows_are_for_loo_and_others_are_predictions():
    model = make()
    draws = independent(model)
    x = normal(7, 2, seed=3, dtype=torch.float32)
    data = bf.to_arviz(model, draws, x, x.sum(1))
    log_likelihood = model.pointwise_log_likelihood(draws.theta)
    np.testing.assert_allclose(
        data["log_likelihood"]["y"], log_likelihood, rtol=1e-5, atol=1e-4
    )
    assert data["observed_data"]["y"].shape == data["constant_data"]["row"].shape == (20,)
    assert set(data["predictions"].data_vars) == {"mean", "y", "log_prob"}
    held_out = model.pointwise_log_likelihood(draws.theta, x, x.sum(1))
    np.testing.assert_allclose(data["predictions"]["log_prob"], held_out, atol=1e-4)
    assert set(data["predictions_constant_data"].data_vars) == {"x", "y"}
    np.testing.assert_array_equal(data["predictions_constant_data"]["x"], x)
    without = bf.to_arviz(model, draws, x)
    assert set(without["predictions"].data_vars) == {"mean", "y"}
    assert set(without["predictions_constant_data"].data_vars) == {"x"}
    assert without["log_likelihood"]["y"].shape == (2, 50, 20)


def test_drawn_targets_have_the_law_of_the_predictions():
    model = make("raw units")
    draws = independent(model, chains=4, draws=1000)
    data = bf.to_arviz(model, draws)
    prediction = bf.predict(model, draws)
    drawn = data["posterior_predictive"]["y"].to_numpy().reshape(4000, -1)
    errors = (drawn.mean(0) - prediction.mean.numpy()) / (prediction.sd.numpy() / 4000**0.5)
    assert np.abs(errors).max() < 4.5
    np.testing.assert_array_equal(data["observed_data"]["y"], model.y[:, 0])
    assert not np.array_equal(
        data["prior"]["0.weight"][0, :100], data["posterior"]["0.weight"][0, :100]
    )
    again = bf.to_arviz(model, draws)["posterior_predictive"]["y"]
    assert np.array_equal(again, data["posterior_predictive"]["y"])
    other = bf.to_arviz(model, draws, seed=1)["posterior_predictive"]["y"]
    assert not np.array_equal(again, other)


def test_a_likelihood_that_cannot_draw_leaves_drawn_targets_out(tmp_path):
    class Silent(likelihoods.Likelihood):
        def log_prob(self, outputs, y, parameters):
            return -(outputs - y).square().sum(-1)

        def mean(self, outputs, parameters):
            return outputs

    x = normal(20, 2, seed=1, dtype=torch.float32)
    net = built(lambda: chain(2, 3, 1, activation=nn.Tanh), torch.float32)
    model = bf.BayesianModel(net, priors.Normal(1.0), Silent(), x, x.sum(1))
    data = bf.to_arviz(model, independent(model))
    assert groups(data) == GROUPS - {"posterior_predictive", "prior_predictive"}
    assert set(data["predictions"].data_vars) == {"mean"}


def test_counts_of_a_wild_prior_are_counts():
    """Rates above the whole numbers that a double holds come out of torch as negative counts."""
    model = make("counts", prior=priors.Normal(100.0))
    drawn = bf.to_arviz(model, independent(model))["prior_predictive"]["y"]
    assert float(drawn.max()) > 1e18
    assert float(drawn.min()) >= 0


# ---------------------------------------- files and summaries


@pytest.mark.skipif(
    importlib.util.find_spec("zarr") is None, reason="zarr is not installed"
)
def test_the_export_survives_zarr(tmp_path):
    import xarray

    model = make("classes")
    names = {"class": ["cat", "dog", "hen"]}
    data = bf.to_arviz(model, independent(model), coords=names)
    tree = data if is_datatree() else data.to_datatree()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr, about strings
        tree.to_zarr(str(tmp_path / "draws.zarr"))
    back = xarray.open_datatree(str(tmp_path / "draws.zarr"), engine="zarr")
    for group in GROUPS:
        for name, values in data[group].data_vars.items():
            assert np.array_equal(back[group][name], values), (group, name)


def test_a_summary_is_that_of_arviz():
    az = import_arviz()
    model = make("classes")
    draws = independent(model, chains=4, draws=50)
    data = bf.to_arviz(model, draws)
    ours = bf.summary(model, draws)
    posterior = data["posterior"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = az.summary(data, round_to=8 if not is_datatree() else "none")
    assert list(ours.index) == list(theirs.index)
    for name in ("mean", "sd", "ess_bulk", "r_hat", "mcse_mean"):
        # of single precision, whose rounding makes ties
        np.testing.assert_allclose(ours[name], theirs[name], rtol=5e-3, atol=1e-6)
    first = posterior["0.weight"].to_numpy()[..., 1, 0]
    row = ours.loc["0.weight[1, 0]"]
    assert row["ess_tail"] == pytest.approx(float(ess(first, "tail")))
    assert row["r_hat"] == pytest.approx(float(rhat(first)))
    assert row["5%"] == pytest.approx(np.quantile(first, 0.05), rel=1e-5)


def test_a_summary_of_one_chain_or_few_draws_has_no_answer_there():
    model = make()
    one = bf.summary(model, independent(model, chains=1))
    assert one["r_hat"].isna().all()
    assert one["ess_bulk"].notna().all()
    few = bf.summary(model, independent(model, draws=2))
    assert few[["ess_bulk", "ess_tail", "mcse_mean", "r_hat"]].isna().all(axis=None)
    assert few["mean"].notna().all()


def test_estimators_export_names_of_columns_and_classes():
    pandas = pytest.importorskip("pandas")
    x = normal(40, 2, seed=1).numpy()
    table = pandas.DataFrame({"age": x[:, 0], "kind": np.where(x[:, 1] > 0, "a", "b")})
    sizes = {"network": (3,), "method": bf.Laplace(), "n_draws": 50}
    labels = np.where(x[:, 0] > 0, "right", "left")
    classifier = bf.BayesianMLPClassifier(**sizes).fit(table, labels)
    data = classifier.to_arviz()
    assert data["posterior"]["input"].to_numpy().tolist() == ["age", "kind=a", "kind=b"]
    assert data["posterior"]["class"].to_numpy().tolist() == ["left", "right"]
    y = 900 + 50 * x[:, 0] + 5 * normal(40, seed=2).numpy()
    regressor = bf.BayesianMLPRegressor(**sizes).fit(table, y)
    data = regressor.to_arviz(table[:5], y[:5])
    assert sorted(data["observed_data"]["y"].to_numpy()) == pytest.approx(sorted(y))
    np.testing.assert_allclose(data["predictions_constant_data"]["y"], y[:5])
    np.testing.assert_allclose(
        data["predictions"]["mean"].mean(("chain", "draw"))[:, 0],
        regressor.predict(table[:5]),
        rtol=1e-4,
    )
