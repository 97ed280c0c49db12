"""The drawn structure is the structure: orbits are those of the group, and layers are constant on
them.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from bnnflow import WeightSpec
from bnnflow.equivariant import DWSLayer
from bnnflow.report import plots
from bnnflow.report.weight_plots import pair_orbits


def spec_of(*widths: int, bias: bool = True) -> WeightSpec:
    with torch.random.fork_rng(devices=[]):
        modules: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            modules += [nn.Linear(n_in, n_out, bias=bias), nn.Tanh()]
        return WeightSpec.of(nn.Sequential(*modules[:-1]))


def residual() -> WeightSpec:
    """Two matrices between the same units, one of which has their label twice."""
    shapes = {"a": (3, 2), "square": (3, 3), "out": (1, 3), "kernel": (3, 1, 2)}
    axes = {
        "a": ("h1", None),
        "square": ("h1", "h1"),
        "out": (None, "h1"),
        "kernel": ("h1", None, None),
    }
    activations = spec_of(2, 3, 1).activations
    return WeightSpec(tuple(shapes), shapes, axes, activations)


FORMULA = {
    (2, 3, 4, 3, 2): 164,
    (2, 3, 3, 1): 75,
    (2, 4, 3, 4, 3, 2): 222,
    (3, 4, 2): 100,
    (3, 2): 64,
}


@pytest.mark.parametrize("widths", FORMULA)
def test_number_of_orbits_is_the_dimension_of_equivariant_maps(
    widths: tuple[int, ...],
) -> None:
    assert int(pair_orbits(spec_of(*widths)).max()) + 1 == FORMULA[widths]


@pytest.mark.parametrize(
    "spec", [spec_of(2, 3, 2), spec_of(1, 2, 3, 1, bias=False), residual()], ids=str
)
def test_orbits_are_those_of_the_group(spec: WeightSpec) -> None:
    """Two pairs of weights have one number if and only if a permutation carries one to the
    other.
    """
    orbits = pair_orbits(spec)
    parent = torch.arange(orbits.numel())  # labels of connected components
    moves = []
    for label, width in spec.widths.items():
        for perm in itertools.permutations(range(width)):
            moved = spec.permute(
                torch.arange(spec.dim).double(), {label: torch.tensor(perm)}
            ).long()
            assert torch.equal(orbits[moved][:, moved], orbits)
            moves.append((moved[:, None] * spec.dim + moved).flatten())
    for _ in range(len(spec.widths) + 1):
        for pairs in moves:
            parent = torch.minimum(parent, parent[pairs])
    assert len(parent.unique()) == int(orbits.max()) + 1


def test_an_equivariant_layer_is_constant_on_orbits(seeded) -> None:
    spec = spec_of(2, 3, 4, 3, 2)
    with seeded(0):
        layer = DWSLayer(spec, 1, 1, bias=False).double()
    with torch.no_grad():
        matrix = layer(torch.eye(spec.dim, dtype=torch.float64)[..., None])[..., 0].mT
    orbits = pair_orbits(spec)
    for number in range(int(orbits.max()) + 1):
        entries = matrix[orbits == number]
        torch.testing.assert_close(entries, entries[:1].expand_as(entries))


def test_picture_names_tensors_and_says_what_it_left_out() -> None:
    small = plots.block_structure(spec_of(2, 3, 2))
    assert [tick.get_text() for tick in small.axes[0].get_xticklabels()] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]
    texts = [text.get_text() for text in small.texts]
    assert texts == ["Equivariant linear maps: 74 parameters for 17 x 17 entries"]
    wide = [text.get_text() for text in plots.block_structure(spec_of(30, 16, 16, 2)).texts]
    assert "46 x 46" in wide[0]
    assert "802 weights" in wide[1]
    plots.block_structure(residual())
    with pytest.raises(ValueError, match="hidden unit"):
        plots.block_structure(spec_of(3, 2))
