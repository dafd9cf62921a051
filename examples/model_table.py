"""What conversion, training, bounds, folding and export do on the networks of torchvision and timm.

    python examples/model_table.py [NAME ...] [--full-size] [--write docs/models.md]

Every network has random weights and batch-norm statistics from random images; nothing is downloaded. Without names all
small networks are examined (a minute), with ``--full-size`` the originals, which are converted only (ten minutes).
``--write`` replaces the table of a page, which stands between two comments.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from model_zoo import SMALL, Case, full_size
from torch import Tensor, nn

from lightning_lcnn import fold, lcnn_parameter_groups, to_low_curvature
from lightning_lcnn.bounds import network_bound, trace
from lightning_lcnn.conversion import ConversionReport
from lightning_lcnn.functional import normalized_curvature
from lightning_lcnn.layers import update_spectral_norm
from lightning_lcnn.penalties import CurvaturePenalty

LABELS = torch.tensor([1, 2])
LARGE_BETA = 1e9  # in float64 no further from the original than rounding
COLUMNS = ("model", "layers", "norms", "activations", "left alone", "penalty", "bound")


class NotFulfilledError(Exception):
    """A network does not do what the page says of all."""


@dataclass(frozen=True)
class Row:
    """What was found of one network."""

    name: str
    layers: int  # linear layers and convolutions that were converted
    norms: int
    activations: int
    left: str  # classes with parameters that were left alone, without the output layer
    penalty: str  # mode of the CurvaturePenalty that a training step took
    bound: str
    error: float  # relative difference to the original at large β
    seconds: float

    def cells(self) -> tuple[str, ...]:
        """As in :data:`COLUMNS`."""
        counts = (str(self.layers), str(self.norms), str(self.activations))
        return (self.name, *counts, self.left or "–", self.penalty, self.bound)


def calibrated(case: Case) -> nn.Module:
    """The network with weights that all matter and batch-norm statistics of data, in evaluation mode.

    Many start at or near zero (layer scales of 1e-6, a last weight of 0), where a wrong branch changes nothing.
    """
    torch.manual_seed(0)
    model = case.build()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=(len(parameter) / parameter.numel()) ** 0.5)
        elif parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, case.size, case.size))
    return model.eval()


def examine(case: Case, whole: bool = True) -> Row:
    """Convert a network, train it for one step, bound, fold and export it.

    Args:
        case: What to examine.
        whole: Whether to bound and export it, too, which takes long for large networks.

    Raises:
        NotFulfilledError: If outputs change or are not finite.
    """
    start = time.process_time()
    model = calibrated(case)
    images = torch.randn(2, 3, case.size, case.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinks that are left
        error = conversion_error(model, images)
        network, report = to_low_curvature(model, images, max_pool="smooth", return_report=True)
    penalty = train_step(network, images, everywhere=whole)
    network.eval()
    if whole:
        bound = bound_in_words(network, images)
        check_export(case, network, images)
    else:
        check_close(fold(network)(images), network(images), 1e-4, "folding")
        bound = traced_in_words(network)
    kinds = Counter(_kind(row.after) for row in report.changed)
    counts = (kinds["layer"], kinds["norm"], kinds["activation"])
    return Row(case.family, *counts, _left(report), penalty, bound, error, time.process_time() - start)


def conversion_error(model: nn.Module, images: Tensor) -> float:
    """Relative difference to the original at large β, in float64."""
    model, images = model.double(), images.double()
    converted = to_low_curvature(model, images, beta=LARGE_BETA, max_pool="smooth")
    with torch.no_grad():
        expected = model(images)
        error = difference(converted(images), expected)
    model.float()
    if not error < 1e-5:
        raise NotFulfilledError(f"conversion changes the output by {error:.1e}")
    return error


def train_step(network: nn.Module, images: Tensor, everywhere: bool) -> str:
    """One step of SGD on cross-entropy and the penalty; the mode that the penalty has a graph for.

    ``everywhere``: whether no gradient may be zero. In a network of a hundred layers the penalty's softmax gives the
    first ones a weight below float32's smallest.
    """
    network.train()
    optimizer = torch.optim.SGD(lcnn_parameter_groups(network), lr=0.01)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    penalty, mode = CurvaturePenalty(), "bound"
    try:
        value = penalty(network)
    except ValueError:
        penalty, mode = CurvaturePenalty(mode="sum_log"), "sum_log"
        value = penalty(network)
    value.backward()
    check_gradients(network, "log_beta", "the penalty", everywhere)
    loss = F.cross_entropy(network(images), LABELS)
    loss.backward()
    check_gradients(network, "", "the loss", everywhere)
    optimizer.step()
    update_spectral_norm(network)
    still = [name for name, parameter in network.named_parameters() if torch.equal(parameter, before[name])]
    if len(still) > 0.3 * len(before):  # batch norms have slopes that no γ clips, and biases that the next one removes
        raise NotFulfilledError(f"the step moves no {still[0]}, and {len(still) - 1} others")
    if not (loss.isfinite() and penalty(network).isfinite()):
        raise NotFulfilledError("the loss or the penalty after the step is not finite")
    return mode


def check_gradients(network: nn.Module, suffix: str, source: str, everywhere: bool) -> None:
    """Raise unless the parameters of this name have finite gradients, not zero but for γ and large networks."""
    zero = []
    named = [(name, parameter.grad) for name, parameter in network.named_parameters() if name.endswith(suffix)]
    for name, gradient in named:
        if gradient is None or not gradient.isfinite().all():
            raise NotFulfilledError(f"{source} has no finite gradient in {name}")
        if not (name.endswith("log_gamma") or gradient.any()):
            zero.append(name)
    if zero and (everywhere or len(zero) == len(named)):
        raise NotFulfilledError(f"{source} has the gradient zero in {zero[0]}")


def bound_in_words(network: nn.Module, images: Tensor) -> str:
    """Finite, infinite or refused, with the first reason; measurements must not exceed it."""
    measured = normalized_curvature(network, images, LABELS, output="logit", num_hvps=4)
    if not (measured.values.isfinite().all() and (measured.values > 0).all()):
        raise NotFulfilledError(f"the measured curvature is {measured.values.tolist()}")
    try:
        bound = network_bound(network, images)
    except ValueError as error:
        return _refusal(str(error))
    if not (measured.gradient_norm.max() <= bound.slope and measured.hessian.values.max() <= bound.curvature):
        raise NotFulfilledError("a measured slope or curvature exceeds its bound")
    if bound.curvature < float("inf"):
        return "finite"
    return f"infinite: {bound.reasons[0]}" if bound.reasons else "beyond float64"


def traced_in_words(network: nn.Module) -> str:
    """What the graph alone tells."""
    try:
        trace(network)
    except ValueError as error:
        return _refusal(str(error))
    return "traced"


def _refusal(message: str) -> str:
    place = re.search(r"(?:at `(\w+)` in the forward of )?module '([^']*)'", message)
    operation, path = place.groups() if place else (None, None)
    if "cannot be traced" in message:
        what = "not traced"
    elif "ttention multiplies" in message:
        what = "attention"
    elif "product of two" in message:
        what = "gate"
    else:
        what = f"`{operation}`" if operation else message.split(": ", 1)[1].split(". ")[0]
    return f"refused: {what}" + (f" in `{path}`" if path else "")


def check_export(case: Case, network: nn.Module, images: Tensor) -> None:
    """Fold and export: the same outputs."""
    folded = fold(network)
    with torch.no_grad():
        expected = network(images)
        check_close(folded(images), expected, 1e-4, "folding")
        exported = torch.export.export(folded, (images,)).module()
        check_close(exported(images), expected, 1e-4, "torch.export")
    if case.onnx:
        import onnx.reference

        program = torch.onnx.export(folded, (images,), dynamo=True, verbose=False)
        session = onnx.reference.ReferenceEvaluator(program.model_proto)
        (result,) = session.run(None, {session.input_names[0]: images.numpy()})
        check_close(torch.from_numpy(result), expected, 1e-3, "ONNX")


def check_close(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise unless the relative difference is small."""
    error = difference(got, expected)
    if not error < tolerance:
        raise NotFulfilledError(f"{what} changes the output by {error:.1e}")


def difference(got: Tensor, expected: Tensor) -> float:
    """Relative to what the images change: a constant output would hide everything."""
    return float(((got - expected).norm() / (expected - expected.mean(0)).norm()).detach())


def _kind(name: str) -> str:
    if name.startswith("Spectral"):
        return "layer"
    return "norm" if name.startswith("Lipschitz") else "pooling" if "Pool" in name else "activation"


def _left(report: ConversionReport) -> str:
    kept = Counter()
    for row in report.kept:
        container = row.reason == "holds parameters of its own" and not re.search("Attention|Norm", row.what)
        part_of_attention = row.what == "NonDynamicallyQuantizableLinear"
        if not (container or part_of_attention or row.reason == "smooth already" or "output" in row.reason):
            kept[re.sub(r" at .*", "", row.what)] += 1
    return ", ".join(f"{count} {name}" for name, count in kept.items())


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write(page: Path, mark: str, text: str) -> None:
    """Replace what stands between the comments of this mark."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def _is_named(case: Case, names: list[str]) -> bool:
    return not names or any(name in case.family for name in names)


def main() -> None:
    """Examine the networks of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="as in the table; all by default")
    parser.add_argument("--full-size", action="store_true", help="the originals, without bound and export")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page whose table to replace")
    options = parser.parse_args()
    mark = "full size" if options.full_size else "small"
    if options.write and (options.names or f"<!-- {mark} -->" not in options.write.read_text()):
        parser.error(f"--write replaces the whole table, between <!-- {mark} --> and <!-- end of {mark} -->")
    cases = [case for case in (full_size() if options.full_size else SMALL) if _is_named(case, options.names)]
    if not cases:
        parser.error(f"no network is called {' or '.join(options.names)}")
    rows = []
    for case in cases:
        rows.append(examine(case, whole=not options.full_size))
        print(f"{rows[-1].seconds:5.1f} s  {rows[-1].error:.0e}  " + "  ".join(rows[-1].cells()), flush=True)
    if options.write:
        write(options.write, mark, table(rows))


if __name__ == "__main__":
    main()
