"""From a checkpoint, a run folder or a name to a classifier that can be measured."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lcnn._compat import class_path_of
from lightning_lcnn._files import read_checkpoint, read_json, weights_of
from lightning_lcnn.classifier import MARK, LitClassifier
from lightning_lcnn.models.by_name import LIBRARIES, build_network, is_low_curvature, known_names
from lightning_lcnn.models.from_file import Source, check_class_path, classifier_settings, users_settings
from lightning_lcnn.models.normalize import Normalize

RUN_FILES = ("network.pt", "checkpoints/last.ckpt", "last.ckpt")
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_PLACE = f"{LitClassifier.__module__}.{LitClassifier.__qualname__}"


@dataclass(frozen=True, eq=False)
class LoadedClassifier:
    """A classifier and where it comes from."""

    module: nn.Module  # images in [0, 1] (B, C, H, W) to logits (B, K), in evaluation mode
    name: str  # for tables: the run folder's, the file's, or the given name
    file: Path | None  # of the weights; None for downloaded ones
    lit: LitClassifier | None  # where the checkpoint is one of ours


def load_classifier(
    source: str | Path,
    *,
    trust: bool = False,
    model: str | None = None,
    network: str | None = None,
    normalize: tuple[float | list[float], float | list[float]] | None = None,
    **options: Any,
) -> LoadedClassifier:
    """Load whatever holds a trained classifier.

    Args:
        source: A checkpoint of :class:`LitClassifier`; a checkpoint of your own LightningModule (with ``model``); a
            file of ``torch.save(module)`` (with ``trust``); weights (with ``network``); a run folder with one of
            these; or ``"torchvision/NAME"`` or ``"timm/NAME"`` for downloaded weights.
        trust: Whether to load pickled objects, which runs code from the file.
        model: Import path of the LightningModule that wrote the checkpoint, such as ``"my_module.LitNet"``.
        network: Name as for :func:`~lightning_lcnn.models.by_name.build_network`, for a file that holds weights.
        normalize: Mean and standard deviation to put in front of a network that has no normalisation of its own.
        options: Further arguments of :func:`~lightning_lcnn.models.by_name.build_network`, with ``network`` or a name.

    Returns:
        A :class:`LoadedClassifier`.

    Raises:
        FileNotFoundError: If there is no such file, or a run folder has no network.
        ValueError: If the file needs ``trust``, ``model`` or ``network``, is damaged, or does not fit them.

    Source:
        Ours.
    """
    name = str(source)
    if name.partition("/")[0] in LIBRARIES and not Path(name).exists():
        described: dict[str, Any] = {"num_classes": 1000, "image_shape": (3, 224, 224), **options}
        pretrained = build_network(name, pretrained=True, **described)
        return _loaded(pretrained, name, None, normalize or _statistics(pretrained))
    file = network_file(Path(source))
    if not file.exists() and not file.suffix:
        raise FileNotFoundError(f"there is no file {file}.{_name_hint(str(source))}")
    name = Path(source).resolve().name if Path(source).is_dir() else file.stem
    content = read_checkpoint(file, trust)
    if network is not None:
        weights = weights_of(content, file)
        low_curvature = options.pop("low_curvature", None)
        options["low_curvature"] = is_low_curvature(weights) if low_curvature is None else low_curvature
        return _loaded(build_network(network, weights=weights, **options), name, file, normalize)
    if isinstance(content, nn.Module):
        return _loaded(content, name, file, normalize)
    written_by = class_of(content)
    if written_by is None:
        raise ValueError(f"{file} holds weights and no network; name it with --network (network=...).")
    if model is None and written_by == _PLACE:
        lit = lit_classifier(content, file, trust)
        return LoadedClassifier(lit.classifier(), name, file, lit)
    if model is None:
        of_class = f", {written_by}" if written_by else ""
        raise ValueError(
            f"{file} is a checkpoint of another LightningModule{of_class}; name its class with --model "
            "my_module.LitNet (model=...)."
        )
    if written_by == _PLACE and import_class(model) is not LitClassifier:
        raise ValueError(f"{file} is a checkpoint of LitClassifier and not of {model}; leave out --model (model=...).")
    return _loaded(_users_module(model, content, file, trust), name, file, normalize)


def _name_hint(name: str) -> str:
    """How to write the name of a network, which this may have been meant to be."""
    if "/" in name:
        return ""
    known = [full for full in known_names() if "/" in full]
    close = difflib.get_close_matches(name, {full.partition("/")[2] for full in known}, n=1)
    near = [full for full in known if full.partition("/")[2] in close]
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{meant} Networks of libraries are written torchvision/NAME or timm/NAME."


def network_file(source: Path) -> Path:
    """The file itself, or the one of a run folder that holds its network or that its ``run.json`` names."""
    if not source.is_dir():
        return source
    found = [source / file for file in RUN_FILES if (source / file).is_file()]
    found += sorted(source.glob("**/*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    named = read_about(source).get("checkpoint")
    found += [Path(named)] if isinstance(named, str) else []
    if not found:
        raise FileNotFoundError(f"{source} holds no network: expected {' or '.join(RUN_FILES)}.")
    return found[0]


def read_about(run: Path) -> dict[str, Any]:
    """What ``run.json`` of a run folder says; {} without one."""
    file = run / "run.json"
    about = read_json(file) if file.is_file() else {}
    if not isinstance(about, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(about).__name__}.")
    return about


def lit_classifier(content: Mapping[str, Any], file: Path, trust: bool) -> LitClassifier:
    """The module of a checkpoint that a `LitClassifier` wrote, without running code that the file names."""
    if trust:
        known = set(inspect.signature(LitClassifier).parameters) - {"penalties", "metrics", "weights", "pretrained"}
        given = {key: value for key, value in content.get("hyper_parameters", {}).items() if key in known}
    else:
        given = classifier_settings(content, Source(file))
    try:
        lit = LitClassifier(**given)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{file} does not describe a network: {' '.join(str(error).split())[:300]}") from error
    weights = weights_of(content, file)
    try:
        lit.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit its own hyperparameters: {error}") from error
    missing = set(lit.network.state_dict()) - {key.removeprefix("network.") for key in weights}
    if missing:
        raise ValueError(f"{file} does not fit its own hyperparameters: it lacks {', '.join(sorted(missing)[:3])}.")
    return lit.eval()


def device_of(name: str) -> torch.device:
    """A device by name; "auto" is CUDA where there is one, and else the CPU.

    Raises:
        ValueError: If there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def import_class(path: str) -> Any:
    """What ``"module.Class"`` names; raises ``ValueError`` where it cannot be imported."""
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"{path!r} cannot be imported: name it with its module, such as my_module.{name}.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}.") from error


def _users_module(path: str, content: Any, file: Path, trust: bool) -> nn.Module:
    cls = import_class(path)
    if not (isinstance(cls, type) and hasattr(cls, "load_from_checkpoint")):
        raise ValueError(f"`model` must name a LightningModule, got {path}, which is none.")
    options: dict[str, Any] = {}
    if not trust:
        source = Source(file, named="a class that builds it by itself")
        if issubclass(cls, LitClassifier):
            classifier_settings(content, source, further=cls is not LitClassifier)
        else:
            users_settings(content, source)
        check_class_path(content, cls, source)
    if "weights_only" in inspect.signature(cls.load_from_checkpoint).parameters:
        options["weights_only"] = not trust
    try:
        return cls.load_from_checkpoint(file, map_location="cpu", **options)
    except (RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file} is no checkpoint of {path}: {reason}") from error


def class_of(content: Any) -> str | None:
    """Import path of the LightningModule that wrote a checkpoint, "" if it does not say, None for anything else."""
    if not isinstance(content, Mapping) or "state_dict" not in content:
        return None
    mark, settings = content.get(MARK), content.get("hyper_parameters")
    if isinstance(mark, Mapping):
        return str(mark.get("class", ""))
    if "pytorch-lightning_version" not in content:
        return None
    return class_path_of(settings) if isinstance(settings, Mapping) else ""


def _loaded(network: nn.Module, name: str, file: Path | None, normalize: Any) -> LoadedClassifier:
    module = network if normalize is None else nn.Sequential(Normalize(*normalize), network)
    return LoadedClassifier(module.eval(), name, file, None)


def _statistics(network: nn.Module) -> tuple[list[float], list[float]]:
    """Normalisation that pretrained weights expect: timm's own, or that of ImageNet."""
    own = getattr(network, "pretrained_cfg", {})
    return list(own.get("mean", IMAGENET[0])), list(own.get("std", IMAGENET[1]))
