"""Networks by name: ours, torchvision's, timm's, or what a function of the user's returns."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import import_extra
from lightning_lcnn.conversion import to_low_curvature
from lightning_lcnn.models import resnet18, resnet34, vgg11

OWN: dict[str, Callable[..., nn.Module]] = {"resnet18": resnet18, "resnet34": resnet34, "vgg11": vgg11}
LIBRARIES = {"torchvision": "vision", "timm": "timm"}  # with the extra that brings each

Shape = tuple[int, int, int]


def build_network(
    name: str,
    num_classes: int = 10,
    image_shape: Shape = (3, 32, 32),
    *,
    low_curvature: bool = False,
    beta: float = 10.0,
    gamma: float | None = None,
    max_pool: str = "smooth",
    pretrained: bool = False,
    weights: Mapping[str, Tensor] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return a network by name, standard or low-curvature, with new, pretrained or given weights.

    Args:
        name: ``"resnet18"``, ``"resnet34"`` or ``"vgg11"`` of :mod:`lightning_lcnn.models`; ``"torchvision/NAME"``;
            ``"timm/NAME"``; or ``"module.function"`` for anything that can be imported and returns a module.
        num_classes: Number of outputs; not passed to a function of your own.
        image_shape: (C, H, W) of the images.
        low_curvature: Whether to return the low-curvature form.
        beta: Start of every β.
        gamma: Start of every γ of the batch norms; None: 10, or the layer's own slope if that is larger.
        max_pool: What becomes of max pooling in the low-curvature form, as in
            :func:`~lightning_lcnn.to_low_curvature`.
        pretrained: Whether torchvision or timm downloads trained weights; a head for another number of classes is new.
        weights: State dict to start from, of the standard form (it is converted) or of the low-curvature form.
        arguments: Further arguments of the network's function, such as ``{"width": 16}`` for ours.

    Returns:
        The network, in training mode.

    Raises:
        ImportError: If torchvision or timm is needed and missing.
        ValueError: If the name is unknown, or weights do not fit.

    Source:
        Ours.

    Example:
        >>> build_network("resnet18", 5, (1, 8, 8), low_curvature=True, arguments={"width": 2}).fc.out_features
        5
    """
    given = dict(arguments or {})
    if name in OWN and low_curvature and (weights is None or is_low_curvature(weights)):
        network = _own(name, num_classes, image_shape, given, beta, gamma, max_pool)
    else:
        network = _standard(name, num_classes, image_shape, given, pretrained)
        if weights is not None and not is_low_curvature(weights):
            load_weights(network, weights)
            weights = None
        if low_curvature:
            network = _converted(network, image_shape, beta, gamma, max_pool)
    if weights is not None:
        load_weights(network, weights)
    return network.train()


def is_low_curvature(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict belongs to a low-curvature network: it holds some β."""
    return any(key.endswith("log_beta") for key in weights)


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a state dict; the output layer may have another number of classes and stays new then.

    Args:
        network: Changed in place.
        weights: Its state dict, or that of a module that holds it, of which the rest is ignored.

    Raises:
        ValueError: If names or other shapes differ; the message has some of them.

    Source:
        Ours.
    """
    own = network.state_dict()
    weights = _without_prefix(weights, set(own))
    head = {key for key in list(own)[-2:] if key in weights and weights[key].shape != own[key].shape}
    kept = {key: value for key, value in weights.items() if key not in head}
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    reshaped = [key for key in own if key in kept and kept[key].shape != own[key].shape]
    faults = [
        f"{what} {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}"
        for what, keys in (("no", missing), ("unknown", unexpected), ("another shape of", reshaped))
        if keys
    ]
    if faults:
        form = "low-curvature" if is_low_curvature(own) else "standard"
        raise ValueError(
            f"the weights do not fit the {form} network {type(network).__name__}: {'; '.join(faults)}. Name the "
            "network, its arguments and its form as they were in training."
        )
    network.load_state_dict(kept, strict=not head)


def _without_prefix(weights: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """Weights below the prefix under which most names are found, such as ``network.`` in a LightningModule's."""
    prefixes = {key[: -len(name)] for key in weights for name in names if key == name or key.endswith("." + name)}
    best = max(sorted(prefixes), key=lambda prefix: sum(prefix + name in weights for name in names), default="")
    return {key[len(best) :]: value for key, value in weights.items() if key.startswith(best)}


def known_names() -> list[str]:
    """Names that :func:`build_network` knows, as far as the libraries are installed."""
    names = list(OWN)
    for library in LIBRARIES:
        try:
            names += [f"{library}/{name}" for name in _names_of(library)]
        except ImportError:
            continue
    return names


def _own(
    name: str,
    num_classes: int,
    shape: Shape,
    arguments: dict[str, Any],
    beta: float,
    gamma: float | None,
    max_pool: str,
) -> nn.Module:
    make = OWN[name]
    if "pooling" in inspect.signature(make).parameters:
        arguments.setdefault("pooling", "max" if max_pool == "keep" else max_pool)
    options = {"beta": beta, "gamma": 10.0 if gamma is None else gamma, "in_channels": shape[0]}
    return make(num_classes, low_curvature=True, input_size=tuple(shape[1:]), **(options | arguments))


def _standard(name: str, num_classes: int, shape: Shape, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    library, _, rest = name.partition("/")
    if library in LIBRARIES and rest:
        return _of_library(library, rest, num_classes, shape, arguments, pretrained)
    if pretrained:
        raise ValueError(f"`pretrained` needs a network of torchvision or timm, got {name!r}.")
    if name in OWN:
        return OWN[name](num_classes, in_channels=shape[0], input_size=tuple(shape[1:]), **arguments)
    if "/" in name or "." not in name:
        raise ValueError(unknown_name(name))
    network = _imported(name)(**arguments)
    if not isinstance(network, nn.Module):
        raise TypeError(f"`network` {name!r} must return a torch.nn.Module, got {type(network).__name__}.")
    return network


def unknown_name(name: str) -> str:
    """Message for a network that nobody knows, with names like it."""
    known = known_names()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near += [k for k in known if k.partition("/")[2] == name and k not in near]
    hint = f"did you mean {' or '.join(near[:4])}?" if near else f"ours are {', '.join(OWN)}."
    return (
        f"`network` {name!r} is unknown: {hint} Others are torchvision/NAME, timm/NAME, or the import path of a "
        "function of yours, such as my_module.make_net."
    )


def _of_library(
    library: str, name: str, num_classes: int, shape: Shape, arguments: dict[str, Any], pretrained: bool
) -> nn.Module:
    if name.partition(".")[0] not in _names_of(library):
        raise ValueError(unknown_name(f"{library}/{name}"))
    if library == "timm":
        timm = import_extra("timm", "timm")
        options = {"pretrained": pretrained, "num_classes": num_classes, "in_chans": shape[0]}
        return timm.create_model(name, **(options | arguments))
    make = import_extra("torchvision.models", "vision").get_model
    if not pretrained:
        return make(name, weights=None, **({"num_classes": num_classes} | arguments))
    network = make(name, weights="DEFAULT", **arguments)
    _replace_head(network, num_classes)
    return network


def _replace_head(network: nn.Module, num_classes: int) -> None:
    """Give the last linear layer another number of outputs, if it has not got it."""
    name, head = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)][-1]
    if head.out_features != num_classes:
        parent = network.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], nn.Linear(head.in_features, num_classes))


def _names_of(library: str) -> list[str]:
    if library == "timm":
        return import_extra("timm", "timm").list_models()
    torchvision = import_extra("torchvision.models", "vision")
    return torchvision.list_models(module=torchvision)


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`network` {name!r} cannot be imported: {error}.") from error


def _converted(network: nn.Module, shape: Shape, beta: float, gamma: float | None, max_pool: str) -> nn.Module:
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    example = torch.zeros(1, *shape, device=device)
    return to_low_curvature(network, example, beta=beta, gamma=gamma, max_pool=max_pool)
