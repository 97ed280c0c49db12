"""Data of every type: a model is the same for the same numbers, or says that its own type cannot
hold them.
"""

import pytest
import torch
from torch import nn

import bnnflow as bf
from bnnflow import likelihoods, priors

TORCH = [
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
NUMPY = [*"bhilBHIL", "float16", "float32", "float64", "longdouble", ">i4", ">f8"]


def of(dtype, values):
    return (
        values.to(dtype) if isinstance(dtype, torch.dtype) else values.numpy().astype(dtype)
    )


@pytest.fixture
def net(seeded):
    with seeded(0):
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


X = torch.tensor([[0, 1], [2, 3], [4, 1], [7, 5]])
Y = torch.tensor([3, 1, 4, 2])


@pytest.mark.parametrize("dtype", TORCH + NUMPY, ids=str)
@pytest.mark.parametrize("precise", [False, True], ids=["float32", "float64"])
def test_the_type_of_the_data_changes_nothing(net, dtype, precise):
    net = net.double() if precise else net
    expected = bf.BayesianModel(
        net, priors.Normal(), likelihoods.Gaussian(), X.double(), Y.double()
    )
    model = bf.BayesianModel(
        net, priors.Normal(), likelihoods.Gaussian(), of(dtype, X), of(dtype, Y)
    )
    assert model.x.dtype == model.y.dtype == model.dtype == expected.dtype
    assert torch.equal(model.x, expected.x)
    assert torch.equal(model.y, expected.y)
    assert model.fingerprint() == expected.fingerprint()
    theta = model.sample_prior(2, seed=0)
    found = model.pointwise_log_likelihood(theta, of(dtype, X[:2]), of(dtype, Y[:2]))
    assert torch.equal(
        found, expected.pointwise_log_likelihood(theta, X[:2].double(), Y[:2].double())
    )


def test_booleans_are_zero_and_one(net):
    x, y = X > 2, Y > 2
    model = bf.BayesianModel(net, priors.Normal(), likelihoods.Bernoulli(), x, y.numpy())
    assert torch.equal(model.x, x.float())
    assert torch.equal(model.y, y.long())


@pytest.mark.parametrize(
    "make", [likelihoods.Gaussian, likelihoods.StudentT, likelihoods.NegativeBinomial]
)
def test_large_integers_keep_their_digits_in_double_precision(net, make):
    y = 10**8 + torch.tensor([0, 5, 13, 20])
    model = bf.BayesianModel(net.double(), priors.Normal(), make(), X, y)
    assert torch.equal(model.y.flatten().long(), y)


@pytest.mark.parametrize("kind", [torch.int64, torch.float64])
@pytest.mark.parametrize("offset", [10**8, 1_700_000_000])
@pytest.mark.parametrize("where", ["x", "y"])
def test_what_single_precision_would_blur_is_refused(net, kind, offset, where):
    far = (offset + torch.tensor([0, 5, 13, 20])).to(kind)
    x = torch.stack([far, Y.to(kind)], 1) if where == "x" else X
    y = far if where == "y" else Y
    with pytest.raises(
        ValueError, match=rf"{where} cannot be told apart in torch.float32.*standardise"
    ):
        bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(), x, y)
    double = bf.BayesianModel(net.double(), priors.Normal(), likelihoods.Gaussian(), x, y)
    with pytest.raises(ValueError, match=f"{where} cannot be told apart"):
        double.to(dtype=torch.float32)


@pytest.mark.parametrize(
    ("factor", "message"), [(1e50, "y has NaN or infinite values"), (1e-50, "told apart")]
)
def test_what_leaves_the_range_of_the_type_is_refused(net, factor, message):
    with pytest.raises(ValueError, match=message):
        bf.BayesianModel(
            net, priors.Normal(), likelihoods.Gaussian(), X, factor * Y.double()
        )


def test_constant_inputs_and_standardised_data_pass(net):
    x = torch.stack([torch.full((4,), 0.1, dtype=torch.float64), Y.double()], 1)
    bf.BayesianModel(net, priors.Normal(), likelihoods.Gaussian(), x, Y)
    bf.BayesianModel(
        net.bfloat16(), priors.Normal(), likelihoods.Gaussian(), x, Y.double() / 3
    )


def test_data_are_copied_once(net):
    for give in (lambda values: values, lambda values: values.numpy()):
        x, y = X.float(), Y.float()
        model = bf.BayesianModel(
            net, priors.Normal(), likelihoods.Gaussian(), give(x), give(y)
        )
        before = model.fingerprint()
        x += 1
        y += 1
        assert torch.equal(model.x, X.float())
        assert model.fingerprint() == before


class Words(nn.Module):
    """The mean embedding of a row of words."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 2), nn.Linear(2, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.table(x).mean(1)))


@pytest.fixture
def words(seeded):
    with seeded(0):
        net = Words()
    x = torch.randint(5, (12, 3), generator=torch.Generator().manual_seed(0))
    return bf.BayesianModel(
        net, priors.Normal(), likelihoods.Gaussian(0.3), x, x.sum(1).float() / 4
    )


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint16"])
def test_indices_of_any_integer_type(words, dtype):
    x = words.x.numpy().astype(dtype)
    model = bf.BayesianModel(
        words.net, priors.Normal(), likelihoods.Gaussian(0.3), x, words.y
    )
    theta = words.sample_prior(2, seed=0)
    assert model.x.dtype == (torch.int32 if dtype == "int32" else torch.int64)
    assert torch.equal(model.outputs(theta, x[:3]), words.outputs(theta, words.x[:3]))


def test_weights_are_no_integers_where_the_inputs_are(words, tmp_path):
    smc = bf.sample(words, bf.SMC(particles=40), chains=2, seed=0, progress=False)
    assert smc.theta.dtype == words.dtype
    assert smc.theta.unique().numel() > words.dim
    value, _ = bf.evidence(words, smc, smc=bf.SMC(particles=40), seed=0)
    assert value == pytest.approx(smc.log_evidence[0], abs=5)
    options = {"chains": 2, "warmup": 5, "seed": 0, "progress": False}
    bf.sample(words, bf.SGLD(), draws=5, checkpoint=tmp_path / "run", **options)
    resumed = bf.sample(
        words,
        bf.SGLD(),
        draws=5,
        checkpoint=bf.Checkpoint(tmp_path / "run", resume=True),
        **options,
    )
    assert resumed.theta.dtype == words.dtype
