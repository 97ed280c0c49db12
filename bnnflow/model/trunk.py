"""Networks in two: a trunk of constants, whose features are computed once, and a head to be
inferred.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from bnnflow.weights import free_parameters

__all__ = ["Parts", "features", "split"]

_ROWS = 256  # that go through a trunk together


class Parts(NamedTuple):
    """A network as head(trunk(x))."""

    trunk: nn.Module  # without a free parameter
    head: nn.Module  # with all of them, under their names


def split(net: nn.Module) -> Parts | None:
    """Cut a network where its first free parameter comes in.

    Returns None where there is nothing to cut off: no parameter is constant, the network cannot be
    traced by `torch.fx`, or what does not depend on free parameters meets the rest in more than one
    place.
    """
    if all(parameter.requires_grad for parameter in net.parameters()):
        return None
    tensors = (*net.parameters(), *net.buffers())
    # tracing may change it
    alike = copy.deepcopy(net, {id(each): each for each in tensors})
    try:
        graph = fx.symbolic_trace(alike).graph
    except Exception:  # whatever a forward does with a proxy: it is computed whole
        return None
    constant = _constant_nodes(alike, graph)
    cuts = [
        node
        for node in constant
        if node.op != "get_attr" and any(user not in constant for user in node.users)
    ]
    if len(cuts) != 1 or cuts[0].op == "placeholder":
        return None
    return Parts(
        _up_to(alike, graph, cuts[0], constant), _from(alike, graph, cuts[0], constant)
    )


def features(trunk: nn.Module, x: Tensor) -> Tensor:
    """Return what a trunk makes of inputs, some rows at a time."""
    with torch.no_grad():
        return torch.cat([trunk(rows) for rows in x.split(_ROWS)])


def _constant_nodes(net: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Return the operations on which no free parameter has an influence."""
    free, found = free_parameters(net), set()
    for node in graph.nodes:
        own = node.op == "output"
        if node.op == "get_attr":
            own = node.target in free
        elif node.op == "call_module":
            module = net.get_submodule(str(node.target))
            own = any(parameter.requires_grad for parameter in module.parameters())
        if not own and all(given in found for given in node.all_input_nodes):
            found.add(node)
    return found


def _up_to(
    net: nn.Module, graph: fx.Graph, cut: fx.Node, constant: set[fx.Node]
) -> nn.Module:
    part, copies = fx.Graph(), {}
    for node in graph.nodes:
        if node in constant:
            copies[node] = part.node_copy(node, lambda given: copies[given])
        if node is cut:
            break
    part.output(copies[cut])
    return _module(net, part)


def _from(
    net: nn.Module, graph: fx.Graph, cut: fx.Node, constant: set[fx.Node]
) -> nn.Module:
    part = fx.Graph()
    copies = {cut: part.placeholder("features")}
    for node in graph.nodes:
        if node not in constant or node.op == "get_attr":
            copies[node] = part.node_copy(node, lambda given: copies[given])
    return _module(net, part)


def _module(net: nn.Module, part: fx.Graph) -> nn.Module:
    module = fx.GraphModule(net, part)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
