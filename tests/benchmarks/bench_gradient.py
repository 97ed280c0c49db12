"""CPU microseconds a gradient and chain inside Hamiltonian Monte Carlo and MCLMC: bnnflow,
blackjax, numpyro, Pyro, vmap(grad).

Every rival makes whole transitions of the same 32 leapfrog steps, or 16 steps of MCLMC with two
gradients each, on the same posterior, so that random numbers and acceptance are in the price; only
"gradient alone" is the bare density. "Steps by torch" are the readable form of bnnflow's own, with
the compiled gradient. Compiling is not counted. Run: ``python tests/benchmarks/bench_gradient.py
[--quick]``.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import rivals
import torch

import bnnflow as bf
from bnnflow.dynamics import Target
from bnnflow.inference.mcmc.hmc import hmc
from bnnflow.inference.mcmc.mclmc import mclmc
from bnnflow.types import Kernel, LogDensityAndGrad

Measure = Callable[[], float]

N_LEAPFROG, STEP_SIZE = 32, 2e-4
GRADIENTS = 4096  # over all chains, in one measurement
ROUNDS = 11
CHAINS = (16, 64)
DATA_SETS = ("yacht", "concrete")
ASKED = {
    "the better blackjax": ("blackjax HMC", 1 / 0.45),
    "the best of Pyro": ("Pyro", 20.0),
}
# at most this multiple of their price is MCLMC's
MCLMC_ASKED = {
    "bnnflow HMC": 1.15,
    "bnnflow MCLMC, steps by torch": 1 / 1.3,
    "blackjax MCLMC, vmap": 1.0,
}
L, MCLMC_STEP = 20.0, 0.1


def own(kernel: Kernel, theta: torch.Tensor, each: int, gradients: int) -> Measure:
    """Return a measurement of a kernel of bnnflow whose transitions take ``each`` gradients."""
    generator = torch.Generator().manual_seed(1)
    transitions = max(1, gradients // (len(theta) * each))
    state = kernel.init(theta, generator)

    @torch.no_grad()
    def work() -> None:
        nonlocal state
        for _ in range(transitions):
            state, _ = kernel.step(state, generator)

    return lambda: rivals.cpu(work) / (transitions * each * len(theta)) * 1e6


def own_hmc(target: LogDensityAndGrad, theta: torch.Tensor, gradients: int) -> Measure:
    """Return a measurement of bnnflow's HMC over any gradient."""
    ones = torch.ones(theta.shape[1])
    kernel = hmc(target, STEP_SIZE, N_LEAPFROG, ones, trajectory_jitter=1.0)
    return own(kernel, theta, N_LEAPFROG, gradients)


def own_mclmc(target: LogDensityAndGrad, theta: torch.Tensor) -> Measure:
    """Return a measurement of bnnflow's MCLMC, with a mass matrix for every chain."""
    kernel = mclmc(target, MCLMC_STEP, L, torch.ones_like(theta), N_LEAPFROG // 2)
    return own(kernel, theta, N_LEAPFROG, GRADIENTS)


def naive(
    model: bf.BayesianModel,
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """What a torch user writes first."""
    x, y = model.x.mT.contiguous(), model.y.flatten()
    both = torch.func.vmap(
        torch.func.grad_and_value(
            lambda theta: rivals.torch_log_joint(rivals.split(theta), x, y)
        )
    )

    def target(theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grad, value = both(theta)
        return value.double(), grad

    return target


def jax_hmc(
    library: str, model: bf.BayesianModel, theta: torch.Tensor, group: int
) -> Measure:
    """Return a measurement of blackjax or numpyro: a compiled scan, ``group`` chains vectorised,
    groups in turn.
    """
    import jax
    import jax.numpy as jnp

    x, y = (
        jnp.asarray(model.x.mT.contiguous().numpy()),
        jnp.asarray(model.y.flatten().numpy()),
    )
    mass = jnp.ones(model.dim)

    def log_joint(params: tuple[Any, ...]) -> Any:
        return rivals.jax_log_likelihood(params, (x, y)) + rivals.jax_log_prior(params)

    chains = len(theta)
    start = rivals.split(jnp.asarray(theta.numpy()))
    check = jax.vmap(jax.grad(log_joint))(start)
    torch.testing.assert_close(
        torch.tensor(rivals.join(check)),
        model.log_joint_and_grad(theta)[1],
        rtol=1e-3,
        atol=1.0,
    )
    transitions = max(1, GRADIENTS // (chains * N_LEAPFROG))
    keys = jax.random.split(jax.random.key(0), (chains, transitions))
    if library == "blackjax":
        import blackjax

        algorithm = blackjax.hmc(log_joint, STEP_SIZE, mass, N_LEAPFROG)
        states = jax.vmap(algorithm.init)(start)

        def step(state: Any, key: Any) -> tuple[Any, Any]:
            state, info = algorithm.step(key, state)
            return state, (info.acceptance_rate, info.num_integration_steps)
    else:
        from numpyro.infer.hmc import hmc as numpyro_hmc

        settings = {
            "step_size": STEP_SIZE,
            "adapt_step_size": False,
            "adapt_mass_matrix": False,
        }
        initial, sample = numpyro_hmc(potential_fn=lambda p: -log_joint(p), algo="HMC")
        states = jax.vmap(
            lambda params, key: initial(
                params, 0, num_steps=N_LEAPFROG, rng_key=key, **settings
            )
        )(start, keys[:, 0])

        def step(state: Any, key: Any) -> tuple[Any, Any]:
            state = sample(state)
            return state, (state.accept_prob, state.num_steps)

    def run(states: Any, keys: Any) -> Any:  # one group
        return jax.lax.scan(lambda s, k: jax.vmap(step)(s, k), states, keys.T)

    def grouped(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: leaf.reshape(chains // group, group, *leaf.shape[1:]), tree
        )

    everything = jax.jit(
        lambda s, k: jax.lax.map(lambda pair: run(*pair), (grouped(s), grouped(k)))
    )
    steps = everything(states, keys)[1][1]
    assert (steps == N_LEAPFROG).all(), f"{library} made {steps} steps"
    return lambda: (
        rivals.cpu(lambda: jax.block_until_ready(everything(states, keys)))
        / (transitions * N_LEAPFROG * chains)
        * 1e6
    )


def jax_mclmc(model: bf.BayesianModel, theta: torch.Tensor) -> Measure:
    """Return a measurement of blackjax's MCLMC: a compiled scan, all chains vectorised."""
    import blackjax
    import jax
    import jax.numpy as jnp

    x, y = (
        jnp.asarray(model.x.mT.contiguous().numpy()),
        jnp.asarray(model.y.flatten().numpy()),
    )

    def log_joint(params: tuple[Any, ...]) -> Any:
        return rivals.jax_log_likelihood(params, (x, y)) + rivals.jax_log_prior(params)

    algorithm = blackjax.mclmc(log_joint, L=L, step_size=MCLMC_STEP)
    start, steps = rivals.split(jnp.asarray(theta.numpy())), GRADIENTS // (2 * len(theta))
    keys = jax.random.split(jax.random.key(0), (steps, len(theta)))
    states = jax.vmap(algorithm.init)(start, keys[0])

    def one(states: Any, keys: Any) -> tuple[Any, Any]:
        states, info = jax.vmap(algorithm.step)(keys, states)
        return states, info.energy_change

    everything = jax.jit(lambda states: jax.lax.scan(one, states, keys))
    return lambda: (
        rivals.cpu(lambda: jax.block_until_ready(everything(states)))
        / (2 * steps * len(theta))
        * 1e6
    )


def pyro_hmc(model: bf.BayesianModel, theta: torch.Tensor, compiled: bool) -> Measure:
    """Return a measurement of Pyro's HMC: one chain, a plain torch potential over four tensors,
    traced or not.
    """
    from pyro.infer import HMC

    x, y = model.x.mT.contiguous(), model.y.flatten()

    def potential(
        weights: torch.Tensor, bias: torch.Tensor, head: torch.Tensor, shift: torch.Tensor
    ) -> torch.Tensor:
        return -rivals.torch_log_joint((weights, bias, head, shift), x, y)

    start = tuple(part[0].clone() for part in rivals.split(theta))
    function = torch.jit.trace(potential, start) if compiled else potential
    kernel = HMC(
        potential_fn=lambda p: function(p["0"], p["1"], p["2"], p["3"]),
        step_size=STEP_SIZE,
        trajectory_length=STEP_SIZE * (N_LEAPFROG + 0.5),
        adapt_step_size=False,
        adapt_mass_matrix=False,
    )
    params = {str(i): part for i, part in enumerate(start)}
    kernel.initial_params = params
    kernel.setup(0)
    assert kernel.num_steps == N_LEAPFROG
    transitions = 8

    def work() -> None:
        nonlocal params
        for _ in range(transitions):
            params = kernel.sample(params)

    return lambda: rivals.cpu(work) / (transitions * N_LEAPFROG) * 1e6


def eager(name: str, chains: int) -> Measure:
    """Return a measurement of bnnflow without its compiled path: a process of its own, asked for
    one at a time.
    """
    command, pipe = (
        [sys.executable, __file__, "--eager", name, str(chains)],
        subprocess.PIPE,
    )
    environment = os.environ | {"BNNFLOW_FUSED": "0"}
    worker = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def measure() -> float:
        print(file=worker.stdin, flush=True)
        assert worker.stdout
        return float(worker.stdout.readline())

    return measure


def problem(name: str, chains: int) -> tuple[bf.BayesianModel, torch.Tensor]:
    data = bf.data.load(name)
    model = rivals.bnnflow_model(data.x_train, data.y_train)
    return model, 0.5 * model.sample_prior(chains, 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="three rounds, yacht with 16 chains only"
    )
    parser.add_argument(
        "--eager", nargs=2, metavar=("DATA", "CHAINS"), help="the worker: one figure a line"
    )
    arguments = parser.parse_args()
    if arguments.eager:
        model, theta = problem(arguments.eager[0], int(arguments.eager[1]))
        measure = own_hmc(model.log_joint_and_grad, theta, GRADIENTS)
        for _ in sys.stdin:
            print(measure(), flush=True)
        return
    rivals.require(
        "jax", "blackjax", "numpyro", files=tuple(f"uci/{name}.npz" for name in DATA_SETS)
    )
    rounds = 3 if arguments.quick else ROUNDS
    print(
        f"{rivals.machine()}; HMC, {N_LEAPFROG} leapfrog steps, CPU us a gradient and chain, "
        f"{rounds} rounds in turns"
    )
    for name in DATA_SETS[: 1 if arguments.quick else None]:
        for chains in CHAINS[: 1 if arguments.quick else None]:
            model, theta = problem(name, chains)
            raw = torch.no_grad()(model.log_joint_and_grad)
            calls = max(1, GRADIENTS // chains)
            measures: dict[str, Measure] = {
                "bnnflow HMC": own_hmc(model.log_joint_and_grad, theta, GRADIENTS),
                "bnnflow gradient alone": lambda raw=raw, theta=theta, calls=calls: (
                    rivals.cpu(lambda: [raw(theta) for _ in range(calls)])
                    / (calls * len(theta))
                    * 1e6
                ),
                "bnnflow HMC, steps by torch": own_hmc(
                    Target(model.target), theta, GRADIENTS
                ),
                "bnnflow MCLMC": own_mclmc(model.target, theta),
                "bnnflow MCLMC, steps by torch": own_mclmc(Target(model.target), theta),
                "bnnflow HMC, BNNFLOW_FUSED=0": eager(name, chains),
                "blackjax MCLMC, vmap": jax_mclmc(model, theta),
                "blackjax HMC, vmap": jax_hmc("blackjax", model, theta, chains),
                "numpyro HMC, vmap": jax_hmc("numpyro", model, theta, chains),
            }
            if chains > 16:
                measures["blackjax HMC, vmap of 16 in turn"] = jax_hmc(
                    "blackjax", model, theta, 16
                )
                measures["numpyro HMC, vmap of 16 in turn"] = jax_hmc(
                    "numpyro", model, theta, 16
                )
            measures["torch vmap(grad) in bnnflow's HMC"] = own_hmc(
                naive(model), theta, GRADIENTS // 4
            )
            measures["Pyro HMC, 1 chain"] = pyro_hmc(model, theta, False)
            measures["Pyro HMC, 1 chain, traced"] = pyro_hmc(model, theta, True)
            samples = rivals.interleave(measures, rounds)
            shape = "-".join(map(str, (model.x.shape[1], rivals.HIDDEN, 1)))
            rivals.table(
                f"{name} {shape}, n = {len(model.x)}, {chains} chains",
                samples,
                "bnnflow HMC",
                ASKED,
            )
            mine = float(np.median(samples["bnnflow MCLMC"]))
            for other, most in MCLMC_ASKED.items():
                ratio = float(np.median(samples[other])) / mine
                rivals.asked(f"{other} / bnnflow MCLMC", 1 / most, ratio)


if __name__ == "__main__":
    main()
