"""What a flow is for, in figures: the price of posterior draws, against longer runs of HMC, MCLMC
and tempered SMC.

Regression, 2-16-1 tanh, N(0, 1) on 65 weights; inputs are standard normal, targets those of one
network drawn from the prior (sd about 2.7) plus noise. 100 to 100,000 rows, in two ways:

``--noise scaled`` (the default): the noise is sqrt(rows / 100), so that all rows together say as
    much as 100 rows of noise 1. The posterior stays what it is and only the price of a gradient
    grows. **The posterior does not sharpen here, as it does with more rows of one kind**: this
    isolates the price of rows, and is kind to all methods.
``--noise fixed``: noise 1, and a posterior that sharpens: samplers take shorter steps and flows
    have more to learn. With 10,000 rows and more a cell takes many times as long.

Prices are in CPU seconds, one thread, and in likelihood gradients, which the model itself counts
whoever asks for them; one on some of the rows counts as their share. Every method is
``start + draws * each``. The start of a sampler is its warm-up; SMC has none, and pays for
everything again for more particles. The start of a flow is all its HMC draws cost, warm-up
included, and its training. An effective draw is one of bulk ESS of the outputs at 64 test inputs
(the median input). A flow's draws are independent. Particles' ESS is read off the spread of
independent runs, and is at most that of their weights.

A cheap wrong draw is no draw. Against HMC chains that no flow saw, at the test inputs: "rms" is the
error of the mean in posterior standard deviations, "ratio" the geometric mean of ratios of standard
deviations, "gap" the loss of LPPD on test targets of noise 1. What draws are **worth** is the
number of exact draws whose Monte-Carlo error of mean and standard deviation is as large as their
bias; more of them buy nothing. ">" means that the comparison shows no bias and could have shown one
at that number. A break-even beyond the worth is none. All that a weights-only flow knows of the
posterior are its training draws, those in the row of HMC: it can hardly be worth more than they
are.

The informed flow follows gradients on all rows, by gradient steps: Gauss-Newton steps cost ten
times as many seconds or more. Mini-batches do not help it: the pull of m rows of n is that of
another posterior, about sqrt(n / m - 1) of its standard deviations away, whatever the noise.
"Refined" is ``bf.refine``, two short transitions; refinement can only pay as long as it takes fewer
gradients than an effective draw of a sampler.

Every number of rows is a cell of ``out/break_even.json``, computed if it is not there: a run can be
stopped and started again. Run: ``python tests/benchmarks/bench_break_even.py [--rows N ...]
[--noise fixed]
[--quick]``; ``--rows`` computes cells anew, ``--draw-only`` prints and draws what is there,
``--figure`` puts the picture into ``docs/images``.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.transport import GradientSteps, InformedVelocity, Solver, WeightsVelocity

SEED = 0
HIDDEN = 16
FIRST_ROWS, FIRST_NOISE = 100, 1.0
TEST_ROWS = 64
CHAINS = 16  # of a sampler; HMC runs twice as many, and the others are the truth
SMC_RUNS = 8  # their spread gives the effective number of particles
WIDTH, DEPTH, SOLVER_STEPS = 32, 3, 8
CHUNK = 512  # draws that travel together
JUDGED = 8192  # draws of a flow, unless each of them costs gradients
REFINE_STEPS, REFINE_LEAPFROG = 2, 8
# gradients with which `refine` finds its step size, whatever the number of draws
PILOT = 12 * 5 * 64
WANTED = tuple(10**k for k in range(1, 7))
SHOWN = ("step_size", "n_leapfrog", "L")
SAMPLERS = ("HMC", "MCLMC", "SMC")
RAW, REFINED = ("weights flow", "informed flow"), " + refine"
OUT = Path("out")
FIGURE = Path(__file__).parents[2] / "docs" / "images" / "break_even.png"


class Sizes(NamedTuple):
    """How much of everything a cell runs; transitions and draws of each chain."""

    hmc: tuple[int, int]  # warm-up and draws
    mclmc: tuple[int, int]
    particles: int  # in each run of SMC
    few: int  # draws that are judged where each of them costs gradients
    budget: float  # seconds of training of each flow


SIZES = {
    100: Sizes((400, 1000), (200, 1000), 256, JUDGED, 90.0),
    1_000: Sizes((300, 600), (200, 600), 128, JUDGED, 90.0),
    10_000: Sizes((200, 250), (100, 250), 64, 4096, 90.0),
    100_000: Sizes((150, 150), (60, 100), 24, 512, 90.0),
}
QUICK = {
    100: Sizes((100, 100), (60, 100), 64, 2048, 10.0),
    1_000: Sizes((100, 100), (60, 100), 32, 1024, 10.0),
    10_000: Sizes((60, 60), (40, 60), 16, 256, 10.0),
}


# ---------------------------------------- the posterior


def counted(name: str) -> Any:
    """Return this method of a model, which adds to ``gradients`` unless another one of them has
    called it.
    """
    method = getattr(bf.BayesianModel, name)

    def counting(self: Any, theta: Tensor, rows: Tensor | None = None) -> Any:
        outer, self.inside = self.inside, True
        try:
            return method(self, theta, rows)
        finally:
            self.inside = outer
            if not outer:
                share = 1.0 if rows is None else rows.shape[-1] / len(self.x)
                self.gradients += share * theta[..., 0].numel()

    return counting


class Counted(bf.BayesianModel):
    """A model that counts gradients of its likelihood, in units of one network and all rows."""

    gradients = 0.0
    inside = False
    log_joint_and_grad = counted("log_joint_and_grad")
    log_likelihood_and_grad = counted("log_likelihood_and_grad")
    log_likelihood_grad = counted("log_likelihood_grad")
    at = counted("at")


def model_of(x: Tensor, y: Tensor, noise: float) -> Counted:
    """Return the network on these rows."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
    return Counted(net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(noise), x, y)  # type: ignore[arg-type]


def problem(rows: int, noise: float) -> tuple[Counted, Counted]:
    """Return the posterior, and the model on test rows, whose noise is 1 in every cell."""
    generator = torch.Generator().manual_seed(1)
    test, x = (torch.randn(n, 2, generator=generator) for n in (TEST_ROWS, rows))
    blank = model_of(test, test[:, 0], FIRST_NOISE)
    teacher = blank.sample_prior(1, 3)
    values = [blank.outputs(teacher, inputs).flatten() for inputs in (test, x)]
    y_test, y = (
        value + scale * torch.randn(len(value), generator=generator)
        for value, scale in zip(values, (FIRST_NOISE, noise), strict=True)
    )
    return model_of(x, y, noise), model_of(test, y_test, FIRST_NOISE)


# ---------------------------------------- what draws cost, and what they are worth


@dataclass(frozen=True)
class Offer:
    """Posterior draws at a price: so much before the first, so much for each, good for at most
    ``worth`` of them.
    """

    name: str
    start_cpu: float
    each_cpu: float
    start_gradients: float
    each_gradients: float
    effective: float  # draws that were judged
    rms: float
    ratio: float
    gap: float
    worth: float
    at_least: bool  # the comparison shows no bias, so that the worth is a lower bound

    def total(self, draws: float) -> float:
        """Return the CPU seconds of so many effective draws."""
        return self.start_cpu + draws * self.each_cpu


@dataclass(frozen=True)
class Price:
    """CPU seconds and gradients."""

    cpu: float
    gradients: float

    def __add__(self, other: "Price") -> "Price":
        return Price(self.cpu + other.cpu, self.gradients + other.gradients)

    def of(self, share: float) -> "Price":
        """Return a part of it."""
        return Price(share * self.cpu, share * self.gradients)


class Judge:
    """Compares draws with held-out ones in what they predict at the test inputs."""

    def __init__(self, test: bf.BayesianModel, truth: Tensor, effective: float) -> None:
        self.test, self.effective = test, effective
        values = self.values(truth)
        self.mean, self.sd = values.mean(0), values.std(0)
        self.lppd = self._lppd(truth, None)

    def values(self, theta: Tensor) -> Tensor:
        """Return the outputs at the test inputs, ``(draw, row)`` in float64."""
        return torch.cat(
            [self.test.outputs(part, self.test.x)[..., 0] for part in theta.split(4096)]
        ).double()

    def _lppd(self, theta: Tensor, log_weights: Tensor | None) -> float:
        return bf.metrics.lppd(
            bf.predict(self.test, (theta, log_weights), self.test.x), self.test.y
        )

    def offer(
        self,
        name: str,
        theta: Tensor,
        start: Price,
        each: Price,
        effective: float,
        log_weights: Tensor | None = None,
    ) -> Offer:
        """Judge draws ``(draw, dim)``, print their row and return it."""
        values = self.values(theta)
        weights = torch.zeros(len(values)) if log_weights is None else log_weights
        weights = weights.double().softmax(0)[:, None]
        mean = (weights * values).sum(0)
        sd = (weights * (values - mean).square()).sum(0).sqrt()
        bias = float(((mean - self.mean) / self.sd).square().mean())
        spread = float((sd / self.sd).log().square().mean())
        # The log of a standard deviation of n draws has half the variance of their mean in standard
        # deviations.
        expected = 1 / self.effective + 1 / effective
        excess = max(bias, 2 * spread) - expected
        found = Offer(
            name, start.cpu, each.cpu, start.gradients, each.gradients, effective,
            rms=bias**0.5, ratio=float((sd / self.sd).log().mean().exp()),
            gap=self.lppd - self._lppd(theta, log_weights),
            worth=1 / max(excess, expected), at_least=excess <= expected,
        )  # fmt: skip
        print(row(found), flush=True)
        return found


def row(offer: Offer) -> str:
    """Return a line of the table of prices."""
    return (
        f"  {offer.name:24s} {offer.start_cpu:9.1f} {1e3 * offer.each_cpu:10.3f} "
        f"{offer.start_gradients / 1e3:10.0f} {offer.each_gradients:10.1f} {offer.effective:10.0f} "
        f"{offer.rms:7.3f} {offer.ratio:7.3f} {offer.gap:8.4f} "
        f"{'>' * offer.at_least:>2s}{offer.worth:<8.0f}"
    )


def header() -> str:
    return (
        f"  {'':24s} {'start':^20s} {'each effective draw':^21s}\n"
        f"  {'':24s} {'CPU s':>9s} {'CPU ms':>10s} {'1,000 grad':>10s} {'gradients':>10s} "
        f"{'judged ESS':>10s} {'rms sd':>7s} {'ratio':>7s} {'gap':>8s} {'worth':>7s}"
    )


# ---------------------------------------- samplers


def priced(model: Counted, work: Callable[[], Any]) -> tuple[Any, Price]:
    """Return what the work returns, and what it costs."""
    before, began = model.gradients, time.process_time()
    result = work()
    return result, Price(time.process_time() - began, model.gradients - before)


def chains(
    method: Any, model: Counted, n: int, warmup: int, draws: int
) -> tuple[bf.Draws, Price, Price]:
    """Run chains; return their draws, and what warm-up and drawing cost: all gradients cost the
    same.
    """
    drawn, everything = priced(
        model,
        lambda: bf.sample(
            model, method, chains=n, warmup=warmup, draws=draws, seed=SEED, progress=False
        ),
    )
    share = float(drawn.stats["n_steps"].double().sum()) / everything.gradients
    return drawn, everything.of(1 - share), everything.of(share)


def effective_draws(draws: bf.Draws, test: bf.BayesianModel) -> float:
    """Return the bulk ESS of what chains predict at the median test input.

    Say what their verdict is.
    """
    found = bf.diagnose(test, draws, test.x)
    assert found.r_hat is not None
    assert found.ess_bulk is not None
    told = ", ".join(f"{key} {draws.info[key]:.3g}" for key in SHOWN if key in draws.info)
    print(
        f"    {found.method}: {told}, worst R-hat {np.max(found.r_hat):.3f}, divergences "
        f"{found.divergences}"
    )
    return float(np.median(found.ess_bulk))


def effective_particles(draws: bf.Draws, judge: Judge) -> float:
    """Return how many independent draws all runs together are worth, by the variance of the runs'
    means.
    """
    assert draws.log_weights is not None
    weights = draws.log_weights.double().softmax(1)  # (run, particle)
    values = judge.values(draws.flat).unflatten(0, weights.shape)
    means = (weights.unsqueeze(-1) * values).sum(1)  # (run, row)
    by_spread = len(means) / float((means.var(0) / judge.sd**2).mean())
    return min(by_spread, float(1 / weights.square().sum(1).mean()) * len(means))


# ---------------------------------------- a cell


def cell(rows: int, noise: float, sizes: Sizes) -> list[Offer]:
    """Price and judge everything on so many rows."""
    model, test = problem(rows, noise)
    model.log_joint_and_grad(model.sample_prior(2, 0))  # compiles
    for method in (bf.HMC(), bf.MCLMC()):
        # imports
        bf.diagnose(
            test, bf.sample(test, method, chains=2, warmup=2, draws=4, progress=False)
        )
    offers = []

    hmc, warm, drawing = chains(bf.HMC(), model, 2 * CHAINS, *sizes.hmc)
    # the chains run as one batch, and each pays its share
    half = effective_draws(hmc, test) / 2
    warm, drawing = warm.of(0.5), drawing.of(0.5)
    seen, unseen = hmc.theta[:CHAINS].flatten(0, 1), hmc.theta[CHAINS:].flatten(0, 1)
    judge = Judge(test, unseen, half)
    print(header())
    offers.append(judge.offer("HMC", seen, warm, drawing.of(1 / half), half))

    draws, begin, spent = chains(bf.MCLMC(), model, CHAINS, *sizes.mclmc)
    effective = effective_draws(draws, test)
    offers.append(
        judge.offer("MCLMC", draws.flat, begin, spent.of(1 / effective), effective)
    )

    method = bf.SMC(particles=sizes.particles)
    draws, spent = priced(
        model, lambda: bf.sample(model, method, chains=SMC_RUNS, seed=SEED, progress=False)
    )
    effective = effective_particles(draws, judge)
    assert draws.log_weights is not None
    weights = draws.log_weights.flatten()
    offers.append(
        judge.offer(
            "SMC", draws.flat, Price(0, 0), spent.of(1 / effective), effective, weights
        )
    )

    torch.manual_seed(SEED)
    fields = {
        "weights flow": (
            WeightsVelocity(model.spec, WIDTH, DEPTH, architecture="signed"),
            JUDGED,
        ),
        "informed flow": (
            InformedVelocity(
                model.spec, GradientSteps(), WIDTH, DEPTH, architecture="signed"
            ),
            sizes.few,
        ),
    }
    for name, (field, judged) in fields.items():
        flow, training = priced(
            model,
            partial(
                bf.fit_flow,
                model,
                seen,
                velocity=field,
                budget=sizes.budget,
                seed=SEED,
                progress=False,
            ),
        )
        print(
            f"    {name}: {flow.info['steps']} steps in {training.cpu:.0f} CPU s, loss "
            f"{flow.info['loss']:.2f}"
        )
        offers += sampled(
            name, flow, judged, sizes.few, model, judge, warm + drawing + training
        )
    return offers


def sampled(
    name: str,
    flow: bf.Flow,
    judged: int,
    few: int,
    model: Counted,
    judge: Judge,
    start: Price,
) -> list[Offer]:
    """Price and judge a flow's draws, as they are and refined."""
    flow.sample(16, 0)
    theta, spent = priced(
        model,
        lambda: flow.sample(
            judged, 1, chunk_size=CHUNK, solver=Solver("midpoint", SOLVER_STEPS)
        ),
    )
    each = spent.of(1 / judged)
    moved, spent = priced(
        model,
        lambda: bf.refine(
            model,
            theta[:few],
            REFINE_STEPS,
            n_leapfrog=REFINE_LEAPFROG,
            seed=2,
            progress=False,
        ),
    )
    pilot = PILOT / spent.gradients
    start_refined, more = start + spent.of(pilot), spent.of((1 - pilot) / few)
    return [
        judge.offer(name, theta, start, each, judged),
        judge.offer(name + REFINED, moved.flat, start_refined, each + more, few),
    ]


# ---------------------------------------- break-even


def break_even(flow: Offer, sampler: Offer, unit: str) -> float:
    """Return the number of draws from which the flow is the cheaper one.

    Infinite if it never is.
    """
    more = getattr(flow, f"start_{unit}") - getattr(sampler, f"start_{unit}")
    saved = getattr(sampler, f"each_{unit}") - getattr(flow, f"each_{unit}")
    return max(0.0, more) / saved if saved > 0 else math.inf


def break_even_with_all(flow: Offer, offers: list[Offer], unit: str) -> float:
    """Return the same against whichever sampler is the cheapest."""
    return max(break_even(flow, each, unit) for each in offers if each.name in SAMPLERS)


def count(number: float) -> str:
    return "never" if math.isinf(number) else f"{number:,.0f}"


def verdict(flow: Offer, offers: list[Offer]) -> str:
    """Say in words whether the flow pays."""
    begins = break_even_with_all(flow, offers, "cpu")
    if math.isinf(begins):
        return "no: each draw costs more than a sampler's"
    if begins > flow.worth:
        return (
            "not shown: no bias seen, but only to its worth"
            if flow.at_least
            else "no: biased before it pays"
        )
    return f"yes, from {count(begins)} draws to {'at least ' * flow.at_least}{count(flow.worth)}"


def summary(rows: int, offers: list[Offer]) -> None:
    """Print break-evens and totals of a cell."""
    flows = [each for each in offers if each.name not in SAMPLERS]
    print(f"  Break-even with {rows:,} rows, effective draws")
    names = "".join(f"{name:>12s}" for name in (*SAMPLERS, "all", "gradients"))
    print(f"  {'':24s}{names}    does it pay (CPU seconds, against all)?")
    samplers = [each for each in offers if each.name in SAMPLERS]
    for flow in flows:
        numbers = [break_even(flow, each, "cpu") for each in samplers]
        numbers += [
            break_even_with_all(flow, offers, unit) for unit in ("cpu", "gradients")
        ]
        print(
            f"  {flow.name:24s}" + "".join(f"{count(n):>12s}" for n in numbers) + f"    "
            f"{verdict(flow, offers)}"
        )
    print("  Total CPU seconds by wanted draws; in brackets: more than they are worth")
    print(f"  {'':24s}" + "".join(f"{n:>12,d}" for n in WANTED))
    for each in offers:
        totals = [f"{each.total(n):,.1f}" for n in WANTED]
        beyond = [n > each.worth and not each.at_least for n in WANTED]
        shown = (
            f"({total})" if bad else f"{total} "
            for total, bad in zip(totals, beyond, strict=True)
        )
        print(f"  {each.name:24s}" + "".join(f"{text:>12s}" for text in shown))
    print(flush=True)


def draw(cells: dict[int, list[Offer]], noise: str, path: Path) -> None:
    """Draw the price of a draw against rows, and of many draws with the most rows."""
    from matplotlib.figure import Figure

    from bnnflow.report.style import BODY, GREY, INK, PALETTE, quiet

    colours = dict(
        zip(
            (*SAMPLERS, *RAW),
            (PALETTE[0], PALETTE[4], GREY, PALETTE[1], PALETTE[2]),
            strict=True,
        )
    )
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [each.name for each in next(iter(cells.values()))]

    def look(name: str) -> dict[str, Any]:
        refined = name.endswith(REFINED)
        return {
            "color": colours[name.removesuffix(REFINED)],
            "linestyle": "--" if refined else "-",
            "linewidth": 1.6,
        }

    for name in names:
        found = [
            (n, each) for n, offers in cells.items() for each in offers if each.name == name
        ]
        at, prices = [n for n, _ in found], [1e3 * each.each_cpu for _, each in found]
        left.plot(at, prices, label=name, **look(name))
        for n, price, (_, each) in zip(at, prices, found, strict=True):
            fill = look(name)["color"] if each.at_least or each.worth >= 100 else "white"
            left.plot(
                n, price, "o", markersize=5, color=look(name)["color"], markerfacecolor=fill
            )
    left.set(
        xscale="log",
        yscale="log",
        xlabel="rows of data",
        ylabel="CPU ms, start-up not counted",
    )
    left.set_title("One effective draw", fontsize=BODY, loc="left")

    rows, offers = max(cells.items())
    wanted = torch.logspace(1, 6, 201).tolist()
    for each in offers:
        right.plot(
            wanted,
            [each.total(n) for n in wanted],
            alpha=1 if each.at_least else 0.3,
            **look(each.name),
        )
        if not each.at_least:
            good = [n for n in wanted if n <= each.worth]
            right.plot(good, [each.total(n) for n in good], **look(each.name))
        begins = (
            math.inf if each.name in SAMPLERS else break_even_with_all(each, offers, "cpu")
        )
        if begins <= wanted[-1]:
            colour = look(each.name)["color"]
            fill = colour if begins <= each.worth else "white"
            right.plot(
                begins,
                each.total(begins),
                "o",
                color=colour,
                markerfacecolor=fill,
                markersize=7,
                zorder=5,
            )
            right.annotate(
                f"{float(f'{begins:.2g}'):,.0f}", (begins, each.total(begins)), (0, 8),
                textcoords="offset points", ha="right", fontsize=8, color=colour,
            )  # fmt: skip
    right.set(
        xscale="log",
        yscale="log",
        xlabel="effective draws wanted",
        ylabel="CPU seconds, everything counted",
    )
    right.set_title(f"All of them, {rows:,} rows", fontsize=BODY, loc="left")
    told = "faint: more draws than they are worth\n● break-even,  ○ beyond their worth"
    right.text(0.03, 0.97, told, transform=right.transAxes, va="top", fontsize=8, color=INK)
    told = "○ worth fewer than 100 exact draws"
    left.text(0.03, 0.97, told, transform=left.transAxes, va="top", fontsize=8, color=INK)
    for ax in (left, right):
        quiet(ax)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    posterior = (
        "the same posterior in every cell"
        if noise == "scaled"
        else "noise 1: the posterior sharpens"
    )
    figure.suptitle(
        f"Regression, 2-{HIDDEN}-1 tanh, 65 weights; {posterior}", fontsize=BODY
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"figure: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", choices=list(SIZES), help="compute these cells anew"
    )
    parser.add_argument(
        "--noise",
        choices=["scaled", "fixed"],
        default="scaled",
        help="what more rows do; see above",
    )
    parser.add_argument("--budget", type=float, help="seconds of training of each flow")
    parser.add_argument(
        "--quick", action="store_true", help="three small cells: does it run?"
    )
    parser.add_argument(
        "--draw-only", action="store_true", help="print and draw the cells that are there"
    )
    parser.add_argument(
        "--figure",
        action="store_true",
        help=f"write the picture to docs/images/{FIGURE.name}",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = QUICK if args.quick else SIZES
    if args.rows and not set(args.rows) <= set(given):
        parser.error(f"--quick has the cells {', '.join(map(str, given))}")
    name = f"break_even{'_quick' * args.quick}"
    file = OUT / f"{name}.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    print(
        f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, one thread, CPU seconds; "
        f"noise {args.noise}\n"
    )
    cells = {}
    for rows, sizes in given.items():
        sizes = sizes if args.budget is None else sizes._replace(budget=args.budget)
        settings = json.loads(
            json.dumps([sizes, WIDTH, DEPTH, SOLVER_STEPS, REFINE_STEPS, REFINE_LEAPFROG])
        )
        key = f"{args.noise} {rows}"
        asked = (
            rows in args.rows
            if args.rows
            else kept.get(key, {}).get("settings") != settings
        )
        if asked and not args.draw_only:
            noise = (
                FIRST_NOISE * (rows / FIRST_ROWS) ** 0.5
                if args.noise == "scaled"
                else FIRST_NOISE
            )
            print(f"{rows:,} rows, noise {noise:.3g}")
            began = time.process_time()
            offers = cell(rows, noise, sizes)
            seconds = time.process_time() - began
            kept[key] = {
                "settings": settings,
                "cpu_seconds": seconds,
                "offers": [asdict(each) for each in offers],
            }
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(kept, indent=1))
            print(f"    {seconds:.0f} CPU s for all\n")
        if key in kept:
            cells[rows] = [Offer(**each) for each in kept[key]["offers"]]
    if not cells:
        parser.error(f"{file} has no cells with noise {args.noise}")
    for rows, offers in cells.items():
        print(f"{rows:,} rows\n{header()}")
        print("\n".join(row(each) for each in offers))
        summary(rows, offers)
    draw(cells, args.noise, FIGURE if args.figure else OUT / f"{name}.png")


if __name__ == "__main__":
    main()
