"""Cost of the graph attention network beside the DWS network: forward and backward, batch 64, one
thread.

Prints CPU time (the best of several, the two in turn), ATen calls and what autograd keeps for the
backward pass. Run: ``python tests/benchmarks/bench_graph.py``.
"""

import itertools
import time

import torch
from torch import Tensor, nn

from bnnflow import WeightSpec
from bnnflow.equivariant import DWSNet, GraphNet

BATCH, DEPTH, REPEATS = 64, 4, 8


def chain(*widths: int) -> WeightSpec:
    """Return the weights of a perceptron."""
    layers = [
        layer
        for pair in itertools.pairwise(widths)
        for layer in (nn.Linear(*pair), nn.ReLU())
    ]
    return WeightSpec.of(nn.Sequential(*layers[:-1]))


def kept(net: nn.Module, features: Tensor) -> float:
    """Return the megabytes that autograd keeps of one forward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = net(features)  # held here, so that no storage is freed and counted again
    return sum(storages.values()) / 1e6 if result.requires_grad else 0.0


def calls(net: nn.Module, features: Tensor) -> int:
    """Count the ATen operations of a forward and a backward pass, those inside others included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        net(features).sum().backward()
    return sum(
        event.count for event in profile.key_averages() if event.key.startswith("aten::")
    )


def main() -> None:
    torch.set_num_threads(1)
    for widths, width, batch in [
        ((2, 32, 32, 1), 32, BATCH),
        ((2, 32, 32, 1), 64, BATCH),
        ((30, 16, 16, 2), 64, BATCH),
        ((784, 10, 10), 32, 8),
    ]:
        spec = chain(*widths)
        nets = [
            network(spec, 1, 1, width=width, depth=DEPTH, invariant=True)
            for network in (DWSNet, GraphNet)
        ]
        features = torch.randn(
            batch, spec.dim, 1, generator=torch.Generator().manual_seed(0)
        )
        times: list[list[float]] = [[], []]
        for _, (net, spent) in itertools.product(
            range(REPEATS), zip(nets, times, strict=True)
        ):
            began = time.process_time()
            net(features).sum().backward()
            spent.append(time.process_time() - began)
        print(
            f"{'-'.join(map(str, widths))}, width {width}, depth {DEPTH}, invariant, batch {batch}"
        )
        for net, spent in zip(nets, times, strict=True):
            parameters = sum(parameter.numel() for parameter in net.parameters())
            print(
                f"  {type(net).__name__:8s} {1e3 * min(spent):7.1f} ms, {calls(net, features):6d} "
                f"ATen calls, {kept(net, features):6.1f} MB kept, {parameters:8d} parameters"
            )
        print(
            f"  graph / DWS: {min(times[1]) / min(times[0]):.2f} times the CPU time",
            flush=True,
        )


if __name__ == "__main__":
    main()
