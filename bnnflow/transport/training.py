"""Training of velocity fields on pairs: the loop, whatever the field, the pairs and their path."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bnnflow.arguments import checked
from bnnflow.identity import Identity, digest, seed_identity
from bnnflow.options import Checkpoint, Training
from bnnflow.progress import progress_bar
from bnnflow.ranks import ALONE, Ranks
from bnnflow.seeding import as_generator, isolated
from bnnflow.stopwatch import Stopwatch
from bnnflow.transport.batches import Batches, Reuse
from bnnflow.transport.field import Field, check_field
from bnnflow.transport.paths import ProbabilityPath
from bnnflow.transport.times import LogUniformNearEnd, Times
from bnnflow.transport.training_state import TrainingFile, TrainingState
from bnnflow.types import Seed
from bnnflow.warn import warn

__all__ = ["Pairs", "Task", "described", "run", "train"]

_STABLE = 0.7  # fraction of training at the full learning rate; it then decays to zero
_CHECK = 100  # steps between looks at the held-out draws
SECONDS = 60.0
"""Time between two states on disk."""

Pairs = Callable[[int, torch.Generator], tuple[Tensor, ...]]
"""``(n, generator) -> x0 (n, dim), x1 (n, dim)``."""


@checked
def train(
    field: nn.Module,
    pairs: Pairs,
    *,
    path: ProbabilityPath | None = None,
    times: Times | None = None,
    reuse: Reuse | None = None,
    held_out: Pairs | None = None,
    training: Training | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train any field on pairs, in place; `fit_flow` is this for the posterior of a model.

    A linear warm-up, a constant stretch and a cosine to zero over the last 30%; gradients clipped
    to norm 30, steps whose gradient is not finite left out; an exponential moving average of the
    weights.

    Args:
        field: a `Field`, or an ``nn.Module`` called as ``field(t (batch,), x (batch, dim))``.
            Squared errors are multiplied by the ``loss_weight`` of the path, or else of the field.
        pairs: draws pairs, ``(n, generator) -> (n, dim), (n, dim)``, on the field's device.
        path: how pairs travel; ``field.path`` if None, and else linear.
        times: at which the field is trained; a third of them near the end if None.
        reuse: how many steps see each pair; one if None.
        held_out: draws pairs of draws that are not trained on: the state with the lowest loss on
            them is kept, and training ends after ``training.patience`` looks, one every 100 steps,
            without a lower one.
        training: how long and how fast; Muon at a learning rate of 3e-3 unless it says otherwise.
        checkpoint: a file that keeps the state of training, written every minute and at the end;
            ``.npz`` is appended if it has no suffix. A `Checkpoint` with ``resume`` goes on from
            it; with a number of steps, bit for bit on CPU. Only ``budget``, ``steps`` and
            ``patience`` may change.
        seed: an int or a generator.
        progress: show a bar at a terminal.

    Returns:
        The field with its averaged weights, in evaluation mode and without gradients, and how it
        was trained.

    Raises:
        ValueError: if a setting is out of range; if another run works on the checkpoint; if it
            holds a training and is not to be resumed, or is of another training, damaged, or no
            checkpoint of a training.
    """
    task = Task(
        Field.of(field),
        pairs,
        path,
        times or LogUniformNearEnd(),
        reuse or Reuse(),
        held_out,
    )
    return field, run(task, training, checkpoint, seed, progress)


@dataclass(frozen=True)
class Task:
    """What is trained on what."""

    field: Field
    pairs: Pairs
    path: ProbabilityPath | None
    times: Times
    reuse: Reuse
    held_out: Pairs | None

    @property
    def way(self) -> ProbabilityPath:
        """The path of the pairs."""
        return self.field.path if self.path is None else self.path

    @property
    def device(self) -> torch.device:
        """Where the field is; ``ValueError`` if it has no parameters."""
        first = next(self.field.parameters(), None)
        if first is None:
            raise ValueError(
                "there is nothing to train: the field, or velocity, has no parameters"
            )
        return first.device

    def begin(self, generator: torch.Generator, progress: bool) -> None:
        """Do what comes before the first step, but not where training is resumed."""

    def memory(self) -> dict[str, Tensor]:
        """Return what steps change beside the field; a checkpoint keeps it, and writes to it where
        training is resumed.
        """
        return {}

    def weighting(self, t: Tensor) -> Tensor:
        """Return what squared errors at times ``(batch,)`` are multiplied by."""
        weight = self.way.loss_weight(t)
        return self.field.loss_weight(t) if weight is None else weight

    def batch(self, n: int, pairs: Pairs, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw times ``(n,)``, what is regressed on and points, ``(n, dim)`` both."""
        x0, x1 = pairs(n, generator)
        t = self.times.sample(n, x0, generator)
        x_t, target = self.way.point(x0, x1, t, generator)
        return t, target, x_t

    def check(self, t: Tensor, *given: Tensor) -> bool:
        """See that the field is one, and say whether it draws random numbers in training."""
        return check_field(self.field, t, given[0])

    def errors(
        self, call: Callable[..., Tensor], t: Tensor, target: Tensor, *given: Tensor
    ) -> Tensor:
        """Return what training makes small, ``(n,)``, of a batch and what it is called with."""
        return (call(t, *given) - target).square().sum(-1)


def run(
    task: Task,
    training: Training | None,
    checkpoint: Checkpoint | str | Path | None,
    seed: Seed,
    progress: bool,
    *,
    ranks: Ranks = ALONE,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the field of a task in place, and say how; see `train`.

    Args:
        task: the field and its pairs.
        training: how long and how fast.
        checkpoint: where the state is kept.
        seed: of the pairs.
        progress: show a bar at a terminal.
        ranks: the processes that share the batch.
        identity: what else a run must agree on to go on with a checkpoint, plain values by name.
            Always compared are the field but for its weights, the first batch of the pairs, the
            times, and all settings but ``budget``, ``steps`` and ``patience``.
    """
    training = (training or Training()).with_defaults(3e-3, "muon")
    own_batch = ranks.share("batch_size", training.batch_size)
    device = task.device
    seed_of_run = seed_identity(seed)
    shared = as_generator(seed, device)
    fixed = (
        None
        if task.held_out is None
        else task.batch(4 * training.batch_size, task.held_out, shared)
    )
    generator = ranks.own_generator(shared)
    chance = int(torch.randint(2**62, (), generator=_copy(generator), device=device))
    state = TrainingState(task.field, training)
    file: contextlib.AbstractContextManager[TrainingFile | None] = contextlib.nullcontext()
    if (place := Checkpoint.of(checkpoint)) is not None:
        known = dict(identity or {}) | _identity(task, training, fixed, seed_of_run)
        file = TrainingFile(place, known, ranks, device)
    with file as kept:
        if kept is not None and kept.saved is not None:
            kept.check_pairs(lambda: task.pairs(own_batch, _copy(generator)))
            state.load(kept, generator, ranks, task.memory())
        else:
            own = torch.Generator(device).manual_seed(chance)
            task.begin(own, progress and ranks.rank == 0)
        loop = _Loop(
            task, training, state, generator, chance, own_batch, ranks, kept, fixed
        )
        info = loop.run(progress)
    state.finish()
    return info


class _Loop:
    """The steps of one training.

    Args:
        task: the field and its pairs.
        training: how long and how fast.
        state: of the field and its optimiser, new or from a checkpoint.
        generator: of the pairs of this process.
        chance: seed of the numbers that the field itself draws, in its first step.
        batch_size: of this process.
        ranks: the processes that share the batch.
        file: where the state is kept.
        fixed: a batch of held-out draws.
    """

    def __init__(
        self,
        task: Task,
        training: Training,
        state: TrainingState,
        generator: torch.Generator,
        chance: int,
        batch_size: int,
        ranks: Ranks,
        file: TrainingFile | None,
        fixed: tuple[Tensor, ...] | None,
    ) -> None:
        self.task, self.training, self.state = task, training, state
        self.batch_size, self.ranks, self.file, self.fixed = batch_size, ranks, file, fixed
        self.generator, self.device = generator, task.device
        self.chance = chance
        # whether the field draws numbers; not known before it has met a batch
        self.random: bool | None = None
        self.clock = Stopwatch(state.seconds, state.cpu_seconds)
        self.total = training.steps if training.steps is not None else state.total
        self.stopped = False
        call: Callable[..., Tensor] = (
            task.field if task.reuse.steps == 1 else task.field.from_precomputed
        )
        self.call = torch.compile(call) if training.compile else call
        self.batches = Batches(self.draw, task.reuse, generator, state.count)

    def draw(self) -> tuple[Tensor, ...]:
        """Draw a batch: times, targets, points, and what is precomputed of these if they come
        again.
        """
        batch = self.task.batch(self.batch_size, self.pairs, self.generator)
        if self.task.reuse.steps == 1:
            return batch
        t, _, x_t = batch
        return *batch, *self.task.field.precompute(t, x_t)

    def pairs(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw pairs; the first ones of a training tell it apart."""
        ends = self.task.pairs(n, generator)
        if self.file is not None and self.file.pairs is None:
            self.file.pairs = digest(ends)
        return ends

    def run(self, progress: bool) -> dict[str, Any]:
        """Take the steps that are left, and return how the field was trained."""
        state, interrupted = self.state, False
        shown = progress and self.ranks.rank == 0
        saved = time.perf_counter()
        with progress_bar(self.total, "flow", shown, "step", initial=state.count) as bar:
            try:
                while (self.total is None or state.count < self.total) and not self.stopped:
                    if self.fixes_the_end():
                        bar.total = self.total
                        continue
                    with _whole():
                        self.step()
                    bar.update()
                    self.show(bar)
                    if self.file is not None and time.perf_counter() - saved > SECONDS:
                        self.save()
                        saved = time.perf_counter()
            except KeyboardInterrupt:
                if state.count == 0:
                    raise
                interrupted = True
                warn(f"interrupted: returning the flow after {state.count} steps")
        self.save()
        return self.info(interrupted)

    def fixes_the_end(self) -> bool:
        """Say whether the budget, as far as the constant stretch goes, has just been used up, and
        fix the end.
        """
        count = self.state.count
        if self.total is not None or count == 0 or count % 7:
            return False
        if not self.ranks.agree(
            int(self.clock.seconds > _STABLE * self.training.budget), self.device
        ):
            return False
        self.total = count * 10 // 7
        return True

    def step(self) -> None:
        """Take one step, and look at the held-out draws now and then."""
        state, training = self.state, self.training
        t, target, *given = self.batches.take()
        if self.random is None:
            self.random = self.task.check(t, *given)
        with self.precision(), _chance(self.random, self.chance + state.count):
            errors = self.task.errors(self.call, t, target, *given)
        state.step(
            errors, t, self.task.weighting, _rate(state.count, self.total), self.ranks
        )
        if self.fixed is not None and state.count % _CHECK == 0:
            self.stopped = state.look(self.fixed, self.task.weighting, training.patience)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the field is computed."""
        if self.training.autocast:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def show(self, bar: tqdm) -> None:
        """Write the losses beside the bar."""
        if bar.disable or self.state.count % 20:
            return
        budget = self.training.budget
        left = (
            f"{max(0.0, budget - self.clock.seconds):.0f}s"
            if self.training.steps is None
            else ""
        )
        bar.set_postfix(
            loss=" ".join(
                "-" if loss is None else f"{loss:.1f}" for loss in self.state.losses
            ),
            left=left,
        )

    def save(self) -> None:
        """Write the state to the checkpoint, if there is one."""
        if self.file is None:
            return
        state, clock = self.state, self.clock
        state.seconds, state.cpu_seconds, state.total = (
            clock.seconds,
            clock.cpu_seconds,
            self.total,
        )
        state.save(self.file, self.batches.stream, self.ranks, self.task.memory())

    def info(self, interrupted: bool) -> dict[str, Any]:
        """Return how the field was trained."""
        state = self.state
        return {
            "steps": state.count,
            "batch_size": self.training.batch_size,
            **self.clock.read(),
            "loss": state.loss,
            "loss_by_time": state.losses,
            "held_out_loss": None if self.fixed is None else state.lowest,
            "parameters": sum(p.numel() for p in self.task.field.parameters()),
            "stopped_early": self.stopped,
            "interrupted": interrupted,
        }


def _identity(
    task: Task, training: Training, fixed: tuple[Tensor, ...] | None, seed: int | str
) -> dict[str, Any]:
    """Return what a training must agree on to be the same training."""
    return {
        "field": _structure(task.field),
        "held-out pairs": None if fixed is None else digest(fixed),
        "way of the pairs": described(task.way),
        "times": described(task.times),
        "batch_size": training.batch_size,
        "reuse": task.reuse.steps,
        "learning_rate": training.learning_rate,
        "optimiser": training.optimiser,
        "autocast": training.autocast,
        "compile": training.compile,
        "generator": seed,
    }


def described(value: object) -> str:
    """Return what tells objects apart, with a name for the reader."""
    return f"{type(value).__name__} {digest(value)}"


def _chance(random: bool, seed: int) -> contextlib.AbstractContextManager[None]:
    """Let a field that draws numbers from the global generator draw those of a step, whatever came
    before.
    """
    return (
        isolated(torch.Generator().manual_seed(seed))
        if random
        else contextlib.nullcontext()
    )


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block: a step broken off in the middle would be kept so,
    and could not be resumed bit for bit.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[Any, Any]] = []
    signal.signal(signal.SIGINT, lambda *given: came.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


def _copy(generator: torch.Generator) -> torch.Generator:
    copied = torch.Generator(generator.device)
    copied.set_state(generator.get_state())
    return copied


def _structure(field: Field) -> str:
    """Return what tells fields apart but for their weights, which are those of the checkpoint."""
    named = dict(field.named_parameters())
    # A field of the caller's own is what its code and its attributes make of its weights.
    described = field.describe() or Identity(named).add(field.bind(None), "field").digest
    parameters = [(name, tuple(p.shape), str(p.dtype)) for name, p in named.items()]
    return f"{type(field).__name__} {digest((described, parameters, dict(field.named_buffers())))}"


def _rate(count: int, total: int | None) -> float:
    """Return the learning rate as a fraction: linear warm-up, constant, then a cosine to zero.

    While ``total`` is still unknown training is in the constant part, so that a run by budget can
    be repeated by its number of steps.
    """
    warm = min(1.0, (count + 1) / 100)
    if total is None or count < _STABLE * total:
        return warm
    done = (count - _STABLE * total) / ((1 - _STABLE) * total)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
