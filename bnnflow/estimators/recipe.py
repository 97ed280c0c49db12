"""The recipe behind ``method="auto"``: from a model to draws, without a setting.

1. *Warm start.* Networks are trained. On a small table a tenth of the rows is held out, and each
   network is kept as it was when these liked it best; on a large one all rows are seen, in
   mini-batches, and the rate falls to zero: climbing is what chains take longest for.
2. *Chains.* From each of them `MCLMC` runs on all rows, and once more where the log joint density
   still rises, the longer the cheaper a gradient is; twice as long where it does not, if that is
   cheap, for weights that the data say little of. A stage whose energy errors are far larger than
   was asked is run again. `SGHMC` runs on mini-batches, where a full gradient is too expensive.
3. *More chains, not longer ones.* Chains of a network rarely meet, so what they disagree on is
   averaged over more of them: rounds of eight follow one another until the Monte-Carlo error of
   the predictions is small beside what they say of their own uncertainty.

What was tried, and what it was worth, stands in docs/lab-notebook.md.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnnflow.draws import Draws
from bnnflow.inference import MCLMC, SGHMC, sample
from bnnflow.inference.start import Climb, random_points
from bnnflow.model import BayesianModel
from bnnflow.optimisers import Adam
from bnnflow.options import Checkpoint
from bnnflow.parts import Parts
from bnnflow.predictive import predict
from bnnflow.progress import progress_bar
from bnnflow.seeding import as_generator
from bnnflow.stopwatch import Stopwatch
from bnnflow.verdicts import ENERGY_VARIANCE
from bnnflow.warn import warn

__all__ = ["automatic", "warm_start"]

CHAINS = 8  # of a round
ROUNDS = 3  # at most
LARGE = 4096  # rows of a table beyond which it counts as large
WARM_UP, DRAWS = 200, 200  # transitions of a chain, of ten steps each
ARRIVED = 0.25  # times as many in a large table, where training has done what chains would
LONGER = (
    6  # times as many, at most, where chains have not arrived after these: as many as there
)
SETTLING = 2  # times as many where they have arrived, if that is cheap
CHEAP = 1_000_000  # are rows of data times weights in this number, and no fewer than once
# of the log joint between the halves of a stage, in standard deviations of a posterior of as many
# dimensions, below which chains have arrived
_RISE = 0.2
SMALL = 0.2  # Monte-Carlo error of the predictions, in standard deviations of these
# rows of data times weights whose full gradients are affordable
AFFORDABLE = 100_000_000
_SEEN = 200  # rows at which predictions are compared

# The warm start
_RATE = 0.01  # of Adam
STEPS = 3000  # at most, where held-out rows stop it
_HELD_OUT = 0.1  # share of the rows that do
_LOOK = 25  # steps between looks at them
_PATIENCE = 12  # looks without a gain
_SMALL_BATCH = (
    256  # rows of its mini-batches; all rows where there are fewer than four times as many
)
EPOCHS = 1500  # of a large table,
TRAINING = 120e9  # but no more rows seen times weights, a network
_BATCH = 1024  # rows of its mini-batches


def automatic(
    model: BayesianModel,
    generator: torch.Generator,
    *,
    budget: float | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Draws:
    """Draw from the posterior; ``info`` says how many rounds it took and what error is left.

    Args:
        model: the posterior.
        generator: the source of randomness.
        budget: seconds after which no further round begins; None for as many as are needed.
        checkpoint: a folder in which chains are kept as they run; the same again goes on from
            there, bit for bit.
        progress: show bars at a terminal.
    """
    watch, parts, error = Stopwatch(), [], math.inf
    interrupted = False
    for i in range(ROUNDS):
        seeds = torch.randint(2**31, (4,), generator=generator).tolist()
        folder = None if checkpoint is None else Path(checkpoint) / f"round-{i + 1}"
        try:
            parts.append(_round(model, seeds, folder, progress))
        except KeyboardInterrupt:
            if not parts:
                raise
            interrupted = True
            warn(f"interrupted: keeping the {len(parts)} rounds of chains that are done")
            break
        error = monte_carlo_error(model, parts)
        interrupted = bool(parts[-1].info.get("interrupted"))
        if interrupted or error < SMALL or (budget is not None and watch.seconds > budget):
            break
    info = {
        "method": "auto",
        "settings": f"{parts[0].info['settings']}, {len(parts)} rounds of {CHAINS} chains",
        "rounds": len(parts),
        "monte_carlo_error": error,
        "interrupted": interrupted,
        "gradients": sum(part.info["gradients"] for part in parts),
        **watch.read(),
    }
    return _joined(parts, info)


def warm_start(
    model: BayesianModel, members: int, generator: torch.Generator, progress: bool = False
) -> Tensor:
    """Train networks from which chains can start, ``(members, dim)``."""
    train = _trained if len(model.x) > LARGE else _stopped_early
    return train(model, members, generator, progress)


def _trained(
    model: BayesianModel, members: int, generator: torch.Generator, progress: bool
) -> Tensor:
    """Train on mini-batches of all rows, at a rate that falls to zero along a cosine."""
    rows = len(model.x)
    climb = Climb(model)
    z = climb.coordinates(random_points(model, members, generator))
    adam = Adam(z)
    steps = max(1, round(min(EPOCHS * rows, TRAINING / model.dim) / _BATCH))
    with torch.no_grad(), progress_bar(steps, "warm start", progress, "step") as bar:
        for step in range(steps):
            chosen = torch.randint(
                rows, (members, _BATCH), generator=generator, device=model.device
            )
            _, grad = climb.log_joint_and_grad(z, chosen)
            rate = _RATE * (1 + math.cos(math.pi * step / steps)) / 2
            z = adam.step(z, grad / rows, rate)
            bar.update()
    return climb.theta(z)


def _stopped_early(
    model: BayesianModel, members: int, generator: torch.Generator, progress: bool
) -> Tensor:
    """Train on nine tenths of the rows until the others have not gained for long; return each
    network as these liked it best.
    """
    n, device = len(model.x), model.device
    order = torch.randperm(n, generator=generator, device=device)
    unseen = max(1, round(_HELD_OUT * n))
    training, held_out = model.subset(order[unseen:]), model.subset(order[:unseen])
    rows = len(training.x)
    batch = _SMALL_BATCH if rows > 4 * _SMALL_BATCH else None
    climb = Climb(training)
    z = climb.coordinates(random_points(model, members, generator))
    adam, kept = Adam(z), z.clone()
    best = torch.full((members,), -math.inf, dtype=torch.float64, device=device)
    since = torch.zeros(members, device=device)
    with torch.no_grad(), progress_bar(STEPS, "warm start", progress, "step") as bar:
        for step in range(1, STEPS + 1):
            chosen = batch and torch.randint(
                rows, (members, batch), generator=generator, device=device
            )
            _, grad = climb.log_joint_and_grad(z, chosen)
            z = adam.step(z, grad / rows, _RATE)
            bar.update()
            if step % _LOOK:
                continue
            value = held_out.log_likelihood(climb.theta(z)).nan_to_num(nan=-math.inf)
            better = value > best
            best = torch.where(better, value, best)
            kept = torch.where(better[:, None], z, kept)
            since = torch.where(better, 0, since + 1)
            if bool((since >= _PATIENCE).all()):
                break
    return climb.theta(kept)


def monte_carlo_error(model: BayesianModel, parts: list[Draws]) -> float:
    """Return the standard error of the predictive means over chains, root mean square over rows and
    targets, in standard deviations of the predictions.

    For classes that of their probabilities, in ten percentage points.
    """
    rows = torch.linspace(0, len(model.x) - 1, min(len(model.x), _SEEN)).round().long()
    x = model.x[rows.to(model.device)]
    means, spread = [], []
    for part in parts:
        for chain in part.theta:
            prediction = predict(model, chain[:: max(1, len(chain) // 50)], x)
            means.append(prediction.mean)
            spread.append(prediction.sd)
    between = torch.stack(means).var(0) / len(means)
    if model.likelihood.kind == "classification":
        return float(between.mean().sqrt()) / 0.1
    whole = torch.stack(spread).square().mean(0) + torch.stack(means).var(0)
    return float((between / whole).mean().sqrt())


def _round(
    model: BayesianModel, seeds: list[int], folder: Path | None, progress: bool
) -> Draws:
    """Train networks and run a chain from each: a short one, and a long one from its end."""
    first, second, third, fourth = seeds
    start = _started(model, first, folder, progress)
    length = ARRIVED if len(model.x) > LARGE else 1
    draws = _stage(model, start, length, second, folder and folder / "short", progress)
    affordable = CHEAP / (len(model.x) * model.dim)
    early, late = draws.log_joint.mean(0).chunk(2)
    if float(late.mean() - early.mean()) >= _RISE * math.sqrt(model.dim / 2):
        length = min(max(length, affordable), LONGER)
    elif affordable >= SETTLING:
        length = SETTLING
    elif not _biased(draws):
        return draws
    for name, seed in (("long", third), ("again", fourth)):
        if draws.info.get("interrupted"):
            break
        end = draws.theta[:, -1]
        draws = _stage(model, end, length, seed, folder and folder / name, progress)
        if not _biased(draws):
            break
    return draws


def _started(
    model: BayesianModel, seed: int, folder: Path | None, progress: bool
) -> Tensor:
    """Return trained networks, kept in the folder: on a large table they take minutes."""
    run = {"seed": seed, "model": model.fingerprint()}
    with Parts(folder and Checkpoint(folder / "start", resume=True), "start", run) as parts:
        kept = parts.read(0)
        if kept is not None:
            return torch.from_numpy(kept["theta"]).to(model.device)
        theta = warm_start(model, CHAINS, as_generator(seed, model.device), progress)
        parts.write(0, {"theta": theta.cpu().numpy()})
    return theta


def _biased(draws: Draws) -> bool:
    """Say whether energy errors are far larger than was asked; those of `MCLMC` alone are known."""
    asked, found = draws.info.get("energy_variance"), draws.stats.get("energy_variance")
    if asked is None or found is None:
        return False
    return not float(found.double().mean()) <= ENERGY_VARIANCE * asked


def _stage(
    model: BayesianModel,
    start: Tensor,
    length: float,
    seed: int,
    folder: Path | None,
    progress: bool,
) -> Draws:
    full = len(model.x) * model.dim <= AFFORDABLE
    return sample(
        model,
        MCLMC() if full else SGHMC(batch_size=min(_BATCH, len(model.x))),
        chains=len(start),
        warmup=round(WARM_UP * length),
        draws=round(DRAWS * length),
        init=start,
        seed=seed,
        checkpoint=folder and Checkpoint(folder, resume=True),
        progress=progress,
    )


def _joined(parts: list[Draws], info: dict[str, Any]) -> Draws:
    """Return the draws of all chains together."""
    shortest = min(part.n_draws for part in parts)
    first = parts[0]

    def joined(of: Any) -> Tensor:
        return torch.cat([of(part)[:, -shortest:] for part in parts])

    stats = {name: joined(lambda part, name=name: part.stats[name]) for name in first.stats}
    info = first.info | info
    info["gradients_per_chain"] = round(info["gradients"] / (len(parts) * first.n_chains))
    return replace(
        first,
        theta=joined(lambda part: part.theta),
        log_joint=joined(lambda part: part.log_joint),
        stats=stats,
        info=info,
    )
