"""What a file may ask for: checked against what this package itself writes, before anything is built or imported.

A checkpoint of tensors and plain values runs no code when it is read, but its hyperparameters choose what is built from
it. So they are a list of what is allowed, not of what is forbidden: a library can learn a new dangerous argument.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_lcnn._compat import CLASS_PATH, INSTANTIATOR
from lightning_lcnn.models.by_name import LIBRARIES, OWN

# Arguments of networks of the libraries that a file may give: sizes, rates and switches, which neither read nor fetch
# anything. Whatever else someone trains with is given again by the user, or trusted.
ARGUMENTS = {
    "torchvision": "attention_dropout aux_logits bn_size drop_rate dropout groups hidden_dim image_size "
    "init_weights memory_efficient mlp_dim mlp_ratio num_heads num_layers patch_size "
    "stochastic_depth_prob transform_input width_mult width_per_group window_size zero_init_residual",
    "timm": "act_layer attn_drop_rate base_width bn_eps bn_momentum cardinality class_token depth depths dims "
    "drop_block_rate drop_path_rate drop_rate embed_dim fix_stem global_pool head_init_scale img_size init_values "
    "kernel_size ls_init_value mlp_ratio norm_layer num_heads output_stride patch_size pos_drop_rate "
    "proj_drop_rate qkv_bias stem_type stem_width use_conv_mlp widths window_size zero_init_last",
}
INSTANTIATORS = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")
_GIVEN_BY_BUILD = {"num_classes", "low_curvature", "input_size"}
_LIBRARY_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
_WORD = re.compile(r"[A-Za-z0-9_-]*")
_IMPORT_PATH = re.compile(r"\s*[^\W\d]\w*(\.[^\W\d]\w*)+\s*")
_LONGEST = 1000


@dataclass(frozen=True)
class Source:
    """A file and how its reader lets the user overrule what it may ask for."""

    file: Any
    trust: str = "--trust (trust=True)"
    named: str = "--network (network=...)"

    def refusal(self, what: str) -> ValueError:
        """The error: what the file asks for, and the way out."""
        return ValueError(
            f"{self.file} {what}; give it yourself with {self.named}, or where you trust whoever made it, allow that "
            f"with {self.trust}."
        )

    def damage(self, what: str) -> ValueError:
        """The error where the file is not what this package writes, whoever made it."""
        return ValueError(f"{self.file} {what}, which no LitClassifier writes: it is damaged or made by hand.")


def classifier_settings(
    content: Mapping[str, Any], source: Source, given: Mapping[str, Any] | None = None, further: bool = False
) -> dict[str, Any]:
    """Hyperparameters of a checkpoint of ``LitClassifier``, without Lightning's own.

    Args:
        content: The checkpoint.
        source: Where it comes from.
        given: What the user gave: the same import path there is the user's and may stand in the file too.
        further: Whether a subclass may have further hyperparameters, for which :func:`users_settings` holds.

    Raises:
        ValueError: If the checkpoint asks for anything but what `LitClassifier` writes; the message names it.
    """
    settings = _settings(content, source)
    if content.get("hparams_name", "kwargs") != "kwargs":
        raise source.damage(f"has hyperparameters for the argument {content['hparams_name']!r:.80}")
    if further:
        users_settings({"hyper_parameters": {k: v for k, v in settings.items() if k not in SETTINGS}}, source, given)
    for name, value in settings.items():
        if name not in SETTINGS and further:
            continue
        if name not in SETTINGS:
            version = content.get("lightning_lcnn")
            writer = version.get("version") if isinstance(version, Mapping) else None
            raise source.refusal(f"has an unknown hyperparameter {name!r:.80} (written by version {writer!r:.20})")
        if not SETTINGS[name](value):
            raise source.damage(f"has the hyperparameter {name} = {value!r:.80}")
    described = (settings.get("network", "resnet18"), settings.get("network_args") or {})
    by_user = ((given or {}).get("network"), (given or {}).get("network_args") or {})
    if not _same(described, by_user):
        check_network(*described, source)
    return settings


def users_settings(
    content: Mapping[str, Any], source: Source, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Hyperparameters for a class of the user's: plain values, of which none names code that the user did not name.

    Args:
        content: The checkpoint.
        source: Where it comes from.
        given: What the user gave; equal values may stand in the file too.

    Raises:
        ValueError: If a value is an import path, or a ``class_path``, that the user did not give.
    """
    settings = _settings(content, source)
    for name, value in settings.items():
        code = _names_code(value)
        if code and not _same(value, (given or {}).get(name)):
            raise source.refusal(f"names code to import, {code!r:.80}, as hyperparameter {name}")
    return settings


def check_class_path(content: Mapping[str, Any], cls: type, source: Source) -> None:
    """Raise unless the class that a checkpoint asks Lightning to build is ``cls`` or an imported subclass of it."""
    path = content.get("hyper_parameters", {}).get(CLASS_PATH)
    found = imported(path)
    if path is not None and not (isinstance(found, type) and issubclass(found, cls)):
        raise source.refusal(f"asks for the class {path!r:.80} and not {cls.__qualname__}")


def imported(path: Any) -> Any:
    """What an import path names where its module is imported already, else None: a file's word imports nothing."""
    module, _, name = str(path).rpartition(".")
    return getattr(sys.modules.get(module), name, None) if module else None


def check_network(name: Any, arguments: Any, source: Source) -> None:
    """Raise unless ``build_network(name, arguments=arguments)`` builds a network and does nothing else.

    Raises:
        ValueError: If the name is an import path, or an argument is not known to be harmless.
    """
    library, slash, rest = str(name).partition("/")
    if not isinstance(name, str) or (slash and (library not in LIBRARIES or not _LIBRARY_NAME.fullmatch(rest))):
        raise source.damage(f"names the network {name!r:.80}")
    if not slash and name not in OWN:
        raise source.refusal(
            f"names code to import, {name!r:.80}" if "." in name else f"names no network, {name!r:.80}"
        )
    known = set(ARGUMENTS[library].split()) if slash else set(inspect.signature(OWN[name]).parameters) - _GIVEN_BY_BUILD
    for key, value in (arguments or {}).items():
        if key not in known:
            raise source.refusal(f"gives the network {name} the argument {key!r:.80}, which a file may not")
        if not _harmless(value):
            raise source.damage(f"gives the network {name} the argument {key} = {value!r:.80}")


def _settings(content: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The hyperparameters without Lightning's own, and with those that Lightning merges into them since 2020."""
    found: dict[str, Any] = {}
    for key in ("hparams", "module_arguments", "hyper_parameters"):
        part = content.get(key, {})
        if not isinstance(part, Mapping) or not all(isinstance(name, str) for name in part):
            raise source.refusal(f"has no table of names and values in {key!r}")
        found |= part
    found.pop(CLASS_PATH, None)
    if found.pop(INSTANTIATOR, INSTANTIATORS[0]) not in INSTANTIATORS:
        raise source.refusal("names its own function to build the module with")
    return found


def _same(one: Any, other: Any) -> bool:
    """Equal plain values; lists and tuples alike, for YAML has only lists."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return set(one) == set(other) and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _names_code(value: Any, depth: int = 0) -> str:
    """The import path in a value, or ""."""
    if depth > 20:
        return "a very deep value"
    if isinstance(value, str):
        return value if _IMPORT_PATH.fullmatch(value) else ""
    if isinstance(value, Mapping):
        if "class_path" in value:
            return str(value["class_path"])
        return next(filter(None, (_names_code(member, depth + 1) for member in value.values())), "")
    if isinstance(value, list | tuple | set):
        return next(filter(None, (_names_code(member, depth + 1) for member in value)), "")
    return ""


def _harmless(value: Any, depth: int = 0) -> bool:
    """A number, a switch, a word without dots and slashes, or a short list of these."""
    if isinstance(value, list | tuple):
        return depth < 3 and len(value) <= _LONGEST and all(_harmless(member, depth + 1) for member in value)
    if isinstance(value, str):
        return bool(_WORD.fullmatch(value))
    return value is None or isinstance(value, bool) or _number(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 24


def _statistic(value: Any) -> bool:
    return _number(value) or (
        isinstance(value, list | tuple) and 0 < len(value) <= _LONGEST and all(map(_number, value))
    )


def _switch(value: Any) -> bool:
    return isinstance(value, bool)


# what LitClassifier writes; `penalties` and `metrics` it leaves out
SETTINGS: dict[str, Callable[[Any], bool]] = {
    "network": lambda value: isinstance(value, str) and len(value) <= _LONGEST,
    "num_classes": _size,
    "image_shape": lambda value: isinstance(value, list | tuple) and len(value) == 3 and all(map(_size, value)),
    "network_args": lambda value: value is None or (isinstance(value, dict) and all(isinstance(k, str) for k in value)),
    "low_curvature": _switch,
    "beta": _number,
    "gamma": lambda value: value is None or _number(value),
    "max_pool": lambda value: value in ("smooth", "average", "keep"),
    "pretrained": lambda value: value is False,
    "weights": lambda value: value is None,
    "learning_rate": _number,
    "momentum": _number,
    "weight_decay": _number,
    "mean": _statistic,
    "std": _statistic,
    "recompute": _switch,
}
