"""Parameters with ``requires_grad=False`` are constants of the model."""

import copy
import pickle

import pytest
import torch
from torch import nn

import bnnflow as bf
from bnnflow import likelihoods, priors
from bnnflow.weights import WeightSpec


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def frozen(net, *modules):
    for module in modules:
        net.get_submodule(module).requires_grad_(False)
    return net


def data(n=12, inputs=3):
    x = torch.randn(n, inputs, generator=generator(1))
    return x, torch.sin(x).sum(1, keepdim=True)


def model_of(net, x=None, y=None, prior=None, likelihood=None):
    own_x, own_y = data()
    x, y = own_x if x is None else x, own_y if y is None else y
    return bf.BayesianModel(
        net, prior or priors.Normal(0.8), likelihood or likelihoods.Gaussian(0.3), x, y
    )


@pytest.fixture
def perceptron(seeded):
    with seeded(0):
        return nn.Sequential(
            nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)
        )


@pytest.fixture
def trunk_and_head(seeded):
    with seeded(0):
        trunk = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh())
        trunk(torch.randn(50, 3))  # moves the running statistics
        head = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
    return trunk.eval(), head


def test_a_frozen_trunk_is_the_head_on_its_features(trunk_and_head):
    trunk, head = trunk_and_head
    x, y = data()
    whole = model_of(nn.Sequential(copy.deepcopy(trunk).requires_grad_(False), head), x, y)
    alone = model_of(head, trunk(x).detach(), y)
    assert whole.dim == alone.dim
    theta = whole.sample_prior(5, seed=0)
    torch.testing.assert_close(alone.sample_prior(5, seed=0), theta)
    value, grad = whole.log_joint_and_grad(theta)
    torch.testing.assert_close(alone.log_joint_and_grad(theta), (value, grad))
    options = {
        "chains": 2,
        "warmup": 5,
        "draws": 5,
        "seed": 3,
        "progress": False,
        "init": "prior",
    }
    first, second = (bf.sample(model, bf.MCLMC(), **options) for model in (whole, alone))
    torch.testing.assert_close(first.theta, second.theta, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("names", "left"),
    [(["0"], [5]), (["2"], []), (["4"], [6]), ([], [6, 5])],
)
def test_constants_pin_the_units_that_they_touch(perceptron, names, left):
    spec = WeightSpec.of(frozen(perceptron, *names))
    assert list(spec.widths.values()) == left
    assert spec.widths.keys() == spec.activations.keys()
    assert bool(spec.layers) == (not names)
    model = model_of(perceptron)
    theta = model.sample_prior(4, seed=0)
    moved = model.spec.random_symmetry(theta, 1)
    assert torch.equal(moved, theta) == (not left)
    torch.testing.assert_close(model.outputs(moved), model.outputs(theta))


def test_one_frozen_bias_pins_its_layer_alone(perceptron):
    perceptron[0].bias.requires_grad_(False)
    spec = WeightSpec.of(perceptron)
    assert "0.bias" not in spec.names
    assert set(spec.widths) == {"h2"}


class Trunk(nn.Module):
    """Features that no label can be found for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 8)

    def forward(self, x):
        return torch.cat([torch.softmax(self.inner(x), -1), x], -1)


def test_a_constant_trunk_hides_no_symmetry_of_the_head(seeded):
    with seeded(0):
        net = nn.Sequential(Trunk(), nn.Linear(11, 4), nn.Tanh(), nn.Linear(4, 1))
    with pytest.raises(ValueError, match="softmax"):
        WeightSpec.of(net)
    spec = WeightSpec.of(frozen(net, "0"))
    assert spec.widths == {"h1": 4}
    assert spec.axes["1.weight"] == ("h1", None)
    assert not spec.layers


def test_networks_go_there_and_back(trunk_and_head):
    trunk, head = trunk_and_head
    net = nn.Sequential(trunk.requires_grad_(False), head)
    model = model_of(net)
    theta = model.sample_prior(1, seed=4)[0]
    back = model.network_at(theta)
    assert torch.equal(model.theta_of(back), theta)
    assert {n: p.requires_grad for n, p in back.named_parameters()} == {
        n: p.requires_grad for n, p in net.named_parameters()
    }
    assert torch.equal(back[0][0].weight, net[0][0].weight)
    torch.testing.assert_close(back(model.x), model.outputs(theta))
    assert torch.equal(model_of(back).theta_of(back), theta)


@pytest.mark.parametrize("name", ["0.0.weight", "0.1.running_mean"])
def test_another_constant_is_another_network(trunk_and_head, name):
    trunk, head = trunk_and_head
    net = nn.Sequential(trunk.requires_grad_(False), head)
    model = model_of(net)
    other = copy.deepcopy(net)
    other.state_dict()[name].mul_(1.5)
    assert model_of(other).fingerprint() != model.fingerprint()
    with pytest.raises(ValueError, match=name):
        model.theta_of(other)


def test_nothing_free_is_refused_with_the_way_out(perceptron):
    with pytest.raises(ValueError, match=r"requires_grad=False.*requires_grad_\(True\)"):
        model_of(perceptron.requires_grad_(False))
    with pytest.raises(ValueError, match="no parameters"):
        model_of(nn.Tanh())


def test_constants_move_with_the_model(perceptron):
    model = model_of(frozen(perceptron, "0"))
    theta = model.sample_prior(3, seed=0)
    moved = model.to(dtype=torch.float64)
    torch.testing.assert_close(moved.outputs(theta.double()).float(), model.outputs(theta))
    line = model.linearised(theta[0])
    assert line.dim == model.dim
    torch.testing.assert_close(line.outputs(theta[:1]), model.outputs(theta[:1]))


@pytest.mark.parametrize(
    "prior", [priors.FanIn(), priors.Hierarchical(fan_in=True), priors.Horseshoe()]
)
def test_every_prior_is_on_the_free_weights_alone(perceptron, prior):
    model = model_of(
        frozen(perceptron, "2"), prior=prior, likelihood=likelihoods.Gaussian()
    )
    assert not [name for name in model.spec.names if "2.weight" in name or "2.bias" in name]
    assert model.log_joint(model.sample_prior(3, seed=0)).isfinite().all()


def test_a_pyro_model_has_sites_for_what_is_free(perceptron):
    import pyro.poutine as poutine

    model = model_of(frozen(perceptron, "0"))
    theta = model.sample_prior(1, seed=0)[0]
    given = poutine.condition(model.to_pyro(), model.spec.unflatten(theta))
    trace = poutine.trace(given).get_trace()
    assert {name for name in trace.nodes if "weight" in name or "bias" in name} == set(
        model.spec.names
    )
    torch.testing.assert_close(trace.log_prob_sum().double(), model.log_joint(theta))


CHAINS = {"chains": 2, "warmup": 20, "draws": 20}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (bf.SGLD(), CHAINS),
        (bf.MCLMC(), CHAINS),
        (bf.SMC(particles=32), {"chains": 2}),
        (bf.VI(steps=50), {"draws": 20}),
        (bf.Laplace(), {"draws": 20}),
        (bf.SWAG(2, steps=50), {"draws": 20}),
        (bf.DeepEnsemble(3, 20), {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_methods_infer_what_is_free(perceptron, method, options):
    model = model_of(frozen(perceptron, "0", "2"))
    draws = bf.sample(model, method, seed=0, progress=False, **options)
    assert draws.theta.shape[-1] == model.dim == 6
    assert draws.theta.isfinite().all()


def test_flows_live_on_what_is_free(perceptron, tmp_path):
    model = model_of(frozen(perceptron, "0"))
    draws = bf.sample(
        model, bf.HMC(), chains=4, warmup=20, draws=25, seed=0, progress=False
    )
    flow = bf.fit_flow(model, draws, seed=0, progress=False, training=bf.Training(steps=3))
    flow.save(tmp_path / "flow.npz")
    loaded = bf.load(tmp_path / "flow.npz", model)
    assert torch.equal(loaded.sample(3, seed=1), flow.sample(3, seed=1))
    aligned = bf.align(model, draws)
    torch.testing.assert_close(
        model.log_joint(aligned.theta), draws.log_joint, rtol=1e-4, atol=1e-3
    )


def test_a_shared_tensor_is_one_tensor(seeded):
    with seeded(0):
        net = nn.Sequential(
            nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)
        )
    net[2].weight = net[0].weight
    model = model_of(net)
    assert "2.weight" not in model.spec.names
    theta = model.sample_prior(2, seed=0)
    back = model.network_at(theta[1])
    assert back[2].weight is back[0].weight
    torch.testing.assert_close(back(model.x), model.outputs(theta)[1])
    assert torch.equal(model.theta_of(back), theta[1])
    grad = model.to(dtype=torch.float64).log_joint_and_grad(theta.double())[1]
    at = theta.double().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(model.to(dtype=torch.float64).log_joint(at).sum(), at)[0], grad
    )


# ---------------------------------------- what is computed once


class Counting(nn.Module):
    """Trunk and head of a network, and how many rows its trunk has seen."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.head, self.trunk = head, trunk  # the head is registered first, and comes last

    def forward(self, x):
        return self.head(torch.relu(self.trunk(x)).flatten(1))


@pytest.fixture
def images(seeded):
    with seeded(0):
        trunk = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)
        )
        trunk(torch.randn(20, 1, 8, 8))
        net = Counting(trunk.eval().requires_grad_(False), nn.Linear(36, 3))
        x, y = torch.randn(30, 1, 8, 8), torch.arange(30) % 3
    return net, x, y


def on_features(net, x):
    with torch.no_grad():
        return torch.relu(net.trunk(x)).flatten(1)


def test_the_head_of_a_frozen_network_is_a_model_of_its_own(images):
    """Same densities, draws and predictions, by the same compiled code; names stay."""
    net, x, y = images
    whole = model_of(net, x, y, likelihood=likelihoods.Categorical())
    head = model_of(net.head, on_features(net, x), y, likelihood=likelihoods.Categorical())
    assert whole.spec.names == ("head.weight", "head.bias")
    assert whole.is_compiled == head.is_compiled
    options = {"chains": 3, "warmup": 10, "draws": 10, "seed": 1, "progress": False}
    draws = bf.sample(whole, bf.HMC(), **options)
    assert torch.equal(draws.theta, bf.sample(head, bf.HMC(), **options).theta)
    new = torch.randn(7, 1, 8, 8, generator=generator(2))
    expected = head.outputs(draws.flat, on_features(net, new))
    torch.testing.assert_close(whole.outputs(draws.flat, new), expected)
    torch.testing.assert_close(
        bf.predict(whole, draws, new).probs, expected.softmax(-1).mean(0).double()
    )
    trained = whole.network_at(draws.flat[0])
    torch.testing.assert_close(trained(new), expected[0])
    rows = torch.tensor([3, 5, 5])
    torch.testing.assert_close(
        whole.subset(rows).log_likelihood(draws.flat),
        head.subset(rows).log_likelihood(draws.flat),
    )
    wide = whole.to(dtype=torch.float64)
    torch.testing.assert_close(
        wide.log_joint(draws.flat.double()),
        whole.log_joint(draws.flat),
        rtol=1e-5,
        atol=1e-4,
    )
    expansion = whole.linearised(draws.flat[0])
    torch.testing.assert_close(
        expansion.outputs(draws.flat, new), expected, rtol=1e-4, atol=1e-4
    )


def test_constants_are_evaluated_once(images, monkeypatch):
    net, x, y = images
    model = model_of(net, x, y, likelihood=likelihoods.Categorical())
    theta = model.sample_prior(4, seed=0)
    model.log_joint_and_grad(theta)
    calls = []
    real = nn.Conv2d.forward
    monkeypatch.setattr(
        nn.Conv2d, "forward", lambda *a: (calls.append(len(a[1])), real(*a))[1]
    )
    model.log_joint_and_grad(theta)
    model.subset(slice(0, 9)).log_joint_and_grad(theta)
    model.at(theta).grad_and_factor()
    assert calls == []
    new = torch.randn(600, 1, 8, 8, generator=generator(2))
    first = model.outputs(theta, new)
    assert torch.equal(model.outputs(theta, new), first)
    assert sum(calls) == 600
    new.mul_(2)  # the same tensor with other values
    assert not torch.equal(model.outputs(theta, new), first)


class Branching(nn.Module):
    """Cannot be traced: it looks at values."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, x):
        features = self.trunk(x)
        return self.head(features if x.shape[0] > 0 else x)


class Skipping(nn.Module):
    """What is constant meets the rest in two places."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, x):
        return self.head(self.trunk(x)) + x.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", [Branching, Skipping])
def test_networks_that_cannot_be_cut_are_computed_whole(kind, seeded):
    with seeded(0):
        trunk, head = nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 1)
    net = kind(trunk, head)
    model = model_of(net)
    theta = model.sample_prior(3, seed=0)
    with torch.no_grad():
        expected = [model.network_at(row)(model.x) for row in theta]
    torch.testing.assert_close(model.outputs(theta), torch.stack(expected))


def test_a_frozen_embedding_takes_integers(seeded):
    with seeded(0):
        net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
    net[0].requires_grad_(False)
    x = torch.randint(9, (20, 2), generator=generator(0))
    model = model_of(net, x, torch.arange(20) % 2, likelihood=likelihoods.Categorical())
    assert model.dim == 18
    theta = model.sample_prior(3, seed=0)
    with torch.no_grad():
        expected = torch.stack([model.network_at(row)(x[:5]) for row in theta])
    torch.testing.assert_close(model.outputs(theta, x[:5]), expected)


def test_models_with_a_trunk_are_kept(images):
    net, x, y = images
    model = model_of(net, x, y, likelihood=likelihoods.Categorical())
    theta = model.sample_prior(3, seed=0)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.log_joint(theta), model.log_joint(theta))
    assert again.fingerprint() == model.fingerprint()
    assert torch.equal(copy.deepcopy(model).log_joint(theta), model.log_joint(theta))
