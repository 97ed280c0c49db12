"""One rule for randomness: every function takes ``seed`` and nothing touches the global generator."""

from __future__ import annotations

from numbers import Integral

import torch

from bnnflow.types import Seed

__all__ = ["as_generator", "isolated"]


def as_generator(seed: Seed, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on ``device``; a generator that is already there is returned itself and advances.

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
        seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an int or a torch.Generator, got {type(seed).__name__}")
    return torch.Generator(device).manual_seed(int(seed))


class isolated:
    """Context in which the global generators are seeded from ``generator`` and restored afterwards.

    For libraries that only know the global generator (torch.distributions, Pyro).
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        self._cuda = generator.device.type == "cuda"
        devices = [generator.device] if self._cuda else []
        self._fork = torch.random.fork_rng(devices=devices)

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.default_generator.manual_seed(self._seed)
        if self._cuda:
            torch.cuda.manual_seed(self._seed)

    def __exit__(self, *exception) -> None:
        self._fork.__exit__(*exception)
