"""Flows on five posteriors: what the raw flow, its refinement and its density are worth, beside
untrained starts.

``sine``: 1-16-1 tanh, y = sin(2 x), noise 0.1, 40 points. ``yacht``: 6-50-1 tanh, noise 0.1 (d =
401, very sharp). ``iris``: 4-16-3 tanh. ``cancer`` and ``cancer2``: breast cancer, 30-16-2 and
30-16-16-2 tanh. N(0, 1) on all weights. The truth are HMC draws of chains that the flow did not
see; beside them the published LPPD of a converged run of another library, where ``$BNNFLOW_DATA``
has one (iris, yacht). Functions are network outputs at the test points, or probabilities of
classes: "rms" is the error of their means in posterior standard deviations, "ratio" the geometric
mean of ratios of standard deviations. LPPD from 4,096 draws. "Gradients" count the likelihood
gradients of a draw, refinement and the field's own. One thread, CPU seconds. "An effective draw" is
one of bulk ESS of the functions (the median over them); draws of a flow are independent, but worth
what the table says. What has to be paid once, warm-up or training, is "start"; training needs HMC
draws too. Run: ``python tests/benchmarks/bench_flows.py [NAME] [--budget SECONDS] [--velocity
informed|weights] [--density N]``.
"""

import argparse
import itertools
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import bnnflow as bf
from bnnflow.transport import (
    Flow,
    GaussNewton,
    GradientSteps,
    InformedVelocity,
    Matching,
    Solver,
    WeightsVelocity,
    distil,
    fit_flow_without_draws,
    fit_gaussian,
)

DRAWS = 4096
CHAINS, WARMUP = 64, 600
PARTICLES = 250  # in each of eight runs of SMC
DATA = Path(os.environ.get("BNNFLOW_DATA", Path(__file__).parents[3] / "shared" / "data"))


class Problem(NamedTuple):
    """A posterior with test rows.

    Mean and sd of the functions there, LPPD and log joint if they are published.
    """

    model: bf.BayesianModel
    x: Tensor
    y: Tensor
    published: dict[str, np.ndarray]


def perceptron(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        layer
        for pair in itertools.pairwise(widths)
        for layer in (nn.Linear(*pair), nn.Tanh())
    ]
    return nn.Sequential(*layers[:-1])


def problem(name: str) -> Problem:
    """Return the posterior, or end the script where its data are missing."""
    if name == "sine":
        g = torch.Generator().manual_seed(0)
        x = torch.linspace(-2, 2, 40)[:, None]
        y = torch.sin(2 * x[:, 0]) + 0.1 * torch.randn(40, generator=g)
        grid = torch.linspace(-2.5, 2.5, 50)[:, None]
        net, likelihood, test = (
            perceptron(1, 16, 1),
            bf.likelihoods.Gaussian(0.1),
            (grid, torch.sin(2 * grid[:, 0])),
        )
        return Problem(
            bf.BayesianModel(net, bf.priors.Normal(1.0), likelihood, x, y), *test, {}
        )
    if name.startswith("cancer"):
        data = bf.data.load("breast_cancer")
        net = perceptron(30, 16, 2) if name == "cancer" else perceptron(30, 16, 16, 2)
        model = bf.BayesianModel(
            net,
            bf.priors.Normal(1.0),
            bf.likelihoods.Categorical(),
            data.x_train,
            data.y_train,
        )
        return Problem(model, data.x_test, data.y_test, {})
    file = {"iris": "iris", "yacht": "yacht_s01"}[name]
    path = DATA / "reference" / f"{file}.npz"
    if not path.is_file():
        print(f"skipped: needs reference/{file}.npz under $BNNFLOW_DATA (looked in {DATA})")
        sys.exit(0)
    found = np.load(path)
    net = perceptron(4, 16, 3) if name == "iris" else perceptron(6, 50, 1)
    likelihood = (
        bf.likelihoods.Categorical() if name == "iris" else bf.likelihoods.Gaussian(0.1)
    )
    model = bf.BayesianModel(
        net, bf.priors.Normal(1.0), likelihood, found["Xtr"], found["ytr"]
    )
    y = torch.as_tensor(found["yte"])
    published = {key: found[key] for key in found.files}
    return Problem(
        model,
        torch.as_tensor(found["Xte"]).float(),
        y if name == "iris" else y.float(),
        published,
    )


class Table:
    """Rows of draws compared with the truth."""

    def __init__(self, given: Problem, truth: Tensor) -> None:
        self.given = given
        functions = self._functions(truth)
        self.mean, self.sd = functions.mean(0), functions.std(0)
        self.variance = truth.var(0)
        print(
            f"{'draws':36s} {'LPPD':>8s} {'+-':>6s} {'log lik.':>9s} {'5%':>8s} "
            f"{'log joint':>9s} {'rms':>6s} {'ratio':>6s} {'gradients':>9s} {'CPU s':>7s}"
        )
        self.row("held-out HMC", truth, 0, 0)

    def _functions(self, theta: Tensor) -> Tensor:
        model, x = self.given.model, self.given.x
        outputs = torch.cat([model.outputs(part, x) for part in theta.split(1024)]).double()
        return outputs.softmax(-1) if model.likelihood.kind == "classification" else outputs

    def row(self, name: str, theta: Tensor, gradients: float, seconds: float) -> None:
        """Print one row."""
        model, x, y = self.given.model, self.given.x, self.given.y
        each = torch.cat(
            [model.pointwise_log_likelihood(part, x, y) for part in theta.split(1024)]
        ).double()
        lppd = each.logsumexp(0) - math.log(len(each))
        error = float((each - lppd).exp().mean(1).std() / len(each) ** 0.5)
        likelihood = torch.cat(
            [model.log_likelihood(part) for part in theta.split(1024)]
        ).double()
        joint = likelihood + model.log_prior(theta)
        functions = self._functions(theta)
        rms = float(((functions.mean(0) - self.mean) / self.sd).square().mean().sqrt())
        ratio = float((functions.std(0) / self.sd).log().mean().exp())
        print(
            f"{name:36s} {float(lppd.mean()):8.4f} {error:6.4f} {float(likelihood.mean()):9.2f} "
            f"{float(likelihood.quantile(0.05)):8.2f} {float(joint.mean()):9.2f} {rms:6.3f} "
            f"{ratio:6.3f} {gradients:9.0f} {seconds:7.1f}",
            flush=True,
        )

    def by_layer(self, theta: Tensor) -> str:
        """Return the variance of each tensor over the truth's, summed over its weights."""
        own, spec = theta.var(0), self.given.model.spec
        ratios = {
            name: own[where].sum() / self.variance[where].sum()
            for name, where in spec.slices.items()
        }
        return ", ".join(f"{name} {float(ratio):.2f}" for name, ratio in ratios.items())


def nearest(theta: Tensor, draws: Tensor, spec: bf.WeightSpec) -> Tensor:
    """Return the distance of each network to the nearest draw, every network sorted into one order
    of its units.
    """
    here, there = (bf.symmetry.sort_units(part, spec) for part in (theta, draws))
    return torch.cdist(here, there).min(1).values


def price(
    name: str, seconds: float, gradients: float, each: float, start: float = 0.0
) -> None:
    """Print what a draw costs that is worth an independent one, and what there is to pay before the
    first.
    """
    print(
        f"  {name:34s} {1e3 * seconds / each:10.2f} {gradients / each:10.0f} {start:10.0f}",
        flush=True,
    )


def prices(model: bf.BayesianModel, hmc: bf.Draws, hmc_ess: float) -> tuple[float, float]:
    """Print what effective draws of samplers cost.

    Return the log evidence by tempered SMC and its error.
    """
    print(
        f"  {'an effective draw':34s} {'CPU ms':>10s} {'gradients':>10s} {'start, s':>10s}"
    )
    chains, warmup, draws = CHAINS, WARMUP, hmc.theta.shape[1]
    share = draws / (warmup + draws)  # of the gradients; those of adaptation are paid once
    cpu, count = hmc.info["cpu_seconds"], hmc.info["gradients_per_chain"] * chains
    price("HMC", cpu * share, count * share, hmc_ess, cpu * (1 - share))
    other = bf.sample(model, bf.MCLMC(), chains=chains, warmup=WARMUP, draws=400, seed=1)
    cpu, count = other.info["cpu_seconds"], other.info["gradients_per_chain"] * chains
    share = 400 / (WARMUP + 400)
    found = bf.diagnose(model, other)
    worst = f", R-hat {found.r_hat.max():.3f}" if found.r_hat is not None else ""
    price(
        f"MCLMC{worst}",
        cpu * share,
        count * share,
        float(np.median(found.ess_bulk)),
        cpu * (1 - share),
    )
    particles = bf.sample(model, bf.SMC(particles=PARTICLES), chains=8, seed=2)
    weights, evidence = particles.log_weights, particles.log_evidence
    assert weights is not None, "SMC weighs its particles"
    assert evidence is not None, "the temperature is 1"
    each = float((2 * weights.logsumexp(1) - (2 * weights).logsumexp(1)).exp().sum())
    cpu, count = (
        particles.info["cpu_seconds"],
        particles.info["gradients_per_chain"] * 8 * PARTICLES,
    )
    price("SMC, ESS of weights at most", cpu, count, each)
    return evidence


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name",
        nargs="?",
        default="iris",
        choices=["sine", "yacht", "iris", "cancer", "cancer2"],
    )
    parser.add_argument("--budget", type=float, default=900.0, help="seconds of training")
    parser.add_argument("--velocity", choices=["informed", "weights"], default="informed")
    parser.add_argument(
        "--architecture", choices=["signed", "dws", "graph"], default="signed"
    )
    parser.add_argument(
        "--newton", type=int, help="Gauss-Newton steps; gradient steps if 0"
    )
    parser.add_argument("--climb", type=int, default=12, help="gradient steps")
    parser.add_argument(
        "--batch", type=int, default=512, help="pairs in a step of training"
    )
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, help="of messages between units")
    parser.add_argument("--steps", type=int, default=8, help="of the midpoint rule")
    parser.add_argument(
        "--reuse", type=int, default=1, help="steps of training that see each pair"
    )
    parser.add_argument(
        "--draws",
        type=int,
        help="of each of 48 more chains to train on; the others' 800 otherwise",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the field for training: a minute, then faster",
    )
    parser.add_argument(
        "--no-starts",
        action="store_true",
        help="leave out the rows of starts without training",
    )
    parser.add_argument(
        "--map",
        type=float,
        default=0.0,
        help="seconds for a map of four evaluations from the flow",
    )
    parser.add_argument(
        "--no-draws",
        type=float,
        default=0.0,
        help="seconds for a flow that makes its own targets",
    )
    parser.add_argument(
        "--refine", type=int, default=8, help="transitions of every row's refinement"
    )
    parser.add_argument(
        "--density", type=int, default=1000, help="draws with an exact density; 0 for none"
    )
    parser.add_argument(
        "--annealed",
        type=int,
        default=1000,
        help="draws that are annealed back for the evidence",
    )
    parser.add_argument(
        "--density-steps", type=int, default=8, help="half as many as there are traces"
    )
    parser.add_argument(
        "--load", action="store_true", help="take the flow that an earlier run has saved"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = problem(args.name)
    model = given.model
    draws = bf.sample(model, bf.HMC(), chains=CHAINS, warmup=WARMUP, draws=800, seed=0)
    print(
        f"{args.name}, dim {model.dim}: {CHAINS} chains x 800 in {draws.info['cpu_seconds']:.0f} "
        "CPU s"
    )
    found = bf.diagnose(model, draws)
    print(found)
    if given.published:
        info = json.loads(str(given.published["info"]))
        lppd, error = info.get("lppd", info.get("lppd_std")), info["lppd_mc_se"]
        print(
            f"published: LPPD {lppd:.4f} +- {error:.4f}, log joint {info['log_joint_mean']:.2f}"
        )
    evidence = prices(model, draws, float(np.median(found.ess_bulk)))
    print(f"  log evidence by SMC: {evidence[0]:.2f} +- {evidence[1]:.2f}")
    seen, unseen = draws.theta[:48].flatten(0, 1), draws.theta[48:].flatten(0, 1)
    if args.draws:
        more = bf.sample(
            model, bf.HMC(), chains=48, warmup=WARMUP, draws=args.draws, seed=5
        )
        seen = more.flat
        print(f"  {len(seen):,} draws to train on in {more.info['cpu_seconds']:.0f} CPU s")
    table = Table(
        given,
        unseen[
            torch.randperm(len(unseen), generator=torch.Generator().manual_seed(0))[:DRAWS]
        ],
    )
    newton = (
        args.newton
        if args.newton is not None
        else {"sine": 2, "yacht": 4}.get(args.name, 0)
    )
    proximal_step = (
        GaussNewton(newton) if newton else GradientSteps(args.accelerated_ascent)
    )
    design = {
        name: getattr(args, name) for name in ("architecture", "width", "depth", "heads")
    }
    own = args.steps * 2 * (newton or 2 * args.accelerated_ascent + 1)

    def show(name: str, theta: Tensor, gradients: float, seconds: float) -> bf.Draws:
        table.row(name, theta, gradients, seconds)
        moved = bf.refine(model, theta, args.refine, seed=2)
        cost = moved.info["gradients_per_draw"]
        total, spent = gradients + cost, seconds + moved.info["cpu_seconds"]
        table.row(f"  + refine ({cost:.0f} gradients)", moved.flat, total, spent)
        return moved

    if not args.no_starts:
        show("prior", model.sample_prior(DRAWS, 1), 0, 0)
        show(
            "one matched Gaussian", fit_gaussian(model, seen, seed=0).sample(DRAWS, 1), 0, 0
        )
        untrained = bf.GaussNewtonFlow(
            model, proximal_step, solver=Solver(steps=args.steps)
        )
        began = time.process_time()
        theta = untrained.sample(DRAWS, 1)
        show("untrained informed field", theta, own, time.process_time() - began)

    kind = (
        ""
        if args.velocity == "weights"
        else f"-newton{newton}"
        if newton
        else f"-climb{args.climb}"
    )
    path = Path(f"out/{args.name}-{args.architecture}-{args.velocity}{kind}.npz")
    if args.load:
        flow = Flow.load(path, model)
    else:
        torch.manual_seed(0)
        if args.velocity == "weights":
            field = WeightsVelocity(model.spec, **design)
        else:
            field = InformedVelocity(model.spec, proximal_step, **design)
        training = bf.Training(
            budget=args.budget, batch_size=args.batch, compile=args.compile
        )
        matching = Matching(reuse=args.reuse)
        flow = bf.fit_flow(
            model, seen, velocity=field, matching=matching, training=training, seed=0
        )
        flow.save(path)
    info = flow.info
    print(
        f"  {args.velocity} flow: {info['steps']} steps, {info['cpu_seconds']:.0f} CPU s, "
        f"{info['parameters']} parameters, loss by quarter "
        f"{[round(value, 1) for value in info['loss_by_time']]}"
    )
    began = time.process_time()
    theta = flow.sample(DRAWS, 1, solver=Solver(steps=args.steps))
    seconds, own = time.process_time() - began, 0 if args.velocity == "weights" else own
    moved = show(f"{args.velocity} flow", theta, own, seconds)
    for name, some in (("refined draws", moved), ("raw draws", theta)):
        began = time.process_time()
        value, error = bf.evidence(
            model, some, bf.SMC(particles=args.annealed, ess=0.9), seed=4
        )
        print(
            f"  log evidence by annealing {args.annealed} {name} back: {value:.2f} +- "
            f"{error:.2f}, {time.process_time() - began:.0f} CPU s (SMC {evidence[0]:.2f} +- "
            f"{evidence[1]:.2f})"
        )
    print(f"  variance over the truth's: {table.by_layer(theta)}")
    generated, fresh = (nearest(each[:1000], seen, model.spec) for each in (theta, unseen))
    print(
        f"  median distance to the nearest training draw: {float(generated.median()):.2f}, "
        f"of unseen draws {float(fresh.median()):.2f}"
    )
    if args.map:
        quick = distil(flow, 4, seed=0, training=bf.Training(budget=args.map))
        began = time.process_time()
        theta = quick.sample(DRAWS, 1)
        gradients = own * 4 / (2 * args.steps)
        show(
            f"map of it, {quick.info['cpu_seconds']:.0f} CPU s",
            theta,
            gradients,
            time.process_time() - began,
        )
    if args.no_draws:
        torch.manual_seed(0)
        field = InformedVelocity(model.spec, proximal_step, **design)
        began = time.process_time()
        alone = fit_flow_without_draws(
            model,
            proximal_step=proximal_step,
            velocity=field,
            seed=0,
            training=bf.Training(batch_size=args.batch, budget=args.no_draws),
        )
        spent, began = time.process_time() - began, time.process_time()
        theta = alone.sample(DRAWS, 1, solver=Solver(steps=args.steps))
        show(
            f"flow without draws, {spent:.0f} CPU s in all",
            theta,
            own,
            time.process_time() - began,
        )
    price(
        "a draw of the flow, not corrected",
        seconds,
        own * DRAWS,
        DRAWS,
        info["cpu_seconds"],
    )
    if args.density:
        # draws need less than their densities
        flow = replace(flow, solver=Solver(steps=args.density_steps))
        began = time.process_time()
        fixed = bf.correct(
            model,
            flow,
            args.density,
            "importance",
            seed=3,
            held_out=unseen[:: len(unseen) // args.density],
        )
        seconds = time.process_time() - began
        spread = float(fixed.log_weights.std())  # the largest are smoothed
        print(
            f"  importance sampling, {args.density} draws: k-hat {fixed.khat:.2f}, ESS "
            f"{fixed.ess:.0f}, sd of log weights {spread:.2f}, log evidence {fixed.log_evidence} "
            f"(SMC {evidence}), {seconds:.0f} CPU s\n  {fixed.verdict}"
        )


if __name__ == "__main__":
    main()
