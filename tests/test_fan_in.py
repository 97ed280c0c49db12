"""One rule for the size of weights: outputs as large as inputs, whatever the layer."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from bnnflow import priors
from bnnflow.inference.start import random_networks
from bnnflow.weights import WeightSpec
from tests.problems import one_in


class Heads(nn.Module):
    """The projection of attention, before heads mix."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return nn.functional.linear(
            x, self.attention.in_proj_weight, self.attention.in_proj_bias
        )


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(6, 5, 20)

    def forward(self, x):
        return self.bilinear(x[:, :6], x[:, 6:])


class Own(nn.Module):
    """A matrix (out, in) of one's own."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(20, 7))

    def forward(self, x):
        return x @ self.matrix.T


LAYERS = {
    "linear": (lambda: nn.Linear(7, 20), (7,)),
    "conv1d": (lambda: nn.Conv1d(4, 12, 5, stride=2), (4, 40)),
    "conv2d": (lambda: nn.Conv2d(6, 12, 3, groups=3, dilation=2), (6, 16, 16)),
    "depthwise": (lambda: nn.Conv2d(32, 32, 3, groups=32), (32, 10, 10)),
    "conv3d": (lambda: nn.Conv3d(2, 12, 2), (2, 6, 6, 6)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 12, 4, stride=2, padding=1), (4, 60)),
    "transposed1d wide": (
        lambda: nn.ConvTranspose1d(16, 12, 5, stride=3, padding=2),
        (16, 90),
    ),
    "transposed2d": (lambda: nn.ConvTranspose2d(6, 12, 4, stride=4, groups=2), (6, 8, 8)),
    "transposed2d dense": (lambda: nn.ConvTranspose2d(3, 12, 3, padding=1), (3, 40, 40)),
    "transposed3d": (
        lambda: nn.ConvTranspose3d(4, 12, 2, stride=2, bias=False),
        (4, 4, 4, 4),
    ),
    "attention": (Heads, (5, 32)),
    "bilinear": (Pair, (11,)),
    "layer norm": (lambda: nn.LayerNorm(64), (64,)),
    "layer norm of images": (lambda: nn.LayerNorm([8, 6, 6]), (8, 6, 6)),
    "rms norm": (lambda: nn.RMSNorm(64), (64,)),
    "group norm": (lambda: nn.GroupNorm(4, 32), (32, 6)),
    "batch norm": (lambda: nn.BatchNorm1d(64).eval(), (64,)),
    "own": (Own, (7,)),
    "transposed1d spread": (
        lambda: nn.ConvTranspose1d(8, 12, 2, stride=2, dilation=2),
        (8, 80),
    ),
    "transposed1d with holes": (
        lambda: nn.ConvTranspose1d(8, 12, 2, stride=3, output_padding=1),
        (8, 80),
    ),
    "transposed2d uneven": (
        lambda: nn.ConvTranspose2d(
            4, 12, (3, 5), stride=(1, 2), padding=(1, 2), groups=2, dilation=(2, 1)
        ),
        (4, 40, 40),
    ),
    "circular": (lambda: nn.Conv1d(4, 12, 5, padding=2, padding_mode="circular"), (4, 20)),
    "reflected": (
        lambda: nn.Conv2d(4, 12, 3, padding=1, padding_mode="reflect"),
        (4, 12, 12),
    ),
    "weight norm": (lambda: weight_norm(nn.Linear(7, 20)), (7,)),
    "weight norm of inputs": (lambda: weight_norm(nn.Linear(7, 20), dim=1), (7,)),
    "weight norm of all": (lambda: weight_norm(nn.Linear(7, 40), dim=None), (7,)),
    "weight norm of kernels": (lambda: weight_norm(nn.Conv2d(4, 12, 3)), (4, 12, 12)),
    "weight norm of transposed": (
        lambda: weight_norm(nn.ConvTranspose1d(6, 12, 4, stride=2)),
        (6, 50),
    ),
    "weight norm of transposed outputs": (
        lambda: weight_norm(nn.ConvTranspose1d(6, 12, 4, stride=2, groups=3), dim=1),
        (6, 50),
    ),
}


def measured(net, x, prior, n=60):
    """The standard deviation of outputs over weights and inputs."""
    spec = WeightSpec.unlabelled(net)
    generator = torch.Generator().manual_seed(1)
    distributions = prior.distributions(spec)
    squares = []
    for _ in range(n):
        params = {
            name: torch.randn(spec.shapes[name], generator=generator)
            * float(distributions[name].scale)
            for name in spec.names
        }
        with torch.no_grad():
            squares.append(torch.func.functional_call(net, params, (x,)).square().mean())
    return float(torch.stack(squares).mean().sqrt())


@pytest.mark.parametrize("name", one_in(3, LAYERS))
def test_outputs_are_as_large_as_inputs(name, seeded):
    make, shape = LAYERS[name]
    with seeded(0):
        net = make()
    x = torch.randn(20, *shape, generator=torch.Generator().manual_seed(0))
    n = 500 if "norm of" in name else 60  # a few norms decide how large all outputs are
    assert measured(net, x, priors.FanIn(bias_scale=1e-6), n) == pytest.approx(1, rel=0.1)
    assert measured(net, x, priors.FanIn(2.0, bias_scale=1e-6), n) == pytest.approx(
        2, rel=0.1
    )
    if any("bias" in key for key, _ in net.named_parameters()):
        assert measured(net, x, priors.FanIn(1e-6, bias_scale=3.0)) == pytest.approx(
            3, rel=0.2
        )


def test_a_slope_below_zero_has_the_scale_of_weights():
    """x for x > 0 and w x for x < 0 has the mean square of x if w has that of one."""
    net = nn.PReLU(4)
    assert measured(
        net,
        torch.randn(200, 4, 9, generator=torch.Generator().manual_seed(0)),
        priors.FanIn(),
    ) == (pytest.approx(1, rel=0.1))
    assert (
        float(
            priors.FanIn(0.5, 9.0).distributions(WeightSpec.unlabelled(net))["weight"].scale
        )
        == 0.5
    )


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_row_of_a_table_is_of_unit_size(kind):
    net = kind(30, 16, device="meta")
    spec = WeightSpec.unlabelled(net)
    assert spec.fan_in("weight") == 1
    assert float(priors.FanIn(0.5).distributions(spec)["weight"].scale) == 0.5


@pytest.mark.parametrize("name", LAYERS)
def test_priors_with_scales_and_random_starts_have_the_same_rule(name, seeded):
    with seeded(0):
        net = LAYERS[name][0]()
    spec = WeightSpec.unlabelled(net)
    fixed = priors.FanIn().distributions(spec)
    hierarchical = priors.Hierarchical(fan_in=True)
    given = hierarchical.conditional(
        spec, {key: torch.ones(1) for key in hierarchical.parameters(spec)}
    )
    starts = spec.unflatten(
        random_networks(spec, 300, torch.Generator().manual_seed(0), torch.float32)
    )
    for tensor in spec.names:
        assert float(given[tensor].scale.flatten()[0]) == pytest.approx(
            float(fixed[tensor].scale)
        )
        if spec.fan_in(tensor) is not None and starts[tensor].numel() > 300:
            assert float(starts[tensor].abs().max()) == pytest.approx(
                float(fixed[tensor].scale), rel=0.02
            )


@pytest.mark.parametrize(
    "kind",
    [
        lambda: nn.Linear(0, 3),
        lambda: nn.Conv1d(0, 3, 2),
        lambda: nn.ConvTranspose1d(0, 3, 2),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_weights_have_a_scale_too(kind, seeded):
    with seeded(0):
        spec = WeightSpec.of(kind())
    assert float(priors.FanIn(bias_scale=2.0).distributions(spec)["bias"].scale) == 2
    assert random_networks(
        spec, 5, torch.Generator().manual_seed(0), torch.float32
    ).shape == (5, 3)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (lambda: nn.Linear(5, 3), (1, 5)),
        (lambda: nn.Conv2d(5, 3, 2), (1, 5, 1, 1)),
        (lambda: nn.ConvTranspose2d(5, 3, 2), (5, 1, 1, 1)),
        (lambda: nn.Embedding(5, 3), (5, 1)),
    ],
)
@pytest.mark.parametrize("described", [WeightSpec.of, WeightSpec.unlabelled])
def test_local_scales_belong_to_what_a_layer_reads(described, kind, shape, seeded):
    with seeded(0):
        spec = described(kind())
        scales = priors.Horseshoe().parameters(spec)
        given = {
            name: torch.rand(each.batch_shape or (1,)) for name, each in scales.items()
        }
    assert tuple(given["local.weight"].shape) == shape
    of_weights = priors.Horseshoe().conditional(spec, given)["weight"].scale
    assert len(of_weights.expand(spec.shapes["weight"]).unique()) == 5
