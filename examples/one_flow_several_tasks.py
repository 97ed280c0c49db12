"""One flow for a family of posteriors: trained on some data sets, used on others without training.

The likelihood-informed field knows its data through gradients alone, and its weights through layers
whose parameters do not depend on the number of hidden units. So the same parameters are a field for
every regression of a family: 1-16-1 tanh, N(0, 1) on all weights, 10 to 40 rows with a gap between
them, known noise of 0.1 to 0.5; every other function is a network drawn from the prior, the others
are sums of sines. It is trained on pairs of many tasks at once, whose draws are those of short HMC
runs, and judged on tasks of the family that it has never seen, in networks of half and twice the
width, and on data from outside: the sine of the benchmarks, and a step with less noise and more
rows than any task.

Beside it stand what needs no training, the prior and the pull of the data alone
(`bf.GaussNewtonFlow`), and fields of the same size that were trained on one of the tasks alone,
with as many steps and pairs, or few. The "tuned flow" is the one for all after as few more steps
there, with its own refined draws and no chain. "Refined" is `bf.refine`, eight transitions of at
most eight leapfrog steps. All against HMC chains: "rms" is the error of the mean function in
posterior standard deviations and "ratio" the geometric mean of ratios of standard deviations, both
at 50 points of [-2.5, 2.5]; "log lik." and "LPPD" are how far above HMC the draws are on the data
and on 200 fresh rows, in nats and in nats a row. Mean and standard deviation over tasks. The row
"other chains" is what the comparison itself is worth; its CPU seconds are those of the whole HMC
run, 64 chains of 300 + 200 transitions.

Run: python examples/one_flow_several_tasks.py [--full]: few tasks and little training, so that the
figures show what is compared and no more, or, in twenty minutes, the tables of docs/experiments.md.
One thread; everything that takes long stays in out/one_flow.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from weight_space import remembered, table

import bnnflow as bf
from bnnflow.importance import kish_ess, log_mean, psis
from bnnflow.report import style
from bnnflow.transport import (
    AffinePath,
    GaussNewton,
    Independent,
    InformedVelocity,
    Matching,
    ProbabilityPath,
    Solver,
    train,
)
from bnnflow.transport.targets import PosteriorTargets
from bnnflow.transport.whitened import WhitenedPosterior

OUT = Path("out/one_flow")
HIDDEN = 16
ROWS, NOISE, REACH = (10, 40), (0.1, 0.5), 2.0
# the last are steps of the two displacements that are mixed
WIDTH, DEPTH, NEWTON = (
    48,
    3,
    (1, 2),
)
TASKS_A_STEP, BATCH = 4, 256
CHAINS, LONG, SHORT = (
    64,
    (300, 200),
    (200, 100),
)  # warm-up and draws, to compare and to train
SOLVER_STEPS = 12
REFINE = 8, 8  # transitions and the most leapfrog steps of each
GRID = torch.linspace(-2.5, 2.5, 50)[:, None]
PULL, OURS, TUNED = "pull", "one flow", "tuned flow"
FIGURES = ("rms", "ratio", "log lik.", "LPPD", "CPU s")

Starts = dict[str, Callable[[int], Tensor]]  # what draws a number of weights


class Sizes(NamedTuple):
    """How much of everything."""

    tasks: int  # trained on
    unseen: int
    widths: tuple[int, ...]
    steps: int  # of training
    tuning: int  # steps of it on one more task
    draws: int  # that are judged
    own: int  # unseen tasks that get fields of their own, as the sine does
    weighed: int  # draws with a density
    solver: int  # RK4 steps of a density
    particles: int  # of the SMC that its evidence is compared with


FULL = Sizes(
    tasks=48,
    unseen=8,
    widths=(16, 8, 32),
    steps=1800,
    tuning=300,
    draws=1024,
    own=1,
    weighed=64,
    solver=12,
    particles=500,
)
SMALL = Sizes(
    tasks=6,
    unseen=2,
    widths=(16,),
    steps=60,
    tuning=15,
    draws=256,
    own=1,
    weighed=16,
    solver=2,
    particles=100,
)


# ---------------------------------------- tasks


class Task(NamedTuple):
    """A data set and fresh rows of the same law."""

    name: str
    x: Tensor
    y: Tensor
    noise: float
    x_test: Tensor
    y_test: Tensor
    truth: Tensor  # the function on the grid

    def model(self, hidden: int = HIDDEN) -> bf.BayesianModel:
        """Return the posterior of a network of this width."""
        return network(hidden, self.x, self.y, self.noise)


def network(hidden: int, x: Tensor, y: Tensor, noise: float) -> bf.BayesianModel:
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1))
    return bf.BayesianModel(
        net, bf.priors.Normal(1.0), bf.likelihoods.Gaussian(noise), x, y
    )


def task_of(
    name: str,
    x: Tensor,
    function: Callable[[Tensor], Tensor],
    noise: float,
    g: torch.Generator,
) -> Task:
    x_test = 5 * torch.rand(200, 1, generator=g) - 2.5
    y, y_test = (
        function(each) + noise * torch.randn(len(each), generator=g) for each in (x, x_test)
    )
    return Task(name, x, y, noise, x_test, y_test, function(GRID))


def random_task(seed: int) -> Task:
    """Draw a task of the family; even ones are functions of the model, odd ones are not."""
    g = torch.Generator().manual_seed(seed)
    # between them is a gap
    low, high = (REACH * (1.5 * torch.rand(2, generator=g) - 0.75)).sort().values
    x = torch.rand(
        int(torch.randint(ROWS[0], ROWS[1] + 1, (), generator=g)), 1, generator=g
    )
    x = x * (2 * REACH - (high - low)) - REACH
    x = torch.where(x < low, x, x + high - low)
    noise = NOISE[0] * (NOISE[1] / NOISE[0]) ** float(torch.rand((), generator=g))
    blank = network(HIDDEN, GRID, GRID[:, 0], 1.0)
    teacher = blank.sample_prior(1, g)
    frequency, phase, amplitude = torch.randn(3, 6, generator=g)

    def sines(x: Tensor) -> Tensor:
        return (amplitude * (1.5 * frequency * x + 3 * phase).sin()).sum(-1) / 3**0.5

    function = (lambda x: blank.outputs(teacher, x).flatten()) if seed % 2 == 0 else sines
    return task_of(f"{seed}", x, function, noise, g)


def outsiders() -> list[Task]:
    """Return tasks from outside the family: the second also in rows, noise and reach."""
    g = torch.Generator().manual_seed(0)
    sine = task_of(
        "sine", torch.linspace(-2, 2, 40)[:, None], lambda x: (2 * x[:, 0]).sin(), 0.1, g
    )
    step = task_of(
        "step", torch.linspace(-2.5, 2.5, 80)[:, None], lambda x: x[:, 0].sign(), 0.05, g
    )
    return [sine, step]


def chains_of(task: Task, hidden: int, long: bool) -> bf.Draws:
    """Return HMC draws, of an earlier run if there is one."""
    path = OUT / f"hmc-{task.name}-{hidden}-{'long' if long else 'short'}.npz"
    if not path.is_file():
        warmup, draws = LONG if long else SHORT
        run = bf.sample(
            task.model(hidden),
            bf.HMC(),
            chains=CHAINS,
            warmup=warmup,
            draws=draws,
            seed=int(long),
            progress=False,
        )
        run.save(path)
    return bf.Draws.load(path)


# ---------------------------------------- one field for many posteriors


class Family(nn.Module):
    """A field for many posteriors.

    The last coordinate of a point is the number of its posterior, and does not move.
    """

    def __init__(self, field: InformedVelocity, contexts: list[WhitenedPosterior]) -> None:
        super().__init__()
        self.field, self.contexts = field, contexts

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        t, velocity = t.to(x.dtype).expand(len(x)), torch.zeros_like(x)
        for k, rows in members(x):
            velocity[rows, :-1] = self.field.bind(self.contexts[k])(t[rows], x[rows, :-1])
        return velocity


class FamilyPath(ProbabilityPath):
    """The paths of many posteriors."""

    def __init__(self, paths: list[PosteriorTargets]) -> None:
        self.paths = paths

    def loss_weight(self, t: Tensor) -> Tensor:
        return self.paths[0].loss_weight(t)

    def point(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        x_t, target = x1.clone(), torch.zeros_like(x1)
        for k, rows in members(x1):
            parts = self.paths[k].point(x0[rows, :-1], x1[rows, :-1], t[rows], generator)
            x_t[rows, :-1], target[rows, :-1] = parts
        return x_t, target


def members(x: Tensor) -> list[tuple[int, Tensor]]:
    """Return the posteriors that there are points of, and which these are."""
    return [(int(k), (x[:, -1] == k).nonzero()[:, 0]) for k in x[:, -1].unique()]


def vjp(model: bf.BayesianModel) -> bf.Flow:
    """Return the flow without a network."""
    return bf.GaussNewtonFlow(
        model, GaussNewton(NEWTON[-1]), solver=Solver(steps=SOLVER_STEPS)
    )


def fit(tasks: list[Task], steps: int) -> bf.Flow:
    """Train one field on draws of many posteriors."""
    generator = torch.Generator().manual_seed(0)
    models = [task.model() for task in tasks]
    contexts = [WhitenedPosterior(model) for model in models]
    x1 = torch.stack(
        [
            context.source.to_normal(chains_of(t, HIDDEN, False).flat)
            for t, context in zip(tasks, contexts, strict=True)
        ]
    )
    group = contexts[0].source.symmetries(models[0])
    paths = [
        PosteriorTargets(AffinePath(), c, group, own, generator, newton=True)
        for c, own in zip(contexts, x1, strict=True)
    ]

    def pairs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(
            len(tasks), (TASKS_A_STEP,), generator=generator
        ).repeat_interleave(n // TASKS_A_STEP)
        rows = torch.randint(x1.shape[1], (len(chosen),), generator=generator)
        x0 = torch.randn(len(chosen), x1.shape[2], generator=generator)
        ends = Independent().pair(x0, x1[chosen, rows], models[0].spec, group, generator)
        x0, own = (torch.cat([end, chosen[:, None].to(end)], 1) for end in ends)
        return x0, own

    family = Family(field(), contexts)
    _, info = train(
        family,
        pairs,
        path=FamilyPath(paths),
        seed=generator,
        training=bf.Training(steps=steps, batch_size=BATCH),
    )
    return bf.Flow.of(family.field, models[0], info=info)


def field() -> InformedVelocity:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return InformedVelocity(
            network(HIDDEN, GRID, GRID[:, 0], 1.0).spec,
            [GaussNewton(steps) for steps in NEWTON],
            WIDTH,
            DEPTH,
            architecture="signed",
        )


def own_flow(task: Task, steps: int) -> bf.Flow:
    """Train a field on this task alone, with as many steps and pairs as the one for all had."""
    model, draws = task.model(), chains_of(task, HIDDEN, False)
    matching, training = (
        Matching(targets="posterior"),
        bf.Training(steps=steps, batch_size=BATCH),
    )
    path = OUT / f"flow-of-{task.name}-{steps}.npz"

    def make() -> bf.Flow:
        return bf.fit_flow(
            model, draws, velocity=field(), matching=matching, training=training, seed=0
        )

    return remembered_flow(path, model, make)


def tuned_flow(task: Task, flow: bf.Flow, steps: int) -> bf.Flow:
    """Train the field for all on this task, with its own draws there, refined: no chain is
    needed.
    """
    model, start = task.model(), flow.bind(task.model())
    training = bf.Training(
        steps=steps, batch_size=BATCH, learning_rate=1e-3, optimiser="adamw"
    )

    def make() -> bf.Flow:
        moved = bf.refine(model, start.sample(2048, 4), 16, seed=5)
        return bf.fit_flow(model, moved, velocity=start.velocity, training=training, seed=0)

    return remembered_flow(
        OUT / f"flow-tuned-{task.name}-{flow.info['steps']}-{steps}.npz", model, make
    )


def remembered_flow(
    path: Path, model: bf.BayesianModel, make: Callable[[], bf.Flow]
) -> bf.Flow:
    if not path.is_file():
        make().save(path)
    return replace(bf.Flow.load(path, model), solver=Solver(steps=SOLVER_STEPS))


# ---------------------------------------- what draws are worth


def judged(
    task: Task, model: bf.BayesianModel, theta: Tensor, truth: Tensor
) -> dict[str, Any]:
    """Compare draws with those of chains."""
    ours, theirs = (model.outputs(each, GRID)[..., 0].double() for each in (theta, truth))

    def gap(score: Callable[[Tensor], float]) -> float:
        return score(theta) - score(truth)

    return {
        "rms": float(
            ((ours.mean(0) - theirs.mean(0)) / theirs.std(0)).square().mean().sqrt()
        ),
        "ratio": float((ours.std(0) / theirs.std(0)).log().mean().exp()),
        "log lik.": gap(lambda each: float(model.log_likelihood(each).mean())),
        "LPPD": gap(
            lambda each: bf.metrics.lppd(bf.predict(model, each, task.x_test), task.y_test)
        ),
        "band": ours.quantile(torch.tensor([0.05, 0.5, 0.95]).double(), 0).tolist(),
    }


def cell(task: Task, hidden: int, starts: Starts, draws: int) -> dict[str, dict[str, Any]]:
    """Judge draws of every start, and what refinement makes of them."""
    model = task.model(hidden)
    chains = chains_of(task, hidden, True)
    truth, others = (part.flatten(0, 1) for part in chains.theta.split(CHAINS // 2))
    some = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:draws]
    rows = {
        "other chains": judged(task, model, others[some], truth)
        | {"CPU s": chains.info["cpu_seconds"]}
    }
    for name, draw in starts.items():
        began = time.process_time()
        theta = draw(draws)
        spent = time.process_time() - began
        moved = bf.refine(
            model, theta, REFINE[0], n_leapfrog=REFINE[1], seed=2, progress=False
        )
        rows[name] = judged(task, model, theta, truth) | {"CPU s": spent}
        spent += moved.info["cpu_seconds"]
        rows[f"{name}, refined"] = judged(task, model, moved.flat, truth) | {"CPU s": spent}
    return rows


def weighed(
    model: bf.BayesianModel, flow: bf.Flow, draws: int, steps: int, particles: int
) -> dict[str, Any]:
    """Weigh draws by their exact density, and compare the evidence with that of tempered SMC."""
    began = time.process_time()
    theta, log_q = flow.sample_with_log_prob(draws, 3, solver=Solver("rk4", steps))
    log_weights = model.log_joint(theta).double() - log_q
    found = {
        "k-hat": psis(log_weights)[1],
        "ESS": kish_ess(log_weights) / draws,
        "sd": float(log_weights.std()),
    }
    found |= {"evidence": log_mean(log_weights), "CPU s": time.process_time() - began}
    found["half"] = flow.solver_error(12, 3, solver=Solver("rk4", steps // 2))["log_prob"]
    return found | {
        "SMC": bf.sample(
            model, bf.SMC(particles), chains=4, seed=0, progress=False
        ).log_evidence
    }


def summary(cells: list[dict[str, dict[str, Any]]]) -> str:
    """Lay out mean and standard deviation over tasks."""
    lines = []
    for name in cells[0]:
        columns = [
            torch.tensor([each[name][figure] for each in cells]).double()
            for figure in FIGURES
        ]
        shown = [
            f"{float(c.mean()):.3g} ± {float(c.std()):.2g}"
            if len(c) > 1
            else f"{float(c):.3g}"
            for c in columns
        ]
        lines.append((name, *shown))
    return table(("draws", *FIGURES), lines)


def picture(cells: list[dict[str, dict[str, Any]]], tasks: list[Task]) -> Figure:
    """Draw where 90% of the functions are: those of chains filled, those of the flow between
    lines.
    """
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    for ax, rows, task in zip(figure.subplots(1, len(tasks)), cells, tasks, strict=True):
        x = GRID[:, 0].tolist()
        low, middle, high = rows["other chains"]["band"]
        ax.fill_between(
            x,
            low,
            high,
            color=style.GREY,
            alpha=0.35,
            linewidth=0,
            label="90% of the functions, HMC",
        )
        ax.plot(x, middle, color=style.GREY, linewidth=1.5)
        for dashes, line in zip(("--", "-", "--"), rows[OURS]["band"], strict=True):
            label = (
                "the same and the median, a flow that was not trained on these data"
                if dashes == "-"
                else None
            )
            ax.plot(x, line, dashes, color=style.PALETTE[1], linewidth=1.1, label=label)
        ax.plot(task.x[:, 0], task.y, ".", color=style.INK, markersize=4)
        ax.set_title(f"{len(task.x)} rows, noise {task.noise:.2f}", fontsize=style.SMALL)
        style.quiet(ax)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        *handles, loc="outside lower center", ncols=2, frameon=False, fontsize=style.SMALL
    )
    return figure


def experiment(sizes: Sizes, name: str) -> None:
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    tasks = [random_task(seed) for seed in range(sizes.tasks)]
    unseen = [random_task(seed) for seed in range(1000, 1000 + sizes.unseen)]
    flow = remembered_flow(
        OUT / f"flow-{name}-{sizes.steps}.npz",
        tasks[0].model(),
        lambda: fit(tasks, sizes.steps),
    )
    chains = sum(chains_of(task, HIDDEN, False).info["cpu_seconds"] for task in tasks)
    print(
        f"{len(tasks)} tasks: {chains:.0f} CPU s of HMC, {flow.info['cpu_seconds']:.0f} CPU s of "
        f"training, {flow.info['steps']} steps, {flow.info['parameters']} parameters",
        flush=True,
    )
    results: dict[str, Any] = {"training": flow.info | {"chains": chains}}

    def judge(
        given: list[Task], hidden: int, which: str, make: Callable[[Task], Starts]
    ) -> list[dict[str, Any]]:
        found = []
        for task in given:
            key = f"{name}, {sizes.steps} steps, {task.name}, {hidden}, {which}"
            run = partial(cell, task, hidden, make(task), sizes.draws)
            found.append(remembered(OUT / "cells.json", key, run))
        return found

    def starts(flows: dict[str, bf.Flow]) -> Starts:
        return {start: partial(each.sample, seed=1) for start, each in flows.items()}

    def common(given: list[Task], hidden: int) -> list[dict[str, Any]]:
        def make(task: Task) -> Starts:
            model = task.model(hidden)
            prior: Starts = {"prior": partial(model.sample_prior, seed=1)}
            return prior | starts({PULL: vjp(model), OURS: flow.transfer(model)})

        return judge(given, hidden, "common", make)

    def special(task: Task) -> dict[str, bf.Flow]:
        short, tuned = own_flow(task, sizes.tuning), tuned_flow(task, flow, sizes.tuning)
        return {
            "own flow": own_flow(task, sizes.steps),
            f"own flow, {sizes.tuning} steps": short,
            TUNED: tuned,
        }

    def show(title: str, found: list[dict[str, dict[str, Any]]]) -> None:
        results[title] = found
        print(f"\n{title}\n\n{summary(found)}", flush=True)

    for hidden in sizes.widths:
        show(f"{len(unseen)} unseen tasks, {hidden} hidden units", common(unseen, hidden))
    for task in outsiders():
        show(f"outside: {task.name}", common([task], HIDDEN))
    few = [*unseen[: sizes.own], outsiders()[0]]
    alone = judge(few, HIDDEN, "own", lambda task: starts(special(task)))
    for task, both, own in zip(few, common(few, HIDDEN), alone, strict=True):
        show(f"fields of its own: {task.name}", [both | own])
    print("\nimportance sampling")
    for task in few:
        model = task.model()
        flows = {PULL: vjp(model), OURS: flow.bind(model)}
        for which, each in flows.items():
            run = partial(
                weighed, model, each, sizes.weighed, sizes.solver, sizes.particles
            )
            of = f"{task.name}, weights of {which}, {sizes.weighed}, {sizes.solver}"
            key = f"{name}, {sizes.steps} steps, {of}"
            found = results[f"weights, {task.name}, {which}"] = remembered(
                OUT / "cells.json", key, run
            )
            evidences = ", ".join(
                f"{what} {value:.2f} ± {error:.2f}"
                for what, (value, error) in [
                    ("log evidence", found["evidence"]),
                    ("SMC", found["SMC"]),
                ]
            )
            print(
                f"{task.name}, {which}: k-hat {found['k-hat']:.2f}, ESS {found['ESS']:.0%}, sd "
                f"{found['sd']:.2f}, {evidences}, log q by half the steps "
                f"{found['half']:.2f} apart",
                flush=True,
            )
    path = OUT.parent / f"one_flow_several_tasks-{name}"
    path.with_suffix(".json").write_text(json.dumps(results))
    picture(common(unseen[:3], HIDDEN), unseen[:3]).savefig(
        path.with_suffix(".png"), dpi=150
    )
    print(f"\nfigures: {path}.json, picture: {path}.png; {time.process_time():.0f} CPU s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full", action="store_true", help="48 tasks, 1,800 steps: twenty minutes"
    )
    full = parser.parse_args().full
    experiment(FULL if full else SMALL, "full" if full else "small")


if __name__ == "__main__":
    main()
