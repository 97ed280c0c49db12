"""The one sampling loop: warm a kernel up, step it, keep what it draws, survive an interrupt or a
kill.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bnnflow.draws import Draws
from bnnflow.inference.checkpoint import RunFolder, Stream
from bnnflow.inference.start import WARM_START, starting_points
from bnnflow.method import Run
from bnnflow.model import BayesianModel
from bnnflow.progress import progress_bar
from bnnflow.types import Kernel
from bnnflow.warn import warn

__all__ = ["Tuned", "WarmUp", "fixed", "run_chains", "thinned", "warm_up"]

CHUNK_BYTES = 32 * 2**20
"""Draws of one process that wait in memory before they are written, in bytes."""


class Tuned(NamedTuple):
    """A kernel ready to sample, the state that warm-up left, and what was found, for the reader."""

    kernel: Kernel
    state: Any
    found: dict[str, Any]


class WarmUp(NamedTuple):
    """Tuning, as a process: a kernel whose states also hold all that is being learned, and what it
    ends in.

    States are tensors, numbers and named tuples of them, so that a run can go on from any of them.
    ``tuned`` must depend on nothing but the state.
    """

    init: Callable[[Tensor, torch.Generator], Any]
    step: Callable[[Any, torch.Generator], tuple[Any, Any]]
    tuned: Callable[[Any], Tuned]


def fixed(kernel: Kernel, found: dict[str, Any] | None = None) -> WarmUp:
    """Return the warm-up of a kernel that has nothing to tune: burn-in."""

    def init(theta: Tensor, generator: torch.Generator) -> Any:
        return _with_density(kernel.init(theta, generator))

    return WarmUp(init, kernel.step, lambda state: Tuned(kernel, state, found or {}))


def thinned(kernel: Kernel, n: int) -> Kernel:
    """Return the kernel that makes ``n`` steps of another.

    Gradients (``n_steps``) are added, a divergence in any step counts, other statistics are
    averaged.
    """
    if n == 1:
        return kernel

    def step(state: Any, generator: torch.Generator) -> tuple[Any, Any]:
        infos = []
        for _ in range(n):
            state, info = _stepped(kernel.step(state, generator))
            infos.append(info)
        return state, type(infos[0])(
            *map(_combined, infos[0]._fields, zip(*infos, strict=True))
        )

    return Kernel(kernel.init, step)


def _combined(name: str, values: tuple[Tensor, ...]) -> Tensor:
    if all(value is values[0] for value in values):  # a constant
        return values[0] * len(values) if name == "n_steps" else values[0]
    stacked = torch.stack(values)
    if name == "n_steps":
        return stacked.sum(0)
    return stacked.any(0) if stacked.dtype == torch.bool else stacked.mean(0)


def _stepped(result: Any) -> tuple[Any, Any]:
    """Return what a step returned, a state and statistics.

    Raises:
        TypeError: if it is something else.
    """
    pair = isinstance(result, tuple) and len(result) == 2 and not _named(result)
    if not pair:
        raise TypeError(f"step must return a pair (state, info), got {_kind(result)}")
    _, info = result
    fields = info._asdict() if _named(info) else {}
    odd = [name for name, value in fields.items() if not _of_chains(value)]
    if "n_steps" not in fields or odd:
        raise TypeError(
            "step must return an info that is a named tuple of tensors (chain,), n_steps among "
            f"them, got {_kind(info)}" + (f" whose {odd[0]} is none" if odd else "")
        )
    return result


def _tuned(result: Any) -> Tuned:
    """Return what warm-up ended in.

    Raises:
        TypeError: if it is no kernel with a state to go on from.
    """
    if not isinstance(result, Tuned):
        raise TypeError(
            f"tuned must return a Tuned(kernel, state, found), got {_kind(result)}"
        )
    _with_density(result.state)
    return result


def _with_density(state: Any) -> Any:
    theta, log_joint = (getattr(state, name, None) for name in ("theta", "log_joint"))
    sound = (
        isinstance(theta, Tensor)
        and isinstance(log_joint, Tensor)
        and theta.dim() == 2
        and log_joint.shape == theta.shape[:1]
    )
    if not sound:
        raise TypeError(
            "init and step must return states with theta (chain, dim) and log_joint (chain,), got "
            f"{_kind(state)}"
        )
    return state


def _of_chains(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 1


def _named(value: Any) -> bool:
    return hasattr(value, "_fields")


def _kind(value: Any) -> str:
    shapes = [
        f"{name} {tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__}"
        for name, each in (value._asdict() if _named(value) else {}).items()
    ]
    return (
        f"{type(value).__name__}({', '.join(shapes)})" if shapes else type(value).__name__
    )


def warm_up(process: WarmUp, theta: Tensor, n: int, generator: torch.Generator) -> Tuned:
    """Return the kernel that ``n`` transitions of warm-up tune, from starting points
    ``(chain, dim)``.
    """
    state = process.init(theta, generator)
    for _ in range(n):
        state, _ = _stepped(process.step(state, generator))
    return _tuned(process.tuned(state))


def run_chains(
    model: BayesianModel,
    run: Run,
    process: WarmUp,
    *,
    chains: int,
    warmup: int,
    draws: int,
    name: str,
) -> Draws:
    """Run a Markov chain method from its starting points to its draws.

    Ctrl-C while drawing returns what was drawn, with a warning and ``info["interrupted"]``; before
    the first draw there is nothing to return and the interrupt goes on. With a checkpoint, draws go
    to disk as they come.

    Args:
        model: the posterior.
        run: the settings that methods share.
        process: the method's warm-up.
        chains: number of chains over all processes.
        warmup: transitions of warm-up.
        draws: draws per chain.
        name: what the progress bar says.
    """
    ranks, checkpoint = run.ranks, run.checkpoint
    mine = ranks.share("chains", chains)
    ranks.check_same(run.alike, model.device)
    saved = checkpoint.saved if checkpoint else None
    shown = run.progress and ranks.rank == 0
    generator = ranks.own_generator(run.generator)
    if saved is None:
        theta = starting_points(model, mine, run.init, generator, shown, ranks)
        progress = _Progress(
            process.init(theta, generator),
            gradients=1.0 + (WARM_START if run.init is None else 0),
        )
    else:
        template = torch.zeros(mine, model.dim, dtype=model.dtype, device=model.device)
        progress = _Progress.restored(saved, process, template, generator)
    done = progress.step if progress.tuned is None else warmup + progress.step
    with progress_bar(warmup + draws, name, shown, "draw", initial=done) as bar:
        meter = _Meter(bar, mine)
        _warm(process, progress, warmup, run, generator, meter)
        return _draw(progress, draws, run, generator, meter)


class _Progress:
    """Where a run is: the state of its warm-up, then the tuned kernel and the state of its
    chains.
    """

    def __init__(self, warm: Any, gradients: float) -> None:
        self.warm, self.step, self.gradients = warm, 0, gradients
        self.tuned: Tuned | None = None
        self.state: Any = None
        self.stream: Tensor | None = None  # of the generator, where the next draw begins

    @classmethod
    def restored(
        cls, saved: Any, process: WarmUp, theta: Tensor, generator: torch.Generator
    ) -> _Progress:
        progress = cls(
            saved.state("warm", process.init(theta, generator)),
            float(saved.header["gradients"]),
        )
        progress.step = saved.header["step"]
        if saved.header["stage"] == "sampling":
            progress.tuned = _tuned(process.tuned(progress.warm))
            progress.state = saved.state("state", progress.tuned.state)
        saved.restore(generator)
        return progress

    def drawn(self, state: Any, gradients: float, stream: Tensor) -> None:
        """Count a draw, all of it at once: no interrupt comes between assignments."""
        self.state, self.step, self.gradients, self.stream = (
            state,
            self.step + 1,
            gradients,
            stream,
        )

    def save(
        self,
        checkpoint: RunFolder,
        generator: torch.Generator,
        info: dict[str, Any],
        draws: dict[str, Any] | None = None,
    ) -> None:
        stage = "warmup" if self.tuned is None else "sampling"
        header = {
            "stage": stage,
            "step": self.step,
            "gradients": self.gradients,
            "info": info,
        } | (draws or {})
        checkpoint.save(header, generator, warm=self.warm, state=self.state)


def _warm(
    process: WarmUp,
    progress: _Progress,
    warmup: int,
    run: Run,
    generator: torch.Generator,
    meter: _Meter,
) -> None:
    """Bring the run to its first draw."""
    if progress.tuned is not None:
        return
    checkpoint, device = run.checkpoint, generator.device
    try:
        while progress.step < warmup:
            progress.warm, info = _stepped(process.step(progress.warm, generator))
            progress.step += 1
            progress.gradients += float(info.n_steps.double().mean())
            meter.update(info, "warm-up")
            if checkpoint and checkpoint.due(True, device):
                progress.save(checkpoint, generator, {})
    except KeyboardInterrupt:
        if checkpoint:
            warn(
                "interrupted in warm-up: Checkpoint(..., resume=True) goes on from the last state"
            )
        raise
    progress.tuned = _tuned(process.tuned(progress.warm))
    progress.state, progress.step = progress.tuned.state, 0
    if checkpoint:
        progress.save(checkpoint, generator, progress.tuned.found)
    run.ranks.agree(0, device)  # nobody draws before everybody can go on from here


def _draw(
    progress: _Progress, draws: int, run: Run, generator: torch.Generator, meter: _Meter
) -> Draws:
    """Step the tuned kernel until there are ``draws`` draws, and gather those of all processes."""
    tuned, checkpoint, done = progress.tuned, run.checkpoint, progress.step
    assert tuned is not None
    record: _Memory | Stream
    if checkpoint:
        bytes_each = progress.state.theta.numel() * progress.state.theta.element_size()
        begun = checkpoint.saved if done else None
        record = Stream(
            checkpoint.folder, begun, max(1, min(1000, CHUNK_BYTES // bytes_each))
        )
    else:
        record = _Memory(draws)

    def save() -> None:
        if checkpoint and isinstance(record, Stream):
            record.flush()
            progress.save(checkpoint, generator, tuned.found, record.describe())

    interrupted, progress.stream = False, generator.get_state()
    try:
        while progress.step < draws:
            state, info = _stepped(tuned.kernel.step(progress.state, generator))
            _with_density(state)
            record.append(
                {"theta": state.theta, "log_joint": state.log_joint} | info._asdict()
            )
            gradients = progress.gradients + float(info.n_steps.double().mean())
            progress.drawn(state, gradients, generator.get_state())
            meter.update(info, "")
            if checkpoint and checkpoint.due(False, generator.device):
                save()
    except KeyboardInterrupt:
        if progress.step == 0:
            raise
        interrupted = True
        warn(f"interrupted: returning the {progress.step} of {draws} draws made so far")
        # a draw that was broken off is made anew, with the same random numbers
        generator.set_state(progress.stream)
        record.cut(progress.step)
    save()
    values = {name: value[:, :draws] for name, value in record.read().items()}
    values = _gathered(values, progress.step, run)
    stats = {
        name: value for name, value in values.items() if name not in ("theta", "log_joint")
    }
    gradients = float(
        run.ranks.mean(
            torch.tensor(progress.gradients, dtype=torch.float64, device=generator.device)
        )
    )
    info = tuned.found | {
        "interrupted": interrupted,
        "gradients_per_chain": round(gradients),
    }
    if "diverging" in stats:
        info["divergences"] = int(stats["diverging"].sum())
    return Draws(values["theta"], values["log_joint"], stats, info=info)


def _gathered(values: dict[str, Tensor], done: int, run: Run) -> dict[str, Tensor]:
    """Join the chains of all processes; an interrupt may have left some with fewer draws."""
    if run.ranks.size == 1:
        return values
    device = run.generator.device
    shortest = int(run.ranks.gather(torch.tensor([done], device=device)).min())
    return {
        name: run.ranks.gather(value[:, :shortest].to(device))
        for name, value in values.items()
    }


class _Memory:
    """Draws of a run that is kept in memory."""

    def __init__(self, draws: int) -> None:
        self._draws, self.done = draws, 0
        self._values: dict[str, Tensor] = {}

    def append(self, values: dict[str, Tensor]) -> None:
        if not self._values:
            self._values = {name: value.new_empty(len(value), self._draws, *value.shape[1:])
                            for name, value in values.items()}  # fmt: skip
        for name, value in values.items():
            self._values[name][:, self.done] = value
        self.done += 1

    def cut(self, draws: int) -> None:
        """Forget what was recorded beyond so many draws."""
        self.done = draws

    def read(self) -> dict[str, Tensor]:
        return {name: value[:, : self.done] for name, value in self._values.items()}


class _Meter:
    """What the bar says: acceptance, divergences, step size and gradients a second, over all chains
    here.
    """

    def __init__(self, bar: tqdm, chains: int) -> None:
        self._bar, self._chains = bar, chains
        self._acceptance, self._steps, self._diverging, self._count = 0.0, 0.0, 0, 0
        self._since = self._shown = time.monotonic()

    def update(self, info: Any, stage: str) -> None:
        self._bar.update()
        if self._bar.disable:
            return
        self._count += 1
        self._steps += float(info.n_steps.sum())
        fields = info._asdict()
        if "acceptance_rate" in fields:
            self._acceptance += float(fields["acceptance_rate"].nanmean())
        if "diverging" in fields:
            self._diverging += int(fields["diverging"].sum())
        now = time.monotonic()
        if now - self._shown < 0.5:
            return
        said = {"stage": stage} if stage else {}
        if "acceptance_rate" in fields:
            said["accept"] = f"{self._acceptance / self._count:.2f}"
        if "step_size" in fields:
            said["step"] = f"{float(fields['step_size'].double().mean()):.1e}"
        said["divergences"] = str(self._diverging)
        said["gradients/s"] = f"{self._steps / (now - self._since):.2g}"
        self._bar.set_postfix(said)
        self._acceptance, self._steps, self._count = 0.0, 0.0, 0
        self._since = self._shown = now
