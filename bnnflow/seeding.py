"""One rule for randomness: every function takes ``seed`` and nothing touches the global
generator.
"""

from __future__ import annotations

import threading
from numbers import Integral

import torch

from bnnflow.types import Seed

__all__ = ["GLOBAL_STATE", "as_generator", "isolated", "seed_in_words"]


def as_generator(seed: Seed, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on ``device``.

    A generator that is already there is returned itself and advances.

    Args:
        seed: an integer, or a generator.
        device: where the numbers are drawn.

    Raises:
        TypeError: if ``seed`` is neither.
    """
    device = torch.device(device)
    if isinstance(seed, torch.Generator):
        if seed.device.type == device.type:
            return seed
        # A generator of another device seeds one of ours, so that the caller's still decides.
        seed = int(_integer(seed))
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(
            f"seed must be an int or a torch.Generator, got {type(seed).__name__}"
        )
    return torch.Generator(device).manual_seed(int(seed))


def seed_in_words(seed: Seed) -> int | str:
    """Return what ``info`` says of a seed: the number, or that it was a generator."""
    return "generator" if isinstance(seed, torch.Generator) else int(seed)


# Two threads with one global generator would draw each other's numbers, and restore each other's
# states. What else torch and Pyro keep for the whole process (Pyro's parameters, handlers) is used
# under the same lock.
GLOBAL_STATE = threading.RLock()


class isolated:
    """Context in which the global generators are seeded from ``generator`` and restored afterwards.

    For libraries that only know the global generator (torch.distributions, Pyro). One thread at a
    time: others wait. Threads that draw from the global generator without this context, of which
    this package has none, still disturb it.

    Args:
        generator: gives the seed; None where the numbers drawn do not matter, as initial weights
            that are replaced.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        on_cuda = generator is not None and generator.device.type == "cuda"
        self._devices = [generator.device] if generator is not None and on_cuda else []
        self._seed = 0 if generator is None else int(_integer(generator))

    def __enter__(self) -> None:
        GLOBAL_STATE.acquire()
        self._fork = torch.random.fork_rng(devices=self._devices)
        self._fork.__enter__()
        torch.default_generator.manual_seed(self._seed)
        if self._devices:
            torch.cuda.manual_seed(self._seed)

    def __exit__(self, *exception) -> None:
        try:
            self._fork.__exit__(*exception)
        finally:
            GLOBAL_STATE.release()


def _integer(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2**62, (), generator=generator, device=generator.device)
