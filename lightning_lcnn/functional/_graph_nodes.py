"""What the operations in an autograd graph can be differentiated for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Starts of the names of autograd nodes whose functions have corners.
_KINKS: tuple[str, ...] = (
    *("Relu", "Threshold", "LeakyRelu", "Prelu", "Rrelu", "Hardtanh", "Hardswish", "Hardsigmoid", "Softshrink"),
    *("Hardshrink", "MaxPool", "AdaptiveMaxPool", "FractionalMaxPool", "CudnnConvolutionRelu"),
)


def graph_nodes(values: Tensor) -> list[Any]:
    """All operations in the graph of ``values``."""
    nodes: dict[Any, None] = {}
    stack: list[Any] = [values.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes[node] = None
            stack.extend(parent for parent, _ in node.next_functions)
    return list(nodes)


def kinks_of(nodes: Iterable[Any]) -> list[str]:
    """Sorted names of the operations with corners.

    Example:
        >>> kinks_of(graph_nodes(torch.ones(1, requires_grad=True).relu()))
        ['Relu']
    """
    return sorted({node.name().split("Backward")[0] for node in nodes if node.name().startswith(_KINKS)})


def is_once_differentiable(node: Any) -> bool:
    """Torch raises for these only where the incoming gradient depends on x, and gives zeros otherwise."""
    if node.name().startswith("CompiledFunction"):  # torch.compile
        return True
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(getattr(backward, "__code__", None), "co_filename", "") == torch.autograd.function.__file__
