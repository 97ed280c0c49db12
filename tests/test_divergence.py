"""Laws of divergences: closed forms, agreement with automatic differentiation, unbiasedness, known
variances.
"""

import math

import pytest
import torch
from torch import nn

import bnnflow as bf
from bnnflow.transport import (
    Density,
    Field,
    Flow,
    GaussianVelocity,
    ResidualVelocity,
    Solver,
)
from bnnflow.transport.divergence import (
    divergence,
    exact_divergence,
    hutchinson_divergence,
    hutchpp_divergence,
    probe_noise,
)
from bnnflow.transport.solvers import integrate, time_grid
from bnnflow.transport.two_layer import TwoLayerVelocity
from bnnflow.types import Noise, Trace
from tests.problems import built, generator, linear, normal, one_in


def curved(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A field without structure, whose Jacobian differs from row to row and with time."""
    dim = x.shape[-1]
    entries = torch.arange(dim * dim, dtype=x.dtype).reshape(dim, dim)
    a, b = (1.7 * entries).cos() / dim**0.5, (2.3 * entries + 1).sin() / dim**0.5
    t = t.reshape(-1, 1).to(x.dtype)
    return torch.tanh(x @ a + t) @ b + t * x.sin()


def jacobian(velocity, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the Jacobian of every row, ``(batch, dim, dim)``, by autograd."""
    rows = [
        torch.autograd.functional.jacobian(lambda z, s=s: velocity(s, z[None])[0], row)
        for s, row in zip(t.expand(len(x)), x, strict=True)
    ]
    return torch.stack(rows)  # type: ignore[arg-type]


def two_layer(dim: int = 7, base: Field | None = None) -> TwoLayerVelocity:
    """Return a field with random weights everywhere: those at zero would hide errors."""
    field = built(lambda: TwoLayerVelocity(dim, 16, base=base))
    g = generator(3)
    learned = [
        p for name, p in field.named_parameters() if not name.startswith(("base", "time"))
    ]
    for parameter in learned:
        parameter.data.add_(
            0.1 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        )
    return field.requires_grad_(False)


def gaussian_field(dim: int = 7) -> GaussianVelocity:
    root = normal(dim, dim, seed=4) / dim**0.5
    return GaussianVelocity(
        normal(dim, seed=5), root @ root.T + 0.1 * torch.eye(dim, dtype=torch.float64)
    )


class Linear(nn.Module):
    """v = (diagonal + left right^T) x + shift, at a cost linear in the dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.diagonal, self.shift = 0.7 * normal(dim, seed=6).tanh(), normal(dim, seed=7)
        self.left, self.right = (normal(dim, 2, seed=seed) / dim**0.5 for seed in (8, 9))

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.diagonal * x + x @ self.right @ self.left.T + self.shift

    @property
    def matrix(self) -> torch.Tensor:
        return torch.diag(self.diagonal) + self.left @ self.right.T


def matrix_field(matrix: torch.Tensor):
    return lambda x: x @ matrix.T


def decaying(dim: int = 60, power: float = 2.0) -> torch.Tensor:
    """Return a matrix, not symmetric, with singular values i^-power."""
    left, right = (torch.linalg.qr(normal(dim, dim, seed=seed)).Q for seed in (10, 11))
    return (
        left @ torch.diag(torch.arange(1, dim + 1, dtype=torch.float64) ** -power) @ right.T
    )


# ---------------------------------------- exact


@pytest.mark.parametrize("dim", one_in(3, [50, 2, 500]))
def test_log_density_of_a_linear_field_is_exact(dim):
    """x1 = E x0 + shift' with E = exp(matrix): a Gaussian whose density is known."""
    field = Linear(dim)
    whole = torch.zeros(dim + 1, dim + 1, dtype=torch.float64)
    whole[:dim, :dim], whole[:dim, dim] = field.matrix, field.shift
    flow_map = torch.linalg.matrix_exp(whole)
    matrix, shift = flow_map[:dim, :dim], flow_map[:dim, dim]
    truth = torch.distributions.MultivariateNormal(shift, matrix @ matrix.T)
    theta = normal(2, dim, seed=12) @ matrix.T + shift
    flow = Flow.of(field, linear(dim), solver=Solver("rk4", 64))
    assert (flow.log_prob(theta) - truth.log_prob(theta)).abs().max() < 1e-6
    estimate = flow.log_prob(
        theta.expand(200, 2, dim), seed=1, density=Density(trace="hutchinson", probes=1)
    )
    error = estimate.std(0) / math.sqrt(200)
    assert ((estimate.mean(0) - truth.log_prob(theta)).abs() < 4.5 * error + 1e-6).all()


@pytest.mark.parametrize("times", ["one", "each"])
@pytest.mark.parametrize("batch", [3, 500])
def test_exact_divergence_is_the_trace_of_the_jacobian(batch, times):
    x = normal(batch, 7)
    t = (
        torch.tensor(0.3, dtype=torch.float64)
        if times == "one"
        else normal(batch, seed=1).sigmoid()
    )
    value, trace = divergence(curved, t, x)
    truth = jacobian(curved, t, x).diagonal(dim1=1, dim2=2).sum(-1)
    assert trace.dtype == torch.float64
    assert torch.allclose(value, curved(t, x), atol=1e-12)
    assert torch.allclose(trace, truth, atol=1e-10)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100, None])
def test_chunks_and_modes_do_not_change_the_result(chunk_size, mode):
    x, t = normal(4, 7), torch.tensor(0.5)
    whole = jacobian(curved, t, x).diagonal(dim1=1, dim2=2).sum(-1)
    value, trace = exact_divergence(lambda z: curved(t, z), x, chunk_size, mode)
    assert torch.allclose(value, curved(t, x), atol=1e-12)
    assert torch.allclose(trace, whole, atol=1e-10)


def test_large_batches_go_in_blocks_with_their_own_times():
    x, t = normal(3000, 3), normal(3000, seed=1).sigmoid()
    value, trace = divergence(curved, t, x)
    small = [divergence(curved, t[i : i + 7], x[i : i + 7]) for i in (0, 1500, 2990)]
    for i, (v, d) in zip((0, 1500, 2990), small, strict=True):
        assert torch.allclose(value[i : i + 7], v, atol=1e-12)
        assert torch.allclose(trace[i : i + 7], d, atol=1e-12)


@pytest.mark.parametrize("trace", ["exact", "hutchinson", "hutch++"])
def test_divergence_can_be_differentiated_by_the_points(trace: Trace):
    x, t = normal(2, 5).requires_grad_(), torch.tensor(0.4)
    probes = probe_noise("rademacher", 6, x, generator(1))
    assert torch.autograd.gradcheck(
        lambda z: divergence(curved, t, z, trace, probes)[1], x, atol=1e-6
    )


# ---------------------------------------- fields that know their trace


class Known(Field):
    """Knows its trace; counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 3 * x + 0.5 * x.roll(1, -1)

    def closed_divergence(
        self, t: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += 1
        return self(t, x), torch.full((len(x),), 3.0 * x.shape[-1], dtype=torch.float64)


def test_a_fields_own_trace_is_used_only_where_the_trace_is_exact():
    field, x, t = Known(), normal(4, 5), torch.tensor(0.5)
    value, trace = field.with_divergence(t, x)
    assert field.asked == 1
    assert torch.equal(trace, torch.full((4,), 15.0, dtype=torch.float64))
    assert torch.equal(value, field(t, x))
    _, estimate = field.with_divergence(
        t, x, "hutchinson", probe_noise("rademacher", 1, x, generator())
    )
    assert field.asked == 1
    assert not torch.allclose(estimate, trace)


def test_only_the_rest_of_a_field_with_a_known_part_is_probed():
    gaussian, x, t = gaussian_field(), normal(4, 7), torch.tensor(0.5, dtype=torch.float64)
    field = built(lambda: ResidualVelocity(linear(7).spec, gaussian, 8, 1)).requires_grad_(
        False
    )
    g = generator(3)
    for parameter in field.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    whole = jacobian(field, t, x).diagonal(dim1=1, dim2=2).sum(-1)
    value, trace = field.with_divergence(t, x)
    assert torch.allclose(value, field(t, x), atol=1e-12)
    assert torch.allclose(trace, whole, atol=1e-10)
    probes = probe_noise("gaussian", 3, x, generator())
    _, estimate = field.with_divergence(t, x, "hutchinson", probes)
    _, of_rest = divergence(
        lambda t, z: field(t, z) - gaussian(t, z), t, x, "hutchinson", probes
    )
    assert torch.allclose(
        estimate, of_rest + gaussian.closed_divergence(t, x)[1], atol=1e-10
    )


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("times", ["one", "each"])
def test_closed_trace_of_two_layers_is_that_of_autograd(based, times):
    field = two_layer(base=gaussian_field() if based else None)
    x = normal(6, 7)
    t = (
        torch.tensor(0.7, dtype=torch.float64)
        if times == "one"
        else normal(6, seed=1).sigmoid()
    )
    value, trace = field.with_divergence(t, x)
    assert torch.allclose(value, field(t, x), atol=1e-12)
    assert torch.allclose(
        trace, jacobian(field, t, x).diagonal(dim1=1, dim2=2).sum(-1), atol=1e-10
    )
    assert trace.dtype == torch.float64


def test_untrained_two_layers_are_their_base():
    field = built(lambda: TwoLayerVelocity(7, 16, base=gaussian_field()))
    plain = built(lambda: TwoLayerVelocity(7, 16))
    t, x = torch.tensor(0.6), normal(5, 7)
    assert torch.allclose(field(t, x), gaussian_field()(t, x), atol=1e-12)
    # Without a base: from N(0, I) to N(0, I).
    (end,) = integrate(lambda t, s: (plain(t, s[0]),), (x,), time_grid(32))
    assert torch.allclose(end, x, atol=1e-6)
    with pytest.raises(ValueError, match="base must know its trace"):
        TwoLayerVelocity(7, base=Field.of(nn.Identity()))


def test_two_layers_carry_their_density_exactly():
    """The log density that a path accumulates is that of the change of variables, by autograd
    through the solver.
    """
    field, x = two_layer(3), normal(4, 3)

    def carried(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start = torch.zeros(len(x), dtype=torch.float64)
        return integrate(
            lambda t, s: field.with_divergence(t, s[0]), (x, start), time_grid(32)
        )  # type: ignore[return-value]

    _, change = carried(x)
    maps = jacobian(lambda _, z: carried(z)[0], torch.tensor(0.0), x)
    assert torch.allclose(change, torch.linalg.slogdet(maps).logabsdet, atol=1e-6)


@pytest.mark.parametrize("based", [False, True])
def test_flow_of_two_layers_is_saved_and_loaded(tmp_path, based):
    flow = Flow.of(two_layer(base=gaussian_field() if based else None), linear(7))
    loaded = bf.load(flow.save(tmp_path / "flow"))
    assert isinstance(loaded, Flow)
    theta = flow.sample(3, 0)
    assert torch.allclose(loaded.sample(3, 0), theta)
    assert torch.allclose(loaded.log_prob(theta), flow.log_prob(theta))


# ---------------------------------------- estimates


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_has_its_mean_and_its_variance(noise: Noise):
    matrix = normal(20, 20)
    x = torch.zeros(1, 20, dtype=torch.float64)
    _, estimates = hutchinson_divergence(
        matrix_field(matrix), x, probe_noise(noise, 40000, x, generator(1))
    )
    symmetric = 0.5 * (matrix + matrix.T)
    variance = 2 * symmetric.square().sum()
    if noise == "rademacher":  # the diagonal has no error
        variance = variance - 2 * symmetric.diagonal().square().sum()
    error = estimates.std() / math.sqrt(40000)
    assert abs(estimates.mean() - matrix.trace()) < 4.5 * error
    assert float(estimates.var()) == pytest.approx(float(variance), rel=0.05)


def spread(
    matrix: torch.Tensor, probes: int, noise: Noise = "rademacher", n: int = 4000
) -> tuple[torch.Tensor, ...]:
    """Return n independent estimates each by Hutchinson and by Hutch++, of the same number of
    products.
    """
    x = torch.zeros(n, len(matrix), dtype=torch.float64)
    drawn = probe_noise(noise, probes, x, generator(1))
    _, plain = hutchinson_divergence(matrix_field(matrix), x, drawn)
    value, better = hutchpp_divergence(matrix_field(matrix), x, drawn)
    assert torch.equal(value, x)
    return plain.mean(0), better


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("probes", [3, 8, 15])
@pytest.mark.parametrize("kind", ["decaying", "flat", "nilpotent"])
def test_hutchpp_is_unbiased(kind, probes, noise: Noise):
    matrix = {
        "decaying": decaying(),
        "flat": normal(30, 30),
        "nilpotent": normal(30, 30).triu(1),
    }[kind]
    _, estimates = spread(matrix, probes, noise)
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - matrix.trace()) < 4.5 * error


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_hutchpp_beats_hutchinson_on_decaying_spectra_at_the_same_number_of_products(power):
    plain, better = spread(decaying(power=power), 15)
    assert better.var() < {1.0: 0.7, 2.0: 0.1}[power] * plain.var()


def test_hutchpp_is_exact_where_the_rank_is_no_larger_than_its_sketch():
    matrix = normal(40, 3) @ normal(3, 40, seed=1)
    _, estimates = spread(matrix, 9, n=50)
    assert torch.allclose(estimates, matrix.trace().expand(50), atol=1e-9)
    _, estimates = spread(normal(4, 4), 30, n=50)  # a sketch of everything
    assert torch.allclose(estimates, normal(4, 4).trace().expand(50), atol=1e-9)


def test_hutchpp_is_not_worth_it_on_a_flat_spectrum():
    """What the docstring says: up to three times the variance, since only a third of the products
    is left.
    """
    rotation = torch.linalg.qr(normal(60, 60)).Q
    plain, better = spread(rotation, 15)
    assert 1.5 < better.var() / plain.var() < 3.3


@pytest.mark.parametrize("trace", ["hutchinson", "hutch++"])
def test_probes_that_stay_fixed_let_the_solver_converge(trace: Trace):
    x = normal(5, 6)

    def solve(steps: int, fixed: torch.Tensor | None) -> torch.Tensor:
        fresh = generator(2)

        def slope(t, state):
            probes = probe_noise("rademacher", 6, x, fresh) if fixed is None else fixed
            return divergence(curved, t, state[0], trace, probes)

        return integrate(slope, (x, torch.zeros(5, dtype=torch.float64)), time_grid(steps))[
            1
        ]

    probes = probe_noise("rademacher", 6, x, generator(1))
    fixed, redrawn = (
        (solve(32, each) - solve(16, each)).abs().max() for each in (probes, None)
    )
    # the frame of Hutch++ turns on the way
    assert fixed < {"hutchinson": 1e-4, "hutch++": 0.2}[trace] * redrawn


def test_bad_input_is_refused():
    x, t = normal(2, 4), torch.tensor(0.5)
    with pytest.raises(ValueError, match="trace must be"):
        divergence(curved, t, x, "approximate")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs probes"):
        divergence(curved, t, x, "hutchinson")
    with pytest.raises(ValueError, match="at least 3 probes"):
        divergence(curved, t, x, "hutch++", probe_noise("gaussian", 2, x, generator()))
    with pytest.raises(ValueError, match="at least 1"):
        probe_noise("gaussian", 0, x, generator())
    with pytest.raises(ValueError, match="noise must be"):
        probe_noise("uniform", 2, x, generator())  # type: ignore[arg-type]
