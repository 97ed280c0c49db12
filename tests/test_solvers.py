"""Laws of the solvers: orders of convergence, ways back, error estimates, marginals under noise,
and bounds.
"""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from bnnflow.transport import GaussianVelocity, solvers
from bnnflow.transport.divergence import exact_divergence
from bnnflow.transport.solvers import (
    integrate,
    integrate_sde,
    integrate_with_error,
    integrate_with_trace,
    largest_chunk,
    time_grid,
)
from bnnflow.types import AdaptiveRule

FIXED = [("euler", 1), ("midpoint", 2), ("rk4", 4)]
ADAPTIVE = list(get_args(AdaptiveRule))


@pytest.fixture(autouse=True)
def _seeded_modules():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def even(steps: int) -> Tensor:
    return time_grid(steps, power=1.0)


def turning(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A field without symmetry between forwards and backwards, whose second part accumulates along
    the first.
    """
    x, total = state
    return torch.stack(
        [x[:, 1], -x[:, 0] * (1 + t)], 1
    ) - 0.3 * x**3, total * 0 + x.square().sum(1)


def start() -> tuple[Tensor, Tensor]:
    x = torch.randn(5, 2, generator=generator(), dtype=torch.float64)
    return x, torch.zeros(5, dtype=torch.float64)


def reference() -> tuple[Tensor, ...]:
    return integrate(turning, start(), even(400), "rk4")


def gaussian(
    variances: tuple[float, ...] = (0.2, 1.5),
) -> tuple[GaussianVelocity, Tensor, Tensor]:
    """Return the closed-form field from N(0, I) to a Gaussian, with its mean and covariance."""
    angle = torch.tensor(0.7, dtype=torch.float64)
    turn = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    mean = torch.tensor([1.0, -0.5], dtype=torch.float64)
    covariance = turn @ torch.diag(torch.tensor(variances, dtype=torch.float64)) @ turn.T
    return GaussianVelocity(mean, covariance), mean, covariance


def with_score(field: GaussianVelocity):
    """Return velocity and score of the field: of the marginal N(t mean, t^2 C + (1 - t)^2 I),
    finite at t = 1.
    """

    def both(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        marginal = t * t * field.variances + (1 - t) ** 2
        return field(t, x), -(
            (x - t * field.mean) @ field.vectors / marginal
        ) @ field.vectors.T

    return both


# ---------------------------------------- fixed grids


@pytest.mark.parametrize("power", [1.0, 1.5])
@pytest.mark.parametrize(("solver", "order"), FIXED)
def test_fixed_rules_have_their_order_forwards_and_backwards(solver, order, power):
    end = reference()
    for grid_of, first, last in (
        (lambda n: time_grid(n, power), start(), end),
        (lambda n: time_grid(n, power).flip(0), end, start()),
    ):
        errors = []
        for steps in (32, 64):
            got = integrate(turning, first, grid_of(steps), solver)
            errors.append(
                max(float((a - b).abs().max()) for a, b in zip(got, last, strict=True))
            )
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("solver", [name for name, _ in FIXED] + ADAPTIVE)
def test_forwards_then_backwards_returns(solver):
    grid = even(2000 if solver == "euler" else 100)
    end = integrate(turning, start(), grid, solver, rtol=1e-6, atol=1e-6)
    back = integrate(turning, end, grid.flip(0), solver, rtol=1e-6, atol=1e-6)
    bound = {"euler": 5e-3, "rk4": 1e-7, "dopri5": 1e-4}.get(solver, 2e-3)
    assert all((a - b).abs().max() < bound for a, b in zip(back, start(), strict=True))


def test_eight_steps_carry_sharp_gaussians():
    """A grid denser towards 1 by power 1.5 makes the first of them narrower by two fifths."""
    widths = torch.tensor([0.01, 0.02, 0.1, 1.0], dtype=torch.float64)
    field = GaussianVelocity(torch.zeros(4, dtype=torch.float64), torch.diag(widths**2))
    (x,) = integrate(
        lambda t, s: (field(t, s[0]),),
        (torch.eye(4, dtype=torch.float64),),
        time_grid(8),
        "midpoint",
    )
    errors = (x.diagonal() / widths - 1).abs()
    assert (errors < torch.tensor([0.085, 0.047, 0.0065, 0.0015])).all()


def test_grid_of_ones_choice_is_used_and_checked():
    own = [0.0, 0.5, 0.6, 1.0]
    seen: list[float] = []

    def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(float(t))
        return (state[0] * 0,)

    integrate(field, (torch.ones(1),), time_grid(own), "euler")
    assert seen == [0.0, 0.5, 0.6]
    assert torch.equal(time_grid(time_grid(7)), time_grid(7))
    for bad, message in [
        ([0.0, 0.5, 0.5, 1.0], "increase throughout"),
        ([0.0, 0.7, 0.3, 1.0], "increase throughout"),
        ([0.1, 1.0], "from 0 to 1"),
        ([1.0, 0.0], "from 0 to 1"),
        ([0.0, math.nan, 1.0], "finite"),
        ([0.0], "two or more"),
        ([[0.0, 1.0]], "two or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            time_grid(bad)
    with pytest.raises(ValueError, match="steps must be"):
        time_grid(0)
    with pytest.raises(ValueError, match="throughout"):
        integrate(field, (torch.ones(1),), torch.tensor([0.0, 0.6, 0.4, 1.0]))


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_solutions_are_differentiable_and_keep_their_types(solver):
    x = torch.randn(3, 2, generator=generator(), requires_grad=True)
    state = (x, torch.zeros(3, dtype=torch.float64))
    end, total = integrate(turning, state, even(10), solver)
    assert end.dtype == torch.float32
    assert total.dtype == torch.float64
    (grad,) = torch.autograd.grad(total.sum(), x)
    step = 1e-3 * torch.eye(2)[0]
    ahead, behind = (
        integrate(turning, (x.detach() + s * step, state[1]), even(10), solver)[1].sum()
        for s in (1, -1)
    )
    assert float(grad[:, 0].sum()) == pytest.approx(float(ahead - behind) / 2e-3, rel=1e-2)


# ---------------------------------------- error estimates


@pytest.mark.parametrize(("solver", "order"), FIXED)
def test_step_doubling_estimates_the_error_of_every_sample(solver, order):
    grid = time_grid(64 if order == 1 else 24)
    end, errors = integrate_with_error(turning, start(), grid, solver)
    halved = torch.stack([grid[:-1], (grid[1:] + grid[:-1]) / 2], 1).flatten()
    short = integrate(turning, start(), torch.cat([halved, grid[-1:]]), solver)
    assert all(torch.equal(a, b) for a, b in zip(end, short, strict=True))
    for part, estimate, exact in zip(end, errors, reference(), strict=True):
        truth = (part - exact).reshape(5, -1).square().mean(1).sqrt()
        assert estimate.shape == (5,)
        assert estimate.dtype == torch.float64
        assert torch.allclose(estimate, truth, rtol=0.3, atol=0.05 * float(truth.max()))


def test_step_doubling_needs_a_rule_of_fixed_order():
    with pytest.raises(ValueError, match="rule must be one of"):
        integrate_with_error(turning, start(), even(4), "dopri5")  # type: ignore[arg-type]


# ---------------------------------------- adaptive rules


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_adaptive_rules_meet_their_tolerance(solver):
    errors = []
    for tolerance in (1e-3, 1e-6):
        got = integrate(
            turning, start(), time_grid(1), solver, rtol=tolerance, atol=tolerance
        )
        errors.append(
            max(float((a - b).abs().max()) for a, b in zip(got, reference(), strict=True))
        )
        assert errors[-1] < 200 * tolerance  # which bounds the error of one step
    assert errors[1] < 0.1 * errors[0]


def stiff(rates: Tensor):
    """dx/dt = -rate (x - cos t), another rate for every sample."""
    return lambda t, state: (-rates.unsqueeze(1) * (state[0] - t.cos()),)


def test_accuracy_of_a_sample_does_not_depend_on_its_company():
    rates = torch.ones(2000, dtype=torch.float64)
    rates[7] = 60.0
    x = torch.randn(2000, 3, generator=generator(), dtype=torch.float64)
    fine = integrate(stiff(rates), (x,), even(400))[0]
    got = integrate(stiff(rates), (x,), even(1), "dopri5", rtol=1e-5, atol=1e-5)[0]
    assert (got - fine).abs().max() < 1e-4


def test_one_stiff_sample_raises_at_the_cap_and_does_not_loop():
    rates = torch.ones(50, dtype=torch.float64)
    rates[3] = 1e6
    calls = []

    def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(float(t))
        return stiff(rates)(t, state)

    with pytest.raises(RuntimeError, match=r"dopri5 has used 300 evaluations by t = 0\.0"):
        integrate(
            field,
            (torch.ones(50, 2, dtype=torch.float64),),
            even(1),
            "dopri5",
            max_evaluations=300,
        )
    assert len(calls) == 300


@pytest.mark.parametrize("solver", ["euler", "rk4", *ADAPTIVE])
@pytest.mark.parametrize("backwards", [False, True])
def test_nan_velocity_raises_and_says_when(solver, backwards):
    def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        late = t < 0.5 if backwards else t > 0.5
        return (torch.where(late & (torch.arange(4) == 2)[:, None], math.nan, -state[0]),)

    grid = even(8).flip(0) if backwards else even(8)
    with pytest.raises(FloatingPointError, match=r"t = [01]\."):
        integrate(field, (torch.ones(4, 2),), grid, solver)


def test_adaptive_rules_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="rule must be one of"):
        integrate(turning, start(), even(2), "rk5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rtol must be positive"):
        integrate(turning, start(), even(2), "dopri5", rtol=0.0)
    # the solution is infinite at t = 0.5
    with pytest.raises(RuntimeError, match="dopri5 failed"):
        integrate(
            lambda t, s: (s[0] ** 2,),
            (2 * torch.ones(1, 1),),
            even(2),
            "dopri5",
            max_evaluations=10**6,
        )


@pytest.mark.parametrize(
    "ends", [(0.0, 1.0), (1.0, 0.0), (0.2, 0.7), (-3.0, -2.5)], ids=str
)
@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize("speed", [1e-9, 1.0, 30.0])
def test_adaptive_rules_look_at_no_time_outside_the_interval(solver, ends, speed):
    """A field may not exist there: neither a first guess of the step nor the last step may
    leave.
    """
    asked = []

    def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        asked.append(float(t))
        # NaN outside
        return (
            torch.full_like(state[0], speed) * ((t - min(ends)) * (max(ends) - t)).sqrt(),
        )

    grid = torch.tensor(ends, dtype=torch.float64)
    (end,) = integrate(
        field, (torch.ones(3, 2, dtype=torch.float64),), grid, solver, rtol=1e-4, atol=1e-4
    )
    area = math.pi / 8 * (ends[1] - ends[0]) * abs(ends[1] - ends[0])
    assert torch.allclose(end, torch.full_like(end, 1 + speed * area), rtol=1e-3, atol=1e-3)
    assert min(ends) <= min(asked)
    assert max(asked) <= max(ends)


# ---------------------------------------- integrals along the way


@pytest.mark.parametrize("evaluations", [1, 2, 5])
def test_integral_of_a_polynomial_of_time_is_exact(evaluations):
    degree = 2 * evaluations - 1
    x, seen = torch.zeros(3, 2, dtype=torch.float64), []

    def trace(t: Tensor, x: Tensor) -> Tensor:
        seen.append(float(t))
        return (x[:, 0] + t) ** degree

    for backwards, sign in ((False, 1), (True, -1)):
        _, total, _ = integrate_with_trace(
            lambda t, x: 0 * x, trace, x, evaluations, backwards=backwards
        )
        assert torch.allclose(
            total, torch.full((3,), sign / (degree + 1), dtype=torch.float64), atol=1e-14
        )
    assert seen[:evaluations] == pytest.approx(sorted(seen[evaluations:]))
    assert min(seen) > 0
    assert max(seen) < 1


@pytest.mark.parametrize("backwards", [False, True])
def test_integral_along_the_way_beats_one_that_is_carried_along(backwards):
    """With as many evaluations of the integrand: sixteen, by four steps of the Runge-Kutta rule or
    at nodes.
    """
    grid = even(400).flip(0) if backwards else even(400)
    x, zero = start()
    x = x / 2  # larger ones have no way back
    end, total = integrate(turning, (x, zero), grid)
    field = lambda t, x: turning(t, (x, zero))[0]  # noqa: E731
    trace = lambda t, x: turning(t, (x, zero))[1]  # noqa: E731
    here, found, rough = integrate_with_trace(field, trace, x, 16, backwards=backwards)
    assert float(rough.max()) < 1e-2
    few = even(4).flip(0) if backwards else even(4)
    carried = integrate(turning, (x, zero), few)[1]
    assert float((here - end).abs().max()) < 1e-5
    error, usual = (float((each - total).abs().max()) for each in (found, carried))
    assert error < 1e-5
    assert error < 0.05 * usual


def test_integral_along_the_way_of_a_gaussian_field_is_its_log_determinant():
    field, _, covariance = gaussian()
    x = torch.randn(4, 2, generator=generator(), dtype=torch.float64)
    _, total, _ = integrate_with_trace(
        field, lambda t, x: field.with_divergence(t, x)[1], x, 24
    )
    assert torch.allclose(total, (0.5 * covariance.logdet()).expand(4), atol=1e-8)


@pytest.mark.parametrize("evaluations", [8, 16, 33])
def test_roughness_is_what_a_peak_contributes_and_nothing_where_there_is_none(evaluations):
    node, weight = (
        torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(evaluations)
    )
    where, mass = (node[5] + 1) / 2, 3.0
    x = torch.tensor([[0.0], [mass]], dtype=torch.float64)

    def trace(t: Tensor, x: Tensor) -> Tensor:
        return torch.exp(t) + x[:, 0] * 2 / weight[5] * torch.exp(
            -(((t - where) / 1e-3) ** 2)
        )

    _, total, rough = integrate_with_trace(lambda t, x: 0 * x, trace, x, evaluations)
    assert float(rough[0]) < 1e-3
    assert 0.5 * mass < float(rough[1]) < 2 * mass
    assert float(total[1] - total[0]) == pytest.approx(mass)


def test_integral_along_the_way_checks_its_arguments():
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="steps are fixed"):
        integrate_with_trace(lambda t, x: x, lambda t, x: x.sum(1), x, 4, "dopri5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        integrate_with_trace(lambda t, x: x, lambda t, x: x.sum(1), x, 0)
    with pytest.raises(FloatingPointError, match="NaN"):
        integrate_with_trace(lambda t, x: x / 0 * 0, lambda t, x: x.sum(1).double(), x, 4)


# ---------------------------------------- stochastic integration


NOISES = {
    "all": 1.2,
    "fading": lambda t: 1.5 * (1 - t),
    "first half": lambda t: 1.5 if t < 0.5 else 0.0,
    "second half": lambda t: 0.0 if t < 0.5 else 1.5,
}


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize(("solver", "steps"), [("euler", 200), ("midpoint", 40)])
def test_noise_keeps_the_marginals_of_the_gaussian_field(noise, solver, steps):
    field, mean, covariance = gaussian()
    n = 8000
    x0 = torch.randn(n, 2, generator=generator(1), dtype=torch.float64)
    x1 = integrate_sde(with_score(field), noise, x0, even(steps), 2, solver)
    z = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (x1 - mean).T, upper=False
    )
    bias = 0.03 if solver == "euler" else 0.003  # of steps of this length
    assert (z.mean(1).abs() < 4.5 / math.sqrt(n) + bias).all()
    spread = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64) / n
    assert ((torch.cov(z) - torch.eye(2)).abs() < 4.5 * spread.sqrt() + bias).all()
    travelled = integrate((lambda t, s: (field(t, s[0]),)), (x0,), even(100))[0]
    assert (x1 - travelled).norm(dim=1).mean() > 0.1  # another path for each draw


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2)])
def test_stochastic_rules_have_their_weak_order(solver, order, monkeypatch):
    """The variance of dx = -2 x dt + dW, found without Monte-Carlo error from the response to each
    single increment.
    """
    rate, level, x0_variance = 2.0, 1.0, 3.0
    errors = []
    for steps in (32, 64):
        draws = steps * (1 if solver == "euler" else 2)

        # Row k sees a unit in the k-th draw of noise and zeros elsewhere; the last row starts from
        # one.
        calls = iter(range(draws))

        def unit(*shape, calls=calls, draws=draws, **_):
            noise = torch.zeros(draws + 1, 1, dtype=torch.float64)
            noise[next(calls)] = 1
            return noise

        monkeypatch.setattr(solvers.torch, "randn", unit)
        x = torch.zeros(draws + 1, 1, dtype=torch.float64)
        x[-1] = 1
        end = integrate_sde(
            lambda t, x: (-rate * x, 0 * x), level, x, even(steps), 0, solver
        )
        monkeypatch.undo()
        variance = float(end[:-1].square().sum() + x0_variance * end[-1].square().sum())
        stationary = level**2 / (2 * rate)
        truth = stationary + (x0_variance - stationary) * math.exp(-2 * rate)
        errors.append(abs(variance - truth))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_without_noise_stochastic_rules_are_the_ordinary_ones_and_look_at_no_score(solver):
    field, _, _ = gaussian()
    x0 = torch.randn(50, 2, generator=generator(), dtype=torch.float64)
    end = integrate_sde(
        lambda t, x: (field(t, x), x * math.nan), 0.0, x0, even(20), 0, solver
    )
    assert torch.equal(
        end, integrate(lambda t, s: (field(t, s[0]),), (x0,), even(20), solver)[0]
    )


def test_midpoint_rule_never_looks_at_the_last_time():
    """Where the score of most paths is singular."""
    seen: list[float] = []

    def field(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(float(t))
        return x, -x

    for solver in ("euler", "midpoint"):
        integrate_sde(field, 1.0, torch.ones(2, 2), even(5), 0, solver)  # type: ignore[arg-type]
    assert max(seen) < 1


def test_noise_is_taken_in_the_middle_of_each_step():
    seen: list[float] = []
    integrate_sde(
        lambda t, x: (x, x),
        lambda t: seen.append(float(t)) or 0.0,
        torch.ones(2, 2),
        even(4),
        0,
    )
    assert seen == [0.125, 0.375, 0.625, 0.875]


def test_noise_is_reproducible_and_bad_noise_raises():
    field = with_score(gaussian()[0])
    x0 = torch.randn(10, 2, generator=generator(), dtype=torch.float64)
    run = lambda seed, noise=1.0, grid=even(5): integrate_sde(field, noise, x0, grid, seed)  # noqa: E731
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    for noise in (-1.0, math.nan, math.inf, lambda t: t - 0.5):
        with pytest.raises(ValueError, match="noise must be"):
            run(0, noise)
    with pytest.raises(ValueError, match="runs forwards"):
        run(0, grid=even(5).flip(0))
    with pytest.raises(ValueError, match="rule must be one of"):
        integrate_sde(field, 1.0, x0, even(5), 0, "rk4")  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match="became NaN"):
        integrate_sde(lambda t, x: (x * math.nan, x), 1.0, x0, even(5), 0)


# ---------------------------------------- memory


def test_rows_are_priced_by_the_tensors_alive_at_once():
    x, table = torch.zeros(8, 10), torch.zeros(1000)  # 40 bytes a row, 4000 fixed

    def work(rows: Tensor) -> Tensor:
        wide = rows.repeat(1, 5)  # 200 a row
        narrow = wide.sum(1)  # 4 a row: 244 in all
        del wide
        return narrow + table.sum()  # 4004 and 48 a row in all

    assert largest_chunk(24_400, work, x) == 100
    assert largest_chunk(4004 + 48 * 10, work, x) == 10
    kept = lambda rows: [rows + i for i in range(9)]  # noqa: E731  # ten tensors of 40 bytes a row
    assert largest_chunk(40_000, kept, x) == 100
    with pytest.raises(ValueError, match="one row needs 400 bytes"):
        largest_chunk(399, kept, x)
    with pytest.raises(ValueError, match="x must have two rows or more"):
        largest_chunk(1000, kept, x[:1])


def test_chunks_under_a_bound_stay_under_it():
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 64), torch.nn.Tanh(), torch.nn.Linear(64, 6)
    ).requires_grad_(False)
    x = torch.randn(4, 6, generator=generator())

    def work(rows: Tensor) -> tuple[Tensor, ...]:
        def slope(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return exact_divergence(net, state[0], chunk_size=6)

        return integrate(
            slope, (rows, torch.zeros(len(rows), dtype=torch.float64)), even(1), "midpoint"
        )

    memory = 4_000_000
    n = largest_chunk(memory, work, x)
    peak = solvers.live_bytes(work, torch.randn(n, 6, generator=generator())).max()
    assert 0.99 * memory < peak <= memory
