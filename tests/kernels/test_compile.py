"""Networks and LightningModules under torch.compile: one graph, eager's numbers and gradients, no recompilation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lcnn.callbacks import PowerIteration
from lightning_lcnn.layers import update_spectral_norm
from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.models import resnet18
from tests.lightning_helpers import COMPILER_WARNINGS, FILTERS, loader, plain_classifier, trainer

pytestmark = FILTERS
Plain = plain_classifier()


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


class Low(LCNNMixin, Plain):
    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch)


def losses(compiling: bool, seen: list[list[int]]) -> tuple[list[float], list[int]]:
    """Losses of eight steps with a refresh before every third, and how many functions had been compiled after each."""
    values: list[float] = []
    counts: list[int] = []

    class Watch(PowerIteration):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            values.append(float(outputs["loss"]))
            counts.append(torch._dynamo.utils.counters["frames"]["total"])

    def backend(graph: Any, example_inputs: Any) -> Any:
        nodes = [str(node.target) for node in graph.graph.nodes]
        # rsqrt: of batch norm
        seen.append([sum(word in name for name in nodes) for word in ("conv2d", "linear", "rsqrt")])
        return graph.forward

    module = Low()
    runner = trainer(callbacks=[Watch(every_n_steps=3)], log_every_n_steps=50)
    runner.fit(torch.compile(module, backend=backend) if compiling else module, loader(32))
    return values, counts


@COMPILER_WARNINGS
def test_compiled_lightning_module_has_the_network_in_one_graph_and_is_compiled_once() -> None:
    torch.compiler.reset()
    seen: list[list[int]] = []
    eager, _ = losses(False, seen)
    assert not seen
    compiled, counts = losses(True, seen)
    assert compiled == pytest.approx(eager, rel=1e-5)  # float32; the traced softplus is composed of other operations
    assert counts[0] > 0
    assert counts == counts[:1] * 8
    assert [graph for graph in seen if any(graph)] == [[1, 2, 1]]
