"""One bank of draws, and one amortised flow, for the tasks of a learned prior, beside SMC.

The prior is that of ``bench_learned_prior.py`` on sine waves, a sharpened map of three evaluations;
the flow begins with the parameters of ``bench_amortised.py`` and is trained by `bf.fit_amortised`
on tasks drawn from the learned prior, of 3 to 12 rows with noise .1: with one Gauss-Newton step
first, then with two. Both benchmarks are run first where they have not been, which takes hours.

Looked at are tasks of the family, at their first 3 and 5 rows. Posteriors are known from 2^19 draws
of the prior, weighted by their likelihood; tasks with fewer than 150 effective ones are left out.
"rms" is the error of the mean function in posterior standard deviations and "ratio" the geometric
mean of the ratios of standard deviations, both at 41 points of [-2, 2]; 200 draws that are exact
have an rms of about .07. Steps are of the midpoint rule, two evaluations each; "refined" is
`bf.refine`, eight transitions of four leapfrog steps, after five of them; "untrained" the same
field before training; "bank" is `bf.update` from a `bf.PriorBank` of 2^17 draws that are none of
the others. "flagged" is the share of tasks of which `bf.diagnose` says "do not trust", of those
with an rms above .3 and of the others. One thread.
Run: ``python tests/benchmarks/bench_amortised_prior.py [--tasks 32]``: an hour of training and half
an hour of tasks; the flow stays in out/bench_amortised_prior. With ``--bank 100`` the bank alone,
on so many tasks, by route and without diagnoses, at 8 rows too: twenty minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import bench_amortised
import bench_learned_prior
import torch
from bench_amortised import Found, show, timed
from bench_learned_prior import BLOCK, FAMILIES, GRID, Tasks, kept, latent, log_likelihoods
from torch import Tensor

import bnnflow as bf
from bnnflow.transport import AmortisedVelocity, Flow, FlowMap, Solver

OUT = Path("out/bench_amortised_prior")
FAMILY = FAMILIES["waves"]
ROWS = (3, 12)
STAGES = ((1, 1500), (2, 2500))  # Gauss-Newton steps and steps of training
BATCH, RATE = 64, 2e-3
AT = torch.arange(0, len(GRID), 6)
BLOCKS, EFFECTIVE = 32, 150
DRAWS = 200
BANK = 2**17
PARTICLES = bf.SMC(particles=DRAWS, moves=2, max_leapfrog=6, ess=0.6)


def model_of(tasks: Tasks, prior: FlowMap) -> bf.BayesianModel:
    """Return the posterior of one task."""
    return tasks.models(FAMILY.noise)[0].transported(prior)


def with_steps(
    velocity: AmortisedVelocity, spec: bf.WeightSpec, newton: int
) -> AmortisedVelocity:
    """Return a field of the same parameters with another number of Gauss-Newton steps."""
    other = AmortisedVelocity(spec, newton=newton)
    other.load_state_dict(velocity.state_dict())
    return other


def trained(prior: FlowMap) -> Flow:
    """Train the flow, or read it."""
    every = Tasks(torch.arange(len(GRID))[None], GRID.T)  # targets are not looked at
    blank = model_of(every, prior)
    flow: Flow | None = None
    for stage, (newton, steps) in enumerate(STAGES):
        file = OUT / f"flow-{stage}.npz"
        if not file.exists():
            before = (bench_amortised.trained(16000) if flow is None else flow).velocity
            assert isinstance(before, AmortisedVelocity)
            flow = bf.fit_amortised(
                blank,
                rows=ROWS,
                velocity=with_steps(before, blank.spec, newton),
                training=bf.Training(steps=steps, batch_size=BATCH, learning_rate=RATE),
                checkpoint=bf.Checkpoint(file.with_suffix(".training.npz"), resume=True),
            )
            flow.save(file)
            print(f"trained in {flow.info['cpu_seconds']:.0f} CPU s", flush=True)
        flow = Flow.load(file, blank)
    assert flow is not None
    return flow


def bank_of(prior: FlowMap, model: bf.BayesianModel) -> Tensor:
    """Return functions of draws of the prior on the grid ``(atoms, grid)``."""
    with torch.no_grad():
        blocks = [
            model.outputs(latent(0, block, prior.dim), GRID)[..., 0].half()
            for block in range(BLOCKS)
        ]
    return torch.cat(blocks)


def known(bank: Tensor, task: Tasks) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation of the posterior, if enough atoms are effective."""
    parts = [
        log_likelihoods(part.float(), task, FAMILY.noise)[:, 0]
        for part in bank.split(BLOCK)
    ]
    weights = torch.cat(parts).double().softmax(0)
    if 1 / weights.square().sum() < EFFECTIVE:
        return None
    seen = weights > 1e-7 * weights.max()
    f, weights = bank[seen][:, AT].double(), weights[seen] / weights[seen].sum()
    mean = weights @ f
    return mean, (weights @ (f - mean).square()).sqrt()


def apart(
    model: bf.BayesianModel, draws: bf.Draws, truth: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Return rms and ratio of standard deviations."""
    f = model.outputs(draws.flat, GRID[AT])[..., 0].double()
    even = torch.zeros(len(f)) if draws.log_weights is None else draws.log_weights
    weights = even.flatten().double().softmax(0)
    mean = weights @ f
    sd = (weights @ (f - mean).square()).sqrt()
    rms = ((mean - truth[0]) / truth[1]).square().mean().sqrt()
    return float(rms), float((sd / truth[1]).log().mean().exp())


def look(
    model: bf.BayesianModel,
    flow: Flow,
    own: bf.PriorBank,
    truth: tuple[Tensor, Tensor],
    seed: int,
) -> dict[str, Found]:
    """Compare all methods on one task."""
    found, quiet = {}, {"seed": seed, "progress": False}

    def keep(name: str, draws: bf.Draws, seconds: float) -> None:
        flagged = bf.diagnose(model, draws).verdict == "do not trust"
        found[name] = Found(*apart(model, draws, truth), flagged, seconds)

    fields = {"amortised": flow.velocity, "untrained": AmortisedVelocity(flow.spec, 8, 1)}
    for name, velocity in fields.items():
        for steps in (10, 5):
            own = Flow.of(velocity, model, solver=Solver("midpoint", steps))
            raw, seconds = timed(
                lambda own=own: bf.sample(model, own, draws=DRAWS, **quiet)
            )
            keep(f"{name}, {steps} steps", raw, seconds)
        refined, more = timed(
            lambda raw=raw: bf.refine(model, raw, 8, n_leapfrog=4, **quiet)
        )
        keep(f"{name}, refined", refined, seconds + more)
    keep("SMC", *timed(lambda: bf.sample(model, PARTICLES, **quiet)))
    keep("bank", *timed(lambda: bf.update(model, own, **quiet)))
    return found


def by_bank(prior: FlowMap, tasks: Tasks, own: bf.PriorBank, bank: Tensor) -> None:
    """Look at the bank alone."""
    for rows in (3, 5, 8):
        found: dict[str, list[tuple[float, ...]]] = {"weights": [], "tempering": []}
        for seed, (at, y) in enumerate(zip(*tasks.first(rows), strict=True)):
            task = Tasks(at[None], y[None])
            if (truth := known(bank, task)) is None:
                continue
            model = model_of(task, prior)
            draws, seconds = timed(
                lambda model=model, seed=seed: bf.update(
                    model, own, seed=seed, progress=False
                )
            )
            told = draws.info["gradients_per_draw"], draws.n_draws, seconds
            found[draws.info["route"]].append((*apart(model, draws, truth), *told))
        for route, values in (
            *found.items(),
            ("all", found["weights"] + found["tempering"]),
        ):
            if not values:
                continue
            each = torch.tensor(values, dtype=torch.float64)
            rms, (_, ratio, gradients, draws, seconds) = each[:, 0], each.mean(0)
            spread = each[:, 1].std(correction=0)
            print(
                f"{rows} rows, {route:9s} {len(each):3d} tasks  rms {rms.median():.3f} (mean "
                f"{rms.mean():.3f}, at most .15: {float((rms <= 0.15).double().mean()):.2f}, above "
                f".3: {float((rms > 0.3).double().mean()):.2f})  ratio {ratio:.3f} ± {spread:.3f}  "
                f"{gradients:.0f} gradients a draw, {draws:.0f} draws, "
                f"{seconds:.2f} CPU s",
                flush=True,
            )


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--tasks", type=int, default=32, help="unseen ones")
    parser.add_argument(
        "--bank", type=int, default=0, help="unseen ones for the bank alone"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    for folder in (OUT, bench_amortised.OUT, bench_learned_prior.OUT):
        folder.mkdir(parents=True, exist_ok=True)
    prior = kept(
        "waves-0-128-sharp3-1500",
        lambda: bench_learned_prior.learned("waves", 0, 128, 3, 1500).flow,
    )
    tasks = FAMILY.unseen(0, given.bank or given.tasks)
    any_task = model_of(tasks.first(3), prior)
    bank = bank_of(prior, any_task)
    own, seconds = timed(lambda: bf.PriorBank.of(any_task, BANK, seed=1, progress=False))
    print(f"the bank: {seconds:.0f} CPU s", flush=True)
    if given.bank:
        by_bank(prior, tasks, own, bank)
        return
    flow = trained(prior)
    for rows in (3, 5):
        found = []
        for seed, (at, y) in enumerate(zip(*tasks.first(rows), strict=True)):
            task = Tasks(at[None], y[None])
            if (truth := known(bank, task)) is not None:
                found.append(look(model_of(task, prior), flow, own, truth, seed))
        show(f"{rows} rows", found)


if __name__ == "__main__":
    main()
