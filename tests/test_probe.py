"""Modules that are not what they seem are refused by name when the model is made."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import bnnflow as bf
from bnnflow import likelihoods, priors


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def around(function):
    """A perceptron with a module of one's own in its middle."""
    return nn.Sequential(nn.Linear(3, 4), Applied(function), nn.Linear(4, 1))


class Straight(torch.autograd.Function):
    """Rounding that hands gradients through."""

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


class Root(nn.Module):
    """Something of one's own in the outermost forward."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(3, 1), function

    def forward(self, x):
        return self.linear(self.function(x))


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 1), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.mean.lerp_(x.mean(0).detach(), 0.1)
        return self.linear(x)


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        self.linear.weight.data.clamp_(-0.1, 0.1)
        return self.linear(x)


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed, self.attention = nn.Linear(3, 4), nn.MultiheadAttention(4, 2, **options)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        h = self.embed(x)
        return self.head(self.attention(h, h, h)[0].mean(1))


class Listed(nn.Module):
    """Layers in a list, of which torch knows nothing."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = [nn.Linear(3, 4)], nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.layers[0](x)))


class FirstSeen(nn.Module):
    """Takes what it needs from the first data that it sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x):
        if not self.ready:
            self.mean.copy_(x.mean(0).detach())
            self.ready.fill_(True)
        return x - self.mean


class Stale(nn.Module):
    """Keeps a number of the first weights."""

    def __init__(self):
        super().__init__()
        self.linear, self.total = nn.Linear(3, 1), None

    def forward(self, x):
        if self.total is None:
            self.total = self.linear.weight.detach().sum()
        return self.linear(x) + self.total


class Powers(nn.Module):
    """Parameters of any shape, one of them a single number."""

    def __init__(self):
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.tensor(2.0)), nn.Linear(3, 1)

    def forward(self, x):
        return self.scale * self.linear(x)


def replaced(place):
    """A perceptron with another forward than that of its class, which looks at the network that it
    was made with.
    """
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    module = net.get_submodule(place)
    module.forward = lambda x, forward=module.forward: 3 * forward(x)
    return net


def subtract(x):
    x -= 1
    return x


def hooked():
    net = around(torch.tanh)
    net[1].register_full_backward_hook(
        lambda module, given, made: tuple(2 * each for each in given)
    )
    return net


def straightened():
    return around(lambda x: Straight.apply(3 * x))


REFUSED = {
    "centred": (lambda: around(lambda h: h - h.mean(0)), r"'1' \(Applied\).*other rows"),
    "softmax over rows": (
        lambda: around(lambda h: h.softmax(0)),
        r"'1' \(Applied\).*other rows",
    ),
    "number of rows": (
        lambda: around(lambda h: h * len(h)),
        r"'1' \(Applied\).*other rows",
    ),
    "place of a row": (
        lambda: around(lambda h: h + torch.arange(len(h))[:, None]),
        r"'1' \(Applied\).*other rows",
    ),
    "centred above four rows": (
        lambda: around(lambda h: h - h.mean(0) if len(h) > 4 else h),
        r"'1' \(Applied\).*rows",
    ),
    "blocks of rows": (
        lambda: around(lambda h: h - h[: 12 * (len(h) // 12)].sum(0)),
        r"'1' \(Applied\).*rows",
    ),
    "more than the data": (
        lambda: Root(lambda x: x / (x.norm() if len(x) > 40 else 1)),
        r"\(Root\).*other rows",
    ),
    "sorted": (lambda: around(lambda h: h.sort(0).values), r"'1' \(Applied\).*other rows"),
    "in the outermost forward": (
        lambda: Root(lambda x: x / x.norm()),
        r"the forward of the network \(Root\).*other",
    ),
    "dropout": (lambda: around(F.dropout), r"'1' \(Applied\) is random"),
    "noise": (
        lambda: around(lambda h: h + torch.randn_like(h)),
        r"'1' \(Applied\) is random",
    ),
    "counter": (Counter, r"\(Counter\).*how often it was called"),
    "running mean": (Buffered, "'mean' is written by the forward pass"),
    "clamped weights": (Clamped, "'linear.weight' is written by the forward pass"),
    "writes to x": (
        lambda: Root(subtract),
        r"the forward of the network \(Root\) writes to the inputs",
    ),
    "relu in place": (
        lambda: nn.Sequential(
            nn.ReLU(inplace=True), nn.BatchNorm1d(3).eval(), nn.Linear(3, 1)
        ),
        r"'0' \(ReLU\) writes to the inputs",
    ),
    "straight through": (straightened, "gradient by '0.*' is not the derivative"),
    "hooked": (hooked, "gradient by '0.*' is not the derivative"),
    "detached": (
        lambda: around(lambda h: h * h.detach()),
        "gradient by '0.*' is not the derivative",
    ),
    "nothing but detached": (
        lambda: (
            Root(lambda x: x).requires_grad_(True)
            and nn.Sequential(nn.Linear(3, 1), Applied(torch.detach))
        ),
        "no derivative",
    ),
    "layers in a list": (
        Listed,
        r"a tensor \(4, 3\) that requires gradients but is none of its parameters",
    ),
    "another forward": (lambda: replaced(""), "none of its parameters"),
    "another forward of a layer": (lambda: replaced("0"), "none of its parameters"),
    "first seen": (
        lambda: around(FirstSeen()),
        r"'1.function' \(FirstSeen\) keeps something.*first called",
    ),
    "first weights": (Stale, r"\(Stale\) keeps something.*first called"),
    "computed attributes": (
        lambda: nn.Sequential(prune.random_unstructured(nn.Linear(3, 1), "weight", 0.5)),
        "net cannot be copied.*prune.remove",
    ),
    "its own weights": (
        lambda: torch.jit.script(nn.Sequential(nn.Linear(3, 1))),
        "compiled by torch.jit",
    ),
    "two types": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1).double()),
        "one floating-point type",
    ),
    "complex weights": (
        lambda: nn.Linear(3, 1, dtype=torch.complex64),
        "one floating-point type",
    ),
    "squeezed": (
        lambda: nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1), Applied(torch.squeeze)),
        "must map",
    ),
}


@pytest.fixture
def data():
    x = torch.randn(9, 3, generator=generator())
    return x, x.sum(1)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_function_of_single_rows_is_refused_by_name(name, seeded, data):
    make, message = REFUSED[name]
    with seeded(0):
        net = make()
    x, before = data[0].clone(), copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), x, data[1])
    assert torch.equal(x, data[0])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


TORCHS = {
    "padded": (
        lambda: nn.Embedding(5, 2, padding_idx=0),
        r"'0' \(Embedding\) has padding_idx=0",
    ),
    "padded bag": (
        lambda: nn.EmbeddingBag(5, 2, padding_idx=0),
        r"\(EmbeddingBag\) has padding_idx=0",
    ),
    "renormed": (lambda: nn.Embedding(5, 2, max_norm=1.0), "has max_norm=1.0"),
    "by frequency": (
        lambda: nn.Embedding(5, 2, scale_grad_by_freq=True),
        "has scale_grad_by_freq=True",
    ),
    "sparse": (lambda: nn.Embedding(5, 2, sparse=True), "has sparse=True"),
    "recurrent": (lambda: nn.LSTM(3, 2), r"'0' \(LSTM\) is recurrent.*in a loop"),
    "cell": (lambda: nn.LSTMCell(3, 2), r"'0' \(LSTMCell\) is recurrent"),
    "gated": (lambda: nn.GRU(3, 2), r"'0' \(GRU\) is recurrent"),
    "attention in training": (
        lambda: nn.MultiheadAttention(4, 2, dropout=0.1),
        r"\(MultiheadAttention\) is random",
    ),
    "encoder in training": (
        lambda: nn.TransformerEncoderLayer(4, 2),
        "is random in training",
    ),
}


@pytest.mark.parametrize("name", TORCHS)
def test_modules_of_torch_that_cannot_be_inferred_are_refused_by_name(name, seeded, data):
    make, message = TORCHS[name]
    with seeded(0):
        net = nn.Sequential(make())
    with pytest.raises(ValueError, match=message):
        bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), *data)


def test_a_constant_table_may_be_padded(seeded):
    with seeded(0):
        net = nn.Sequential(
            nn.EmbeddingBag(5, 4, padding_idx=0).requires_grad_(False), nn.Linear(4, 1)
        )
    x = torch.randint(5, (8, 3), generator=generator())
    bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), x, x.sum(1).float())


class Remembering(nn.Module):
    """Keeps what it saw, and uses none of it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        self.last = self.linear(x)
        return torch.cos(self.last)


def test_what_a_forward_only_keeps_is_no_part_of_the_model(seeded, data):
    with seeded(0):
        net = Remembering()
    model = bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), *data)
    before = model.fingerprint()
    bf.sample(model, bf.SGLD(), chains=2, warmup=2, draws=2, seed=0, progress=False)
    model.net(model.x)
    assert model.fingerprint() == before


ACCEPTED = {
    "kinks": lambda: around(torch.relu),
    "max": lambda: around(lambda h: h * (h == h.amax(1, keepdim=True))),
    "its own type": lambda: around(lambda h: h + torch.ones(4, dtype=torch.float32)),
    "in place inside": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(inplace=True), nn.LayerNorm(4), nn.Linear(4, 1)
    ),
    "zero outputs": lambda: around(torch.zeros_like),
    "small weights": lambda: around(lambda h: 1e-12 * h),
    "large weights": lambda: around(lambda h: 1e12 * h),
    "a single number": Powers,
    "the norm of a row": lambda: around(lambda h: h / h.norm(dim=1, keepdim=True)),
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_honest_modules_are_accepted(name, rows, seeded, data):
    with seeded(0):
        net = ACCEPTED[name]()
    bf.BayesianModel(
        net, priors.Normal(), likelihoods.Gaussian(0.3), data[0][:rows], data[1][:rows]
    )


def test_a_replaced_forward_is_what_is_computed(seeded, data):
    with seeded(0):
        net = replaced("1")
        model = bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), *data)
    (theta,) = model.sample_prior(1, seed=0)
    expected = torch.func.functional_call(net, model.spec.unflatten(theta), (data[0],))
    assert torch.allclose(model.outputs(theta), expected)
    assert model.spec.layers == ()
    assert "a forward that is not that of its class" in model.spec.unknown


def test_data_that_a_module_was_shown_before_are_its_constants(seeded, data):
    with seeded(0):
        net = around(FirstSeen())
    net(data[0])
    model = bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(0.3), *data)
    theta = model.sample_prior(1, seed=0)
    assert torch.equal(model.outputs(theta)[:, :1], model.outputs(theta, data[0][:1]))


class Encoder(nn.Module):
    def __init__(self, layers=0):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.embed = nn.Linear(3, 4)
        self.encode = nn.TransformerEncoder(layer, layers) if layers else layer
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.encode(self.embed(x)).mean(1))


@pytest.mark.parametrize(
    "make",
    [Encoder, lambda: Encoder(2), lambda: Attention(batch_first=True, dropout=0.2)],
    ids=["layer", "encoder", "attention"],
)
def test_attention_in_evaluation_is_inferred(make, seeded):
    with seeded(0):
        net = make().eval()
    x = torch.randn(6, 5, 3, generator=generator())
    model = bf.BayesianModel(
        net, priors.Normal(0.3), likelihoods.Gaussian(0.3), x, x.sum((1, 2))
    )
    theta = model.sample_prior(3, seed=0)
    with torch.no_grad():
        expected = torch.stack([model.network_at(each)(x) for each in theta])
    torch.testing.assert_close(model.outputs(theta), expected, rtol=1e-4, atol=1e-5)
    assert not model.network_at(theta[0]).training
    exact = model.to(dtype=torch.float64)
    at = theta[:1].double().requires_grad_()
    by_torch = torch.autograd.grad(exact.log_joint(at).sum(), at)[0]
    torch.testing.assert_close(exact.log_joint_and_grad(at.detach())[1], by_torch)
    assert exact.at(at.detach()).grad_and_factor()[1].isfinite().all()
    draws = bf.sample(
        model, bf.SGLD(), chains=2, warmup=2, draws=2, seed=0, init="prior", progress=False
    )
    assert draws.theta.isfinite().all()


def test_attention_that_takes_rows_for_a_sequence_is_refused(seeded):
    with seeded(0):
        net = Attention().eval()
    x = torch.randn(6, 5, 3, generator=generator())
    with pytest.raises(
        ValueError,
        match=r"'attention' \(MultiheadAttention\).*other rows.*batch_first=True",
    ):
        bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(), x, x.sum((1, 2)))


class Elman(nn.Module):
    """A recurrent network as a loop over linear layers."""

    def __init__(self):
        super().__init__()
        self.read, self.keep, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        h = torch.zeros(len(x), 4, dtype=x.dtype)
        for step in x.unbind(1):
            h = torch.tanh(self.read(step) + self.keep(h))
        return self.head(h)


def test_a_loop_of_linear_layers_is_the_way_out_for_recurrent_networks(seeded):
    with seeded(0):
        net = Elman()
    x = torch.randn(6, 5, 3, generator=generator())
    model = bf.BayesianModel(
        net, priors.Normal(0.3), likelihoods.Gaussian(0.3), x, x.sum((1, 2))
    )
    theta = model.sample_prior(2, seed=0)
    expected = torch.stack([model.network_at(each)(x) for each in theta])
    torch.testing.assert_close(
        model.outputs(theta), expected.detach(), rtol=1e-4, atol=1e-5
    )
    mapped = torch.func.jvp(model.log_joint, (theta,), (torch.ones_like(theta),))[1]
    torch.testing.assert_close(
        mapped, model.log_joint_and_grad(theta)[1].sum(1).double(), rtol=1e-3, atol=1e-3
    )


# ---------------------------------------- likelihoods of one's own


class Own:
    """Squares of residuals, done to by a function of these, outputs and targets."""

    kind, parameters = "regression", {}

    def __init__(self, function=lambda residuals, outputs, y: residuals.square().sum(-1)):
        self.function = function

    def validate(self, y, n_outputs):
        return y.reshape(-1, 1)

    def log_prob(self, outputs, y, parameters):
        return -0.5 * self.function(outputs - y, outputs, y)

    def mean(self, outputs, parameters=None):
        return outputs


class Doubled(likelihoods.Gaussian):
    """Another density than that of the class whose score it has."""

    def log_prob(self, outputs, y, parameters):
        return 2 * super().log_prob(outputs, y, parameters)


class Shorter(Own):
    def validate(self, y, n_outputs):
        return y[:5, None]


def squares(r):
    return r.square().sum(-1)


LIKELIHOODS = {
    "not summed over outputs": (
        lambda: Own(lambda r, o, y: r.square()),
        "a number for every row",
    ),
    "summed over rows": (
        lambda: Own(lambda r, o, y: r.square().sum((-1, -2))),
        "a number for every row",
    ),
    "one number": (lambda: Own(lambda r, o, y: r.square().sum()), "a number for every row"),
    "mean over rows": (
        lambda: Own(lambda r, o, y: squares(r) / len(y)),
        "depend on the other rows",
    ),
    "columns against rows": (
        lambda: Own(lambda r, o, y: squares(o - y.squeeze(-1))),
        "depend on the other rows",
    ),
    "one weight for each row": (
        lambda: Own(lambda r, o, y: squares(r) * torch.ones(9)),
        "goes into columns of y",
    ),
    "random": (lambda: Own(lambda r, o, y: squares(r + torch.randn_like(r))), "is random"),
    "writes to y": (
        lambda: Own(lambda r, o, y: squares(o - y.sub_(1.0))),
        "writes to its arguments",
    ),
    "nothing": (lambda: Own(lambda r, o, y: squares(r) * math.nan), "is NaN for all rows"),
    "detached": (
        lambda: Own(lambda r, o, y: squares(r * r.detach())),
        "is not the gradient of its log_prob",
    ),
    "an array": (
        lambda: Own(lambda r, o, y: torch.from_numpy(r.detach().numpy()).square().sum(-1)),
        "differentiated",
    ),
    "an inherited score": (lambda: Doubled(0.5), "is not the gradient of its log_prob"),
    "an inherited score, learned": (Doubled, "is not the gradient of its log_prob"),
    "fewer rows": (Shorter, "must keep the 9 rows of y, got 5"),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_that_are_no_density_of_single_rows_are_refused(name, seeded, data):
    make, message = LIKELIHOODS[name]
    with seeded(0):
        net = nn.Linear(3, 1)
    y = data[1].clone()
    with pytest.raises(ValueError, match=message):
        bf.BayesianModel(net, priors.Normal(), make(), data[0], y)
    assert torch.equal(y, data[1])


FAMILIES = {
    "Gaussian": (likelihoods.Gaussian, {}, 2, 2),
    "Gaussian, known noise": (likelihoods.Gaussian, {"scale": 0.1}, 2, 2),
    "StudentT": (likelihoods.StudentT, {}, 2, 2),
    "HeteroscedasticGaussian": (likelihoods.HeteroscedasticGaussian, {}, 2, 1),
    "HeteroscedasticStudentT": (likelihoods.HeteroscedasticStudentT, {}, 2, 1),
    "Poisson": (likelihoods.Poisson, {}, 1, 1),
    "NegativeBinomial": (likelihoods.NegativeBinomial, {"dispersion": 0.5}, 1, 1),
    "Categorical": (likelihoods.Categorical, {}, 3, 0),
}


@pytest.mark.parametrize("factor", [1.0, 0.5, 2**0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fisher_factor_is_that_of_the_density(family, factor, seeded):
    """A square root of two, as of the doubled curvature, is noticed."""
    base, settings, outputs, targets = FAMILIES[family]

    class Mine(base):
        def fisher_factor(self, outputs, parameters):
            found, information = super().fisher_factor(outputs, parameters)
            return factor * found, information

    with seeded(0):
        net, x = nn.Linear(2, outputs), torch.randn(9, 2)
        y = torch.randint(3, (9, targets) if targets else (9,)).float()
    make = lambda: bf.BayesianModel(net, priors.Normal(), Mine(**settings), x, y)  # noqa: E731
    if factor == 1:
        make()
    else:
        with pytest.raises(
            ValueError, match="the fisher_factor of Mine is not the one of its log_prob"
        ):
            make()


def test_weights_of_rows_may_be_part_of_a_likelihood(seeded):
    """Its curvature is three times the Fisher information, which is nine times that of one row."""

    class Weighted(likelihoods.Gaussian):
        def log_prob(self, outputs, y, parameters):
            return 3 * super().log_prob(outputs, y, parameters)

        def score(self, outputs, y, parameters):
            by_outputs, by_name = super().score(outputs, y, parameters)
            return 3 * by_outputs, {name: 3 * each for name, each in by_name.items()}

        def fisher_factor(self, outputs, parameters):
            found, information = super().fisher_factor(outputs, parameters)
            return 3**0.5 * found, {name: 3 * each for name, each in information.items()}

    with seeded(0):
        net, x = nn.Linear(2, 1), torch.randn(9, 2)
    bf.BayesianModel(net, priors.Normal(), Weighted(), x, x.sum(1))


@pytest.mark.parametrize(
    "function",
    [
        lambda r, o, y: squares(r),
        lambda r, o, y: r.abs().sum(-1),
        lambda r, o, y: 1e8 * squares(r),
        lambda r, o, y: squares(r).float(),
        lambda r, o, y: squares(o.log() - y),
    ],
)
@pytest.mark.parametrize("rows", [1, 9])
def test_honest_likelihoods_are_accepted(function, rows, seeded, data):
    with seeded(0):
        net = nn.Linear(3, 1)
    bf.BayesianModel(net, priors.Normal(), Own(function), data[0][:rows], data[1][:rows])
