"""Effective draws of the network's outputs for a CPU second and for a gradient: bnnflow, numpyro's
NUTS, Pyro's NUTS.

The posterior is that of ``$BNNFLOW_DATA/reference/yacht_s01.npz``: 6-50-1 tanh, N(0, 1), noise 0.1,
d = 401. Counted is ArviZ's bulk ESS of the outputs at the 31 test points over all chains; the
reference says whether they are right. Every sampler starts as its own library does: bnnflow 300
Adam steps from the prior, in the price of its warm-up; numpyro uniform on (-2, 2), and in one more
row from bnnflow's start, at bnnflow's price. Pyro is too slow to find the posterior here: it starts
at a draw of the reference. Compiling is not counted. Run: ``python
tests/benchmarks/bench_efficiency.py [--quick] [--only NAME]``.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import rivals
import torch

import bnnflow as bf
from bnnflow.inference.start import WARM_START, starting_points

REFERENCE = "reference/yacht_s01.npz"
# Chains, transitions of warm-up, draws.
OWN = {"HMC": (16, 300, 200), "MCLMC": (16, 500, 4000), "AdjustedMCLMC": (16, 300, 200)}
NUMPYRO = (4, 300, 250)
PYRO = (1, 60, 80)
QUICK = 10  # divides warm-up and draws
SEED = 0
SHOWN = ("step_size", "n_leapfrog", "L", "trajectory_length", "divergences")
ESS, ERRORS = ("median", "least"), ("rms sd", "sd ratio", "LPPD", "R-hat")


class Run(NamedTuple):
    """What one sampler did; gradients are those of all chains together."""

    theta: np.ndarray  # (chain, draw, dim)
    warmup_cpu: float
    draws_cpu: float
    warmup_gradients: float
    draws_gradients: float


def own(method: Any, model: bf.BayesianModel, chains: int, warmup: int, draws: int) -> Run:
    """Run a method of bnnflow.

    Its CPU time is split by gradients into warm-up and draws, which cost the same.
    """
    model.log_joint_and_grad(model.sample_prior(2, 0))  # compiles
    # imports
    bf.sample(model, method, chains=2, warmup=2, draws=1, seed=SEED, progress=False)
    began = time.process_time()
    result = bf.sample(
        model, method, chains=chains, warmup=warmup, draws=draws, seed=SEED, progress=False
    )
    cost = time.process_time() - began
    print(
        f"  {method}: {', '.join(f'{k} {v}' for k, v in result.info.items() if k in SHOWN)}"
    )
    everything = chains * float(result.info["gradients_per_chain"])
    drawn = float(result.stats["n_steps"].double().sum())
    share = drawn / everything
    return Run(
        result.theta.numpy(), cost * (1 - share), cost * share, everything - drawn, drawn
    )


def numpyro_nuts(
    model: bf.BayesianModel,
    chains: int,
    warmup: int,
    draws: int,
    *,
    vectorised: bool = False,
    accelerated_ascent: bool = False,
) -> Run:
    """Run numpyro's NUTS with its defaults, its transitions compiled into one loop as its own
    ``MCMC`` does.
    """
    import jax
    import jax.numpy as jnp
    from numpyro.infer import NUTS

    x, y = (
        jnp.asarray(model.x.mT.contiguous().numpy()),
        jnp.asarray(model.y.flatten().numpy()),
    )
    generator, start_cpu = torch.Generator().manual_seed(SEED), 0.0
    theta = 4 * torch.rand(chains, model.dim, generator=generator) - 2
    if accelerated_ascent:
        began = time.process_time()
        theta = starting_points(model, chains, None, generator, False)
        start_cpu = time.process_time() - began
    start = jnp.asarray(theta.numpy())
    keys = jax.random.split(jax.random.PRNGKey(SEED + 1), chains)
    # one chain's state fixes shapes; all chains share the compiled loop
    group = slice(None) if vectorised else 0
    kernel = NUTS(
        potential_fn=lambda p: (
            -(rivals.jax_log_likelihood(p, (x, y)) + rivals.jax_log_prior(p))
        )
    )

    def loop(length: int) -> Callable[[Any], tuple[Any, Any]]:
        def one(state: Any, _: None) -> tuple[Any, Any]:
            state = kernel.sample(state, (), {})
            return state, (state.z, state.num_steps)

        return lambda state: jax.lax.scan(one, state, None, length=length)

    initial = kernel.init(keys[group], warmup, init_params=rivals.split(start[group]))
    phases = [jax.jit(loop(length)).lower(initial).compile() for length in (warmup, draws)]
    if vectorised:
        states = [initial]
    else:
        states = [
            kernel.init(keys[i], warmup, init_params=rivals.split(start[i]))
            for i in range(chains)
        ]

    cost, collected = [], []
    for phase in phases:
        began = time.process_time()
        results = [jax.block_until_ready(phase(state)) for state in states]
        cost.append(time.process_time() - began)
        states = [state for state, _ in results]
        collected.append([found for _, found in results])
    steps = [
        sum(float(np.asarray(n, dtype=np.float64).sum()) for _, n in found)
        for found in collected
    ]
    # (draw, dim) each, or one (draw, chain, dim)
    thetas = [rivals.join(z) for z, _ in collected[1]]
    kept = thetas[0].swapaxes(0, 1) if vectorised else np.stack(thetas)
    return Run(
        kept,
        start_cpu + cost[0],
        cost[1],
        steps[0] + accelerated_ascent * WARM_START * chains,
        steps[1],
    )


def pyro_nuts(
    model: bf.BayesianModel, chains: int, warmup: int, draws: int, start: torch.Tensor
) -> Run:
    """Run one chain of Pyro's NUTS with its defaults on a plain torch potential, from ``start``
    ``(dim,)``.
    """
    from pyro.infer import NUTS

    assert chains == 1
    x, y = model.x.mT.contiguous(), model.y.flatten()
    count = 0

    def potential(params: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal count
        count += 1
        return -rivals.torch_log_joint(
            (params["0"], params["1"], params["2"], params["3"]), x, y
        )

    torch.manual_seed(SEED)
    kernel = NUTS(potential_fn=potential)
    params = {str(i): part.clone() for i, part in enumerate(rivals.split(start))}
    kernel.initial_params = params
    began = time.process_time()
    kernel.setup(warmup)
    cost, counts, kept = [], [], []
    for transitions in (warmup, draws):
        for _ in range(transitions):
            params = kernel.sample(params)
            kept.append(torch.cat([params[name].flatten() for name in sorted(params)]))
        cost.append(time.process_time() - began)
        counts.append(count)
    theta = torch.stack(kept[warmup:]).unsqueeze(0).numpy()
    return Run(theta, cost[0], cost[1] - cost[0], counts[0], counts[1] - counts[0])


# ---------------------------------------- what it was worth


class Worth(NamedTuple):
    """Median ESS over the test points, for what it cost."""

    all_cpu: float  # a second
    draws_cpu: float  # a second after warm-up
    per_gradient: float  # 1,000 gradients after warm-up
    us: float  # CPU microseconds a gradient


def judge(name: str, run: Run, model: bf.BayesianModel, reference: Any) -> Worth:
    """Print one row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz

    x, y = torch.as_tensor(reference["Xte"]).float(), reference["yte"]
    theta = torch.as_tensor(np.ascontiguousarray(run.theta)).float()
    # (draws, row)
    outputs = (
        torch.cat([model.outputs(chain, x) for chain in theta]).squeeze(-1).double().numpy()
    )
    data = arviz.convert_to_dataset({"f": outputs.reshape(*theta.shape[:2], -1)})
    ess = arviz.ess(data, method="bulk")["f"].to_numpy()
    rhat = float(arviz.rhat(data)["f"].max()) if len(theta) > 1 else np.nan
    rms = np.sqrt(
        (((outputs.mean(0) - reference["f_mean"]) / reference["f_sd"]) ** 2).mean()
    )
    ratio = np.exp(np.log(outputs.std(0) / reference["f_sd"]).mean())
    density = -0.5 * ((y - outputs) / rivals.NOISE) ** 2 - np.log(
        rivals.NOISE * np.sqrt(2 * np.pi)
    )
    lppd = (np.logaddexp.reduce(density, axis=0) - np.log(len(outputs))).mean()
    cpu, gradients = (
        run.warmup_cpu + run.draws_cpu,
        run.warmup_gradients + run.draws_gradients,
    )
    median, least = float(np.median(ess)), float(ess.min())
    worth = Worth(
        median / cpu,
        median / run.draws_cpu,
        median / run.draws_gradients * 1e3,
        cpu / gradients * 1e6,
    )
    print(
        f"{name:30s} {run.warmup_cpu:8.1f} {run.draws_cpu:8.1f} {gradients / 1e6:8.2f} "
        f"{median:8.0f} {least:8.0f} {worth.all_cpu:8.2f} {least / cpu:8.2f} "
        f"{worth.draws_cpu:8.2f} {least / run.draws_cpu:8.2f} {worth.per_gradient:8.2f} "
        f"{worth.us:8.1f} {rms:8.3f} {ratio:8.3f} {lppd:8.3f} {rhat:8.3f}",
        flush=True,
    )
    return worth


def header() -> str:
    names = (
        "sampler",
        "warm-up",
        "draws",
        "grads",
        *ESS,
        *ESS,
        *ESS,
        "grads",
        "a grad",
        *ERRORS,
    )
    first = (
        f"{'':30s} {'CPU seconds':^17s} {'million':>8s} {'ESS':^17s} {'ESS / CPU second':^17s} "
        f"{'after warm-up':^17s}"
    )
    return f"{first} {'/ 1,000':>8s} {'CPU us':>8s}\n{names[0]:30s} " + " ".join(
        f"{name:>8s}" for name in names[1:]
    )


def compare(worth: dict[str, Worth]) -> None:
    """Print what is asked of the ratios; the best of bnnflow and the best of numpyro count."""
    ours, nuts, pyro = (
        {k: w for k, w in worth.items() if k.startswith(p)}
        for p in ("bnnflow", "numpyro", "Pyro")
    )
    for field in ("all_cpu", "draws_cpu") if ours else ():
        best = max(ours, key=lambda name: getattr(ours[name], field))
        mine, label = (
            getattr(ours[best], field),
            f"{best}, ESS a CPU second{', no warm-up' * (field == 'draws_cpu')}",
        )
        if nuts:
            rivals.asked(
                f"{label}, against numpyro",
                5,
                mine / max(getattr(w, field) for w in nuts.values()),
            )
        for w in pyro.values():
            rivals.asked(f"{label}, against Pyro", 50, mine / getattr(w, field))
            if nuts and field == "draws_cpu":
                # NUTS is NUTS: numpyro's many draws say better than Pyro's few what a gradient is
                # worth.
                estimate = max(n.per_gradient for n in nuts.values()) * 1e3 / w.us
                rivals.asked(
                    f"{label}, against Pyro's cost a gradient with numpyro's ESS",
                    50,
                    mine / estimate,
                )
    for name, w in ours.items():
        if name != "bnnflow HMC" and "bnnflow HMC" in ours:
            rivals.asked(
                f"{name}, ESS a gradient, against HMC",
                2,
                w.per_gradient / ours["bnnflow HMC"].per_gradient,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of everything: does it run?"
    )
    parser.add_argument(
        "--only", default="", help="only samplers whose name has this in it"
    )
    arguments = parser.parse_args()
    rivals.require("jax", "numpyro", files=(REFERENCE,))
    reference = np.load(rivals.DATA / REFERENCE)
    model = rivals.bnnflow_model(reference["Xtr"], reference["ytr"])

    def size(chains: int, warmup: int, draws: int) -> tuple[int, int, int]:
        return (
            (chains, warmup // QUICK, draws // QUICK)
            if arguments.quick
            else (chains, warmup, draws)
        )

    # The reference stores weight matrices (in, out); PyTorch's are (out, in).
    stored = torch.as_tensor(reference["weights"][0])
    first = stored[: 6 * rivals.HIDDEN].reshape(6, rivals.HIDDEN).T.reshape(-1)
    exact = torch.cat([first, stored[6 * rivals.HIDDEN :]])
    assert abs(float(model.log_joint(exact)) - reference["log_joint"][0]) < 0.1, (
        "the layout of the reference"
    )

    runs: dict[str, Callable[[], Run]] = {}
    for name, settings in OWN.items():
        if hasattr(bf, name):
            method = getattr(bf, name)()
            runs[f"bnnflow {name}"] = lambda method=method, settings=settings: own(
                method, model, *size(*settings)
            )
        else:
            print(f"bf.{name} is not there")
    runs["numpyro NUTS, chains in turn"] = lambda: numpyro_nuts(model, *size(*NUMPYRO))
    runs["numpyro NUTS, bnnflow's start"] = lambda: numpyro_nuts(
        model, *size(*NUMPYRO), accelerated_ascent=True
    )
    runs["numpyro NUTS, vectorised"] = lambda: numpyro_nuts(
        model, *size(*NUMPYRO), vectorised=True
    )
    runs["Pyro NUTS, from the reference"] = lambda: pyro_nuts(
        model, *size(*PYRO), start=exact
    )

    print(
        f"{rivals.machine()}; yacht_s01, d = {model.dim}; reference LPPD "
        f"{reference['lppd_pointwise_std'].mean():.3f}"
    )
    print(header())
    worth = {
        name: judge(name, run(), model, reference)
        for name, run in runs.items()
        if arguments.only in name
    }
    compare(worth)


if __name__ == "__main__":
    main()
