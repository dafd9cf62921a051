"""``convert``: a trained network into its low-curvature form."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn

from lightning_lcnn._files import check_writable, written_whole
from lightning_lcnn.checkpoints import IMAGENET, network_file
from lightning_lcnn.classifier import LitClassifier
from lightning_lcnn.cli.options import load, network_options
from lightning_lcnn.conversion import ConversionReport, to_low_curvature
from lightning_lcnn.layers.upkeep import log_betas
from lightning_lcnn.models.by_name import LIBRARIES


def run(options: argparse.Namespace) -> None:
    """Load, convert, write, print the report."""
    output = Path(options.output)
    if output.exists() and output.resolve() == Path(options.source).resolve():
        raise ValueError(f"--output {output} is SOURCE itself; choose another file.")
    if output.is_dir():
        raise IsADirectoryError(f"--output {output} is a folder; name a file in it, such as {output}/converted.ckpt.")
    check_writable(output.parent)
    lit = _standard_classifier(options)
    if lit is None:
        module = load(options).module
        shape = tuple(options.image_shape or (3, 32, 32))
        content: Any
        content, report = _convert(module, shape, options)
    else:
        lit.network, report = _convert(lit.network, lit.image_shape, options)
        lit.low_curvature = True
        form = {"low_curvature": True, "beta": options.beta, "gamma": options.gamma, "max_pool": options.max_pool}
        lit.hparams.update(form)
        content = lightning_checkpoint(lit)
    with written_whole(output) as partial:
        torch.save(content, partial)
    print(report)
    print(f"written to {output}")


def lightning_checkpoint(lit: LitClassifier) -> dict[str, Any]:
    """A checkpoint as a Trainer would write it before the first step, without optimizers."""
    checkpoint = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": lit.state_dict(),
        "hparams_name": "kwargs",
        "hyper_parameters": dict(lit.hparams),
    }
    lit.on_save_checkpoint(checkpoint)
    return checkpoint


def _standard_classifier(options: argparse.Namespace) -> LitClassifier | None:
    """SOURCE as a LitClassifier, where it is or can be one."""
    described = network_options(options)
    given: dict[str, Any] = {"network_args": described.pop("arguments", None), **described}
    given |= {key: value for key, value in (("mean", options.mean), ("std", options.std)) if value is not None}
    if options.source.partition("/")[0] in LIBRARIES and not Path(options.source).exists():
        defaults: dict[str, Any] = {
            "image_shape": (3, 224, 224),
            "num_classes": 1000,
            "mean": IMAGENET[0],
            "std": IMAGENET[1],
        }
        return LitClassifier(options.source, **(defaults | given), pretrained=True)
    if options.network is not None:
        return LitClassifier(options.network, **given, weights=str(network_file(Path(options.source))))
    return load(options).lit


def _convert(
    network: nn.Module, shape: Sequence[int], options: argparse.Namespace
) -> tuple[nn.Module, ConversionReport]:
    if log_betas(network):
        raise ValueError(f"{options.source} is low-curvature already.")
    return to_low_curvature(
        network,
        torch.zeros(1, *shape),
        beta=options.beta,
        gamma=options.gamma,
        max_pool=options.max_pool,
        return_report=True,
    )
