"""CPU microseconds a step and chain of stochastic-gradient Langevin dynamics: bnnflow, blackjax,
posteriors.

A step is everything: drawing the chain's own mini-batch, its gradient, the noise, the move. bnnflow
also returns the estimate of the log density, checks every gradient, and stratifies its batches; the
others draw rows with replacement. Compiling is not counted. Run:
``python tests/benchmarks/bench_sgld.py [--quick]``.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import rivals
import torch

import bnnflow as bf
from bnnflow.inference.start import starting_points
from bnnflow.inference.stochastic.gradients import stochastic
from bnnflow.inference.stochastic.sgld import sgld

CHAINS = 16
BATCHES = (32, 128)
DATA_SETS = ("yacht", "concrete")
STEP_SIZE = 2e-7  # stable for every data set; chains start 300 Adam steps from the prior
STEPS = 400  # in one measurement; posteriors alone makes a quarter
ROUNDS = 15
ASKED = {
    "blackjax": ("blackjax", 1.0),
    "posteriors, one chain": ("posteriors, 1 chain", 30.0),
}


def own(model: bf.BayesianModel, theta: torch.Tensor, batch: int) -> Callable[[], float]:
    """Return a measurement of bnnflow's kernel."""
    kernel = sgld(stochastic(model, batch), STEP_SIZE, torch.ones(model.dim))
    generator = torch.Generator().manual_seed(1)
    state = kernel.init(theta, generator)

    @torch.no_grad()
    def work() -> None:
        nonlocal state
        for _ in range(STEPS):
            state, _ = kernel.step(state, generator)

    return lambda: rivals.cpu(work) / (STEPS * len(theta)) * 1e6


def gradient_alone(
    model: bf.BayesianModel, theta: torch.Tensor, batch: int
) -> Callable[[], float]:
    """Return a measurement of bnnflow's mini-batch gradient, batch included."""
    generator = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def work() -> None:
        for _ in range(STEPS):
            model.minibatch_log_joint_and_grad(theta, generator, batch)

    return lambda: rivals.cpu(work) / (STEPS * len(theta)) * 1e6


def blackjax_sgld(
    model: bf.BayesianModel, theta: torch.Tensor, batch: int
) -> Callable[[], float]:
    """Return a measurement of blackjax: vectorised over chains, one compiled scan over steps."""
    import blackjax
    import jax
    import jax.numpy as jnp

    x, y, n, chains = (
        jnp.asarray(model.x.numpy()),
        jnp.asarray(model.y.flatten().numpy()),
        len(model.x),
        len(theta),
    )

    def log_joint(params: tuple[Any, ...], rows: tuple[Any, Any]) -> Any:
        return n / batch * rivals.jax_log_likelihood(params, rows) + rivals.jax_log_prior(
            params
        )

    algorithm = blackjax.sgld(jax.grad(log_joint))

    def step(params: tuple[Any, ...], key: Any) -> tuple[Any, None]:
        for_rows, for_noise = jax.random.split(key)
        rows = jax.random.randint(for_rows, (batch,), 0, n)
        return algorithm.step(for_noise, params, (x[rows].T, y[rows]), STEP_SIZE / 2), None

    @jax.jit
    def run(params: tuple[Any, ...], key: Any) -> Any:
        keys = jax.random.split(key, (STEPS, chains))
        return jax.lax.scan(lambda p, k: jax.vmap(step)(p, k), params, keys)[0]

    start, key = rivals.split(jnp.asarray(theta.numpy())), jax.random.key(0)
    return lambda: (
        rivals.cpu(lambda: jax.block_until_ready(run(start, key))) / (STEPS * chains) * 1e6
    )


def posteriors_sgld(
    model: bf.BayesianModel, theta: torch.Tensor, batch: int, chains: int
) -> Callable[[], float]:
    """Return a measurement of posteriors: flat weights updated in place, its fastest way.

    Vmap if chains > 1.
    """
    with warnings.catch_warnings():
        # of tensordict, about posteriors' own classes
        warnings.simplefilter("ignore", FutureWarning)
        from posteriors.sgmcmc import sgld as library

    x, y, n = model.x, model.y.flatten(), len(model.x)
    no_auxiliary = torch.zeros(())

    def log_posterior(
        theta: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[Any, torch.Tensor]:
        return rivals.torch_log_joint(
            rivals.split(theta), rows[0].mT, rows[1], n / batch
        ), no_auxiliary

    transform = library.build(log_posterior, STEP_SIZE / 2)
    steps = STEPS // 4
    if chains == 1:
        state = transform.init(theta[0].clone())
    else:
        zeros = torch.zeros(chains)
        state = library.SGLDState(
            theta[:chains].clone(), zeros, zeros.long(), batch_size=[chains]
        )
        update = torch.vmap(transform.update, randomness="different")

    def work() -> None:
        nonlocal state
        for _ in range(steps):
            if chains == 1:
                rows = torch.randint(n, (batch,))
                state, _ = transform.update(state, (x[rows], y[rows]), inplace=True)
            else:
                rows = torch.randint(n, (chains, batch))
                state, _ = update(state, (x[rows], y[rows]))

    return lambda: rivals.cpu(work) / (steps * chains) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick",
        action="store_true",
        help="three rounds of yacht with the smaller batch only",
    )
    quick = parser.parse_args().quick
    rounds = 3 if quick else ROUNDS
    rivals.require(
        "jax",
        "blackjax",
        "posteriors",
        files=tuple(f"uci/{name}.npz" for name in DATA_SETS),
    )
    print(
        f"{rivals.machine()}; SGLD, {CHAINS} chains, CPU us a step and chain, {rounds} rounds in "
        "turns"
    )
    for name in DATA_SETS[: 1 if quick else None]:
        for batch in BATCHES[: 1 if quick else None]:
            data = bf.data.load(name)
            model = rivals.bnnflow_model(data.x_train, data.y_train)
            theta = starting_points(
                model, CHAINS, None, torch.Generator().manual_seed(0), False
            )
            measures = {
                "bnnflow SGLD": own(model, theta, batch),
                "bnnflow mini-batch gradient alone": gradient_alone(model, theta, batch),
                "blackjax SGLD": blackjax_sgld(model, theta, batch),
                "posteriors, 1 chain": posteriors_sgld(model, theta, batch, 1),
                f"posteriors, vmap of {CHAINS}": posteriors_sgld(
                    model, theta, batch, CHAINS
                ),
            }
            samples = rivals.interleave(measures, rounds)
            rivals.table(
                f"{name}, n = {len(model.x)}, batches of {batch}",
                samples,
                "bnnflow SGLD",
                ASKED,
            )


if __name__ == "__main__":
    main()
