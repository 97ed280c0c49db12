"""Several processes, one run: who I am, and the few messages that samplers exchange."""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "Ranks", "connect"]


@dataclass(frozen=True)
class Ranks:
    """The processes that share a run, as ``torchrun`` started them.

    Alone, every message is to oneself.

    Reductions gather first and then add in the order of the ranks, so that every process gets the
    same bits.

    Args:
        rank: the number of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def share(self, name: str, total: int) -> int:
        """Return how many of ``total`` are this process's.

        Raise ``ValueError`` unless all get as many.
        """
        if total % self.size:
            raise ValueError(
                f"{name} must be a multiple of the {self.size} processes, got {total}"
            )
        return total // self.size

    def own(self, rows: Tensor) -> Tensor:
        """Return this process's part of rows that all processes hold."""
        return rows.chunk(self.size)[self.rank]

    def own_generator(self, generator: torch.Generator) -> torch.Generator:
        """Return a generator whose numbers no other process draws; alone, ``generator`` itself."""
        if self.size == 1:
            return generator
        seeds = torch.randint(
            2**62, (self.size,), generator=generator, device=generator.device
        )
        return torch.Generator(generator.device).manual_seed(int(seeds[self.rank]))

    def gather(self, value: Tensor, dim: int = 0) -> Tensor:
        """Join the tensors of all processes, of equal shapes, along ``dim``."""
        if self.size == 1:
            return value
        parts = [
            torch.empty_like(value, memory_format=torch.contiguous_format)
            for _ in range(self.size)
        ]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts, dim)

    def mean(self, value: Tensor) -> Tensor:
        """Average a tensor over the processes."""
        return value if self.size == 1 else self.gather(value.unsqueeze(0)).mean(0)

    def check_same(self, values: Mapping[str, object], device: torch.device) -> None:
        """Raise ``ValueError`` in every process unless all were given the same values.

        They are compared by their texts, as `repr` writes them.

        Args:
            values: what is compared, by the name that the message gives it.
            device: where messages are exchanged.
        """
        if self.size == 1:
            return
        hashes = [
            hashlib.blake2b(repr(value).encode(), digest_size=7)
            for value in values.values()
        ]
        mine = torch.tensor([int(each.hexdigest(), 16) for each in hashes], device=device)
        everyone = self.gather(mine.unsqueeze(0))
        for name, same in zip(
            values, (everyone == everyone[0]).all(0).tolist(), strict=True
        ):
            if not same:
                raise ValueError(
                    f"{name} must be the same in all {self.size} processes, which share this run"
                )

    def agree(self, value: int, device: torch.device) -> int:
        """Return what the first process says."""
        if self.size == 1:
            return value
        message = torch.tensor(value, device=device)
        dist.broadcast(message, 0)
        return int(message)


ALONE = Ranks()


def connect(device: torch.device) -> Ranks:
    """Join the processes that ``torchrun`` started, or find oneself alone.

    Uses NCCL for models on a GPU and Gloo otherwise; a process group that the script has made is
    taken as it is.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
            return ALONE
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # Left to the end of the interpreter, the group's threads may still run when what they use
        # is gone.
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size())
