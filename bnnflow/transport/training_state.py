"""The state of a training, in memory and on disk."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnnflow import storage
from bnnflow.identity import digest
from bnnflow.optimisers import Muon
from bnnflow.options import Checkpoint, Training
from bnnflow.ranks import Ranks
from bnnflow.transport.field import Field
from bnnflow.types import Optimiser

__all__ = ["TrainingFile", "TrainingState", "Weighting"]

_VERSION = 3  # of a checkpoint; 2 did not say what it was a state of
_BINS = 4  # of the times by which the loss is reported
# steps between updates of averages after the first hundred: of small tensors, they are expensive
_UPDATED = 4
_MAX_NORM = 30.0  # of a gradient
_DECAY = 1e-3  # of weights

Weighting = Callable[[Tensor], Tensor]
"""Times ``(batch,)`` to what squared errors there are multiplied by."""


class TrainingState:
    """The field, its optimiser, its moving average, and the best of the averages so far."""

    def __init__(self, field: Field, training: Training) -> None:
        assert training.learning_rate is not None
        assert training.optimiser is not None
        self._field = field
        self._learning_rate = training.learning_rate
        self._parameters = [p for p in field.parameters() if p.requires_grad]
        self._optimisers = _optimisers(
            self._parameters, training.learning_rate, training.optimiser
        )
        self._averages = [p.detach().clone() for p in self._parameters]
        self._best: list[Tensor] | None = None
        self._bins = torch.zeros(
            2, _BINS, dtype=torch.float64, device=self._parameters[0].device
        )
        self.lowest, self.patience_used = math.inf, 0
        self.count = 0
        self.total: int | None = None
        self.seconds = self.cpu_seconds = 0.0

    @property
    def losses(self) -> list[float | None]:
        """Recent squared errors for each quarter of the time; None where there was none yet."""
        return [total / count if count else None for total, count in self._bins.T.tolist()]

    @property
    def loss(self) -> float:
        """Recent squared error over all times."""
        return float(self._bins[0].sum() / self._bins[1].sum())

    def step(
        self, errors: Tensor, t: Tensor, weighting: Weighting, rate: float, ranks: Ranks
    ) -> None:
        """Take one step on the weighted mean of the errors ``(batch,)``, unless its gradient is not
        finite.
        """
        for parameter in self._parameters:
            parameter.grad = None
        (errors * weighting(t)).mean().backward()
        if ranks.size > 1:
            _average_gradients(self._parameters, ranks)
        norm = nn.utils.get_total_norm(
            p.grad for p in self._parameters if p.grad is not None
        )
        length = float(norm)
        self.count += 1
        if not math.isfinite(length):
            return
        if length > _MAX_NORM:
            nn.utils.clip_grads_with_norm_(self._parameters, _MAX_NORM, norm)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self._learning_rate * rate
            optimiser.step()
        since = 1 if self.count <= 100 else _UPDATED
        if self.count % since == 0:
            self._follow(errors.detach(), t, since)

    def _follow(self, errors: Tensor, t: Tensor, since: int) -> None:
        """Bring the moving averages of parameters and errors up to date, so many steps after the
        last time.
        """
        decay = min(0.998, self.count / (self.count + 20)) ** since
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - decay)
        which = (t * _BINS).long().clamp_(max=_BINS - 1)
        self._bins.mul_(0.99**since)
        self._bins[0].index_add_(0, which, errors.double())
        self._bins[1].index_add_(0, which, torch.ones_like(t, dtype=torch.float64))

    def look(self, batch: tuple[Tensor, ...], weighting: Weighting, patience: int) -> bool:
        """Compare the average with the best so far on a fixed batch; say whether to stop."""
        t, target, x_t = batch
        with torch.no_grad(), self._swapped():
            errors = (self._field(t, x_t) - target).square().sum(-1)
        loss = float((errors * weighting(t)).mean())
        if loss < self.lowest:
            self.lowest, self.patience_used = loss, 0
            self._best = [average.clone() for average in self._averages]
        else:
            self.patience_used += 1
        return self.patience_used >= patience

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        """Lend the averages to the field."""
        own = [parameter.data for parameter in self._parameters]
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, data in zip(self._parameters, own, strict=True):
                parameter.data = data

    def finish(self) -> None:
        """Give the field its averaged weights, the best ones if there were held-out draws."""
        for parameter, average in zip(
            self._parameters, self._best or self._averages, strict=True
        ):
            parameter.data.copy_(average)
        self._field.requires_grad_(False).eval()

    def save(
        self, file: TrainingFile, stream: Tensor, ranks: Ranks, memory: dict[str, Tensor]
    ) -> None:
        """Write everything that the rest of training depends on; the first process does."""
        own = memory | {"generators": stream.to(self._bins.device)}
        of_all = {name: ranks.gather(value.unsqueeze(0)) for name, value in own.items()}
        if ranks.rank > 0:
            return
        groups = {
            "parameter": self._parameters,
            "average": self._averages,
            "best": self._best or [],
        }
        arrays = {
            f"{name}/{i}": value
            for name, values in groups.items()
            for i, value in enumerate(values)
        }
        for i, parameter in enumerate(self._parameters):
            for optimiser in self._optimisers:
                moments = optimiser.state.get(parameter, {})
                arrays |= {f"moments/{i}/{name}": value for name, value in moments.items()}
        arrays |= {"bins": self._bins} | of_all
        header = {
            "shapes": [list(parameter.shape) for parameter in self._parameters],
            "count": self.count,
            "total": self.total,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "lowest": None if math.isinf(self.lowest) else self.lowest,
            "patience_used": self.patience_used,
        }
        file.write(header, {name: v.detach().cpu().numpy() for name, v in arrays.items()})

    def load(
        self,
        file: TrainingFile,
        generator: torch.Generator,
        ranks: Ranks,
        memory: dict[str, Tensor],
    ) -> None:
        """Take over what `save` wrote."""
        assert file.saved is not None
        with storage.described(file.file):
            self._load(*file.saved, generator, ranks, memory)

    def _load(
        self,
        header: dict[str, Any],
        arrays: dict[str, np.ndarray],
        generator: torch.Generator,
        ranks: Ranks,
        memory: dict[str, Tensor],
    ) -> None:
        if header["shapes"] != [list(parameter.shape) for parameter in self._parameters]:
            raise ValueError(
                "the checkpoint is of another field: its parameters have other shapes"
            )
        device = self._bins.device
        values = {
            name: torch.from_numpy(array).to(device) for name, array in arrays.items()
        }
        if len(values["generators"]) != ranks.size:
            raise ValueError(
                f"the checkpoint is of {len(values['generators'])} processes, not of {ranks.size}"
            )
        for i, (parameter, average) in enumerate(
            zip(self._parameters, self._averages, strict=True)
        ):
            for name, own in (("parameter", parameter.data), ("average", average)):
                _take_over(own, values[f"{name}/{i}"], f"{name} {i}")
            moments = f"moments/{i}/"
            found = {
                name.removeprefix(moments): value
                for name, value in values.items()
                if name.startswith(moments)
            }
            owner = next(
                each
                for each in self._optimisers
                if any(parameter is p for p in each.param_groups[0]["params"])
            )
            if found:
                owner.state[parameter] = found
        if "best/0" in values:
            self._best = [values[f"best/{i}"] for i in range(len(self._parameters))]
        numbers = [
            header["count"],
            header["patience_used"],
            *([] if header["total"] is None else [header["total"]]),
        ]
        if (
            any(type(number) is not int or number < 0 for number in numbers)
            or values["bins"].shape != self._bins.shape
        ):
            raise ValueError("it has no count of steps")
        self._bins = values["bins"]
        self.count, self.total = header["count"], header["total"]
        self.seconds = float(header["seconds"])
        self.cpu_seconds = float(header["cpu_seconds"])
        self.lowest = math.inf if header["lowest"] is None else float(header["lowest"])
        self.patience_used = header["patience_used"]
        for name, own in memory.items():
            _take_over(own, values[name][ranks.rank], name)
        # a copy: of a view torch takes the numbers at the beginning of its storage, or crashes
        generator.set_state(values["generators"][ranks.rank].cpu().clone())


class TrainingFile:
    """The file that one training is kept in, and works on alone.

    Args:
        checkpoint: the file, and whether to go on with the training that is there, if there is one.
        identity: what it must agree on.
        ranks: the processes that share it; the first one writes.
        device: by which they exchange messages.

    Raises:
        ValueError: if another run works on the file; if it holds a training and is not to be
            resumed, or holds another training, one of an earlier version, or no intact checkpoint
            of one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        identity: dict[str, Any],
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.file = storage.file_path(checkpoint.path)
        self._identity = json.loads(json.dumps(identity, default=str))
        self._lock = storage.Lock(self.file, folder=False) if ranks.rank == 0 else None
        ranks.agree(0, device)  # nobody reads what another run may be writing
        self._first = ranks.rank == 0
        self.pairs: str | None = None  # what tells those of the first batch apart
        try:
            self.saved = self._read(checkpoint.resume)
        except BaseException:
            self.__exit__()
            raise

    def _read(self, resume: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        if not self.file.exists():
            return None
        # what is none of ours is not replaced
        header, arrays = storage.read(self.file, {"training": _VERSION})
        if not resume:
            raise ValueError(
                f"{self.file} already holds a training: go on with it by "
                f"Checkpoint({str(self.file)!r}, resume=True), "
                "or take another file"
            )
        if header["version"] < _VERSION:
            raise ValueError(
                f"{self.file} is of an earlier bnnflow and does not say what it was trained on: "
                "begin anew"
            )
        with storage.described(self.file):
            theirs = header["identity"]
            for name, value in self._identity.items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"holds the training of another {name}: {theirs.get(name)}, not {value}"
                    )
        return header, arrays

    def check_pairs(self, first: Callable[[], tuple[Tensor, ...]]) -> None:
        """Raise ``ValueError`` unless the first batch of the pairs is what it was in the first
        process.
        """
        assert self.saved is not None
        self.pairs = self.saved[0].get("pairs")
        if self._first and self.pairs is not None and digest(first()) != self.pairs:
            raise ValueError(
                f"{self.file} holds the training of other pairs: their first batch differs"
            )

    def write(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Write a state, whole or not at all."""
        header |= {"identity": self._identity, "pairs": self.pairs}
        storage.write(self.file, "training", _VERSION, header, arrays)

    def __enter__(self) -> TrainingFile:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.release()


def _optimisers(
    parameters: list[nn.Parameter], learning_rate: float, optimiser: Optimiser
) -> list[torch.optim.Optimizer]:
    matrices = [
        p for p in parameters if optimiser == "muon" and p.dim() == 2 and min(p.shape) > 4
    ]
    others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    found: list[torch.optim.Optimizer] = []
    if others:
        found.append(
            torch.optim.AdamW(others, learning_rate, weight_decay=_DECAY, foreach=True)
        )
    if matrices:
        found.append(Muon(matrices, learning_rate, _DECAY))
    return found


def _take_over(own: Tensor, kept: Tensor, name: str) -> None:
    if kept.shape != own.shape:  # to copy would be to broadcast
        raise ValueError(f"{name} has another shape than this training's")
    own.copy_(kept)


def _average_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = ranks.mean(torch.cat([grad.flatten() for grad in grads]))
    parts = flat.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
