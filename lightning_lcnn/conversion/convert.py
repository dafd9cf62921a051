"""Conversion of any network into its low-curvature form."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, TypeVar, overload

from torch import Tensor, nn

from lightning_lcnn.conversion.decide import Change, ConversionReport, Decisions, Kept
from lightning_lcnn.conversion.expand import Place, expand
from lightning_lcnn.conversion.options import POOLING_KEPT, SKIPPED, Options, check_input, check_model, checked_skip
from lightning_lcnn.conversion.tree import is_ours
from lightning_lcnn.functional.bends import MAX_POOLINGS
from lightning_lcnn.recording.run import Kink, record_run

ModelT = TypeVar("ModelT", bound=nn.Module)
_POOLED = frozenset(name for bend in MAX_POOLINGS for name in bend.aten)
Skip = Iterable[str | type[nn.Module]]


@overload
def to_low_curvature(
    model: ModelT,
    example_input: Tensor,
    *,
    beta: float = ...,
    gamma: float | None = ...,
    max_pool: str = ...,
    skip: Skip = ...,
    spectral: bool = ...,
    output_layer: bool = ...,
    activations: Collection[type[nn.Module]] = ...,
    separate_activations: bool = ...,
    return_report: Literal[False] = ...,
) -> ModelT: ...


@overload
def to_low_curvature(
    model: ModelT,
    example_input: Tensor,
    *,
    beta: float = ...,
    gamma: float | None = ...,
    max_pool: str = ...,
    skip: Skip = ...,
    spectral: bool = ...,
    output_layer: bool = ...,
    activations: Collection[type[nn.Module]] = ...,
    separate_activations: bool = ...,
    return_report: Literal[True],
) -> tuple[ModelT, ConversionReport]: ...


def to_low_curvature(
    model: nn.Module,
    example_input: Tensor,
    *,
    beta: float = 10.0,
    gamma: float | None = None,
    max_pool: str = "keep",
    skip: Skip = (),
    spectral: bool = True,
    output_layer: bool = False,
    activations: Collection[type[nn.Module]] = (),
    separate_activations: bool = False,
    return_report: bool = False,
) -> nn.Module | tuple[nn.Module, ConversionReport]:
    """Return a low-curvature copy of a network, with its weights; for β → ∞ it computes the same function.

    ReLU becomes :class:`~lightning_lcnn.layers.CenteredSoftplus`; LeakyReLU, ReLU6, Hardtanh, Hardsigmoid and
    Softshrink :class:`~lightning_lcnn.layers.PiecewiseSoftplus`; Hardswish, PReLU, SELU and ELU with α ≠ 1 their smooth
    forms of those names. SiLU, GELU, Mish, CELU, ELU and Softplus have no kink and become
    :class:`~lightning_lcnn.layers.ScaledActivation`, whose own β starts at 1, where it is the same function. Batch
    norms become :class:`~lightning_lcnn.layers.LipschitzBatchNorm1d` and so on, convolutions and inner linear layers
    :class:`~lightning_lcnn.layers.SpectralConv2d`, :class:`~lightning_lcnn.layers.SpectralLinear` and so on. The scale
    σ of a layer goes into the running statistics of the batch norm behind it, if that gets all of its output, and else
    into a learnable gain.

    The example input is run through copies of the model in evaluation mode, to see the sizes and where every
    tensor goes. ``F.relu`` and the like inside a ``forward`` become child modules by an edit of its source; the
    class stays a subclass of the user's. The copy is kept only if its output is the same. timm's own forms of torch's
    layers become those, its ``BatchNormAct2d`` a sequence (its weights get ``norm.`` before their names).
    Classes are matched exactly. What is left alone: activations that bound their output (Sigmoid, Tanh, ...), all
    that has no counterpart, such as layer norm and attention, and what the example input does not reach. Tied
    weights stay tied, and a module that is used twice stays one module with one β; hooks, flags and frozen
    parameters are taken over.

    Args:
        model: Any module, pretrained or not; not changed. Inside a LightningModule convert the network,
            ``self.model = to_low_curvature(self.model, x)``, or the LightningModule if it is its own network.
        example_input: One batch as in training, of any batch size, on the device of the model.
        beta: Start of every β but those of the scaled activations. At 10 accuracy is that of ReLU and curvature about
            a tenth (ours).
        gamma: Start of every γ of the batch norms, which clips those of larger slope; ``None``: 10, or the
            layer's own slope if that is larger, so that nothing is clipped at the start.
        max_pool: ``"keep"`` leaves max pooling, whose curvature is infinite; ``"smooth"`` takes log-mean-exp of
            temperature 1/β; ``"average"`` takes average pooling, another function, which wants fine-tuning.
        skip: Paths of modules (with all that they contain) or classes to leave alone.
        spectral: Whether to convert convolutions and linear layers.
        output_layer: Whether to convert a layer whose output is the model's, too. No activation follows it, so it adds
            no curvature; as a spectral layer it would have its scale in a gain that weight decay does not reach, and
            in our trials one run in four then did not train at a learning rate of 0.1.
        activations: Further classes of activations to turn into ``CenteredSoftplus`` even though that is another
            function, for example ``(nn.SiLU,)``.
        separate_activations: Whether an activation module that is called several times in one method, as in
            torchvision's residual blocks, becomes several, each with its own β.
        return_report: Whether to return a :class:`ConversionReport` too.

    Returns:
        The converted copy, or the pair of it and the report.

    Raises:
        TypeError: If ``model`` is no module, ``example_input`` no tensor, or an option has the wrong type.
        ValueError: If the model does not accept ``example_input``, has nothing to convert, or relies on
            activations that write into their input; or if an option is out of range.

    Warns:
        UserWarning: Once, if kinks are left that were not asked for.

    Source:
        Ours; the layers are those of the LCNN paper.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> smooth, report = to_low_curvature(net, torch.randn(5, 4), beta=5.0, return_report=True)
        >>> [type(layer).__name__ for layer in smooth]
        ['SpectralLinear', 'LipschitzBatchNorm1d', 'CenteredSoftplus', 'Linear']
        >>> report.changed[2].note
        'β 5'
    """
    check_model(model)
    options = Options(
        beta=beta,
        gamma=gamma,
        max_pool=max_pool,
        skip=checked_skip(skip, model),
        spectral=spectral,
        output_layer=output_layer,
        activations=tuple(activations),
        separate_activations=separate_activations,
    )
    check_input(example_input, model)
    expanded, record, reasons = expand(model, example_input, options)
    decisions = Decisions(expanded, record, options)
    converted = decisions.apply()
    rows = [decisions.rows[name] for name in decisions.modules if name in decisions.rows]
    rows += _remaining_kinks(converted, example_input, options, decisions.rows, reasons)
    report = ConversionReport(
        changed=tuple(row for row in rows if isinstance(row, Change)),
        kept=tuple(row for row in rows if isinstance(row, Kept)),
    )
    if not report.changed:
        raise ValueError(
            f"`model` ({type(model).__name__}) has nothing to convert: no activation, batch norm, convolution or "
            f"linear layer of a known class that the example input reaches.\n{report}"
        )
    _warn(report)
    return (converted, report) if return_report else converted


def _remaining_kinks(
    model: nn.Module,
    example_input: Tensor,
    options: Options,
    rows: Mapping[str, Change | Kept],
    reasons: dict[Place, str],
) -> list[Kept]:
    """Return the non-smooth operations that the converted model still runs and no row of a module tells of."""
    told = {name for name, row in rows.items() if isinstance(row, Kept) and not row.smooth}
    found: dict[tuple[str, str], Kept] = {}
    for kink in record_run(model, example_input).kinks:
        owner = model.get_submodule(kink.owner)
        if is_ours(owner) or kink.owner in told:
            continue
        what = f"{kink.operation} at {kink.place()}"
        reason = _why_kink(kink, reasons)
        if kink.operation in _POOLED and options.max_pool == "keep":
            reason = POOLING_KEPT
        if options.skips(kink.owner, owner):
            reason = SKIPPED
        found[kink.owner, what] = Kept(kink.owner, what, reason, smooth=False)
    return list(found.values())


def _why_kink(kink: Kink, reasons: dict[Place, str]) -> str:
    if kink.code is not None and (kink.owner, kink.code) in reasons:
        return f"functional call, {reasons[kink.owner, kink.code]}; use a module"
    if kink.code is not None and not kink.on_owner:
        return f"functional call in `{kink.code.co_name}`, which is no method of the module; use a module"
    return "functional call without a counterpart"


def _warn(report: ConversionReport) -> None:
    kinks = [
        f"{row.name} ({row.what}): {row.reason}" for row in report.kinks if row.reason not in (SKIPPED, POOLING_KEPT)
    ]
    if kinks:
        more = f"\n  and {len(kinks) - 5} more" if len(kinks) > 5 else ""
        warnings.warn(
            f"to_low_curvature left {len(kinks)} operation(s) with kinks, where curvature stays infinite:\n  "
            + "\n  ".join(kinks[:5])
            + f"{more}\nreturn_report=True gives the whole table; `skip` silences what is meant to stay.",
            stacklevel=3,
        )
