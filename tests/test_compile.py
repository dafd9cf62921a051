"""A whole low-curvature network under torch.compile: one graph, eager's numbers and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lcnn.layers import update_spectral_norm
from lightning_lcnn.models import resnet18


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_network_has_one_graph_and_the_gradients_of_eager(memory_format) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    # γ = 2 clips some of the batch norms; float64, because 17 batch norms of few values amplify rounding
    eager = resnet18(5, width=4, low_curvature=True, gamma=2.0, input_size=(8, 8)).double()
    eager = eager.to(memory_format=memory_format)
    module = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    for _ in range(3):
        values = [network(x) for network in (eager, compiled)]
        torch.testing.assert_close(values[1], values[0])
        for value in values:
            value.square().sum().backward()
        for (name, a), b in zip(module.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
        for network in (eager, module):
            network.zero_grad()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.mul_(0.99)
            update_spectral_norm(network)
    assert counter.frame_count == 1
    for a, b in zip(module.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)
