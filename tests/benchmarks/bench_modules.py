"""CPU milliseconds of a gradient of log_joint for networks of any module: bnnflow against a plain
loop over chains.

The loop is what a torch user writes: weights put into a network, the log posterior, its backward
pass, the gradients in one vector. One process, one thread, the least of several interleaved
repeats. Run: ``python tests/benchmarks/bench_modules.py [--quick]``.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bnnflow as bf

ROWS, CHAINS, REPEATS = 1438, (1, 8, 16), 15


class Residual(nn.Module):
    """A perceptron with two skips."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        h = torch.tanh(self.first(x))
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return self.last(h)


class Attention(nn.Module):
    """One layer of a transformer over the rows of an image."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, width), nn.Linear(width, 10)
        self.layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.0, batch_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.last(self.layer(self.first(x)).mean(1))


def convnet() -> nn.Module:
    """Return a network of 1,898 weights."""
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, 10))


def layer_norm(width: int = 32) -> nn.Module:
    """Return a perceptron with LayerNorm."""
    first = [nn.Linear(64, width), nn.LayerNorm(width), nn.ReLU()]
    return nn.Sequential(
        *first,
        nn.Linear(width, width),
        nn.LayerNorm(width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def embedding() -> nn.Module:
    """Return a network over eight of the pixels as words."""
    return nn.Sequential(
        nn.Embedding(17, 4), nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def problems(rows: int) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Return networks, inputs and labels."""
    digits = load_digits()
    images = torch.tensor(digits.images[:rows], dtype=torch.float32) / 16
    words, labels = (16 * images[:, 3]).long(), torch.tensor(digits.target[:rows])
    return {
        "convnet": (convnet(), images.unsqueeze(1), labels),
        "layer norm": (layer_norm(), images.flatten(1), labels),
        "residual": (Residual(), images.flatten(1), labels),
        "embedding": (embedding(), words, labels),
        "attention": (Attention(), images, labels),
    }


def loop(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what a torch user writes first, under a standard normal prior."""
    parameters = list(net.parameters())

    def gradients(theta: Tensor) -> Tensor:
        found = []
        for weights in theta:
            nn.utils.vector_to_parameters(weights, parameters)
            loss = F.cross_entropy(net(x), y, reduction="sum") + 0.5 * sum(
                p.square().sum() for p in parameters
            )
            grads = torch.autograd.grad(loss, parameters)
            found.append(-torch.cat([grad.flatten() for grad in grads]))
        return torch.stack(found)

    return gradients


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--rows", type=int, default=ROWS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    print("network       chains   bnnflow ms   loop ms   ratio")
    for name, (net, x, y) in problems(arguments.rows).items():
        model = bf.BayesianModel(
            net, bf.priors.Normal(1.0), bf.likelihoods.Categorical(), x, y
        )
        plain = loop(net, x, y)
        for chains in CHAINS:
            theta = 0.2 * model.sample_prior(chains, 0)
            ours = torch.no_grad()(
                lambda theta=theta, model=model: model.log_joint_and_grad(theta)[1]
            )
            torch.testing.assert_close(ours(), plain(theta), rtol=1e-3, atol=1e-2)
            best = [float("inf")] * 2
            for _ in range(3 if arguments.quick else REPEATS):
                for i, work in enumerate(
                    (ours, lambda theta=theta, plain=plain: plain(theta))
                ):
                    start = time.process_time()
                    work()
                    best[i] = min(best[i], time.process_time() - start)
            mine, theirs = (1e3 * each / chains for each in best)
            print(
                f"{name:12} {chains:7} {mine:12.2f} {theirs:9.2f} {mine / theirs:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
