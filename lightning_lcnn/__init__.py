"""Low-curvature neural networks for PyTorch Lightning.

Inherit :class:`LCNNMixin`, convert the network with :func:`to_low_curvature`, add :class:`CurvatureMonitor` to the
Trainer. Everything below the mixin and the callbacks also works in a plain PyTorch loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_lcnn.__about__ import __version__

if TYPE_CHECKING:
    from lightning_lcnn import bounds, conversion, functional, layers, metrics, models, penalties
    from lightning_lcnn.callbacks import AdversarialTraining, CurvatureMonitor, PenaltyCallback, PowerIteration
    from lightning_lcnn.classifier import LitClassifier
    from lightning_lcnn.conversion import fold, to_low_curvature
    from lightning_lcnn.evaluation import evaluate
    from lightning_lcnn.layers import lcnn_parameter_groups
    from lightning_lcnn.mixin import LCNNMixin

__all__ = [  # noqa: RUF022  (grouped by use)
    # training
    "LCNNMixin",
    "LitClassifier",
    "PenaltyCallback",
    "lcnn_parameter_groups",
    # networks
    "fold",
    "to_low_curvature",
    # callbacks
    "AdversarialTraining",
    "CurvatureMonitor",
    "PowerIteration",
    # measures
    "evaluate",
    # modules
    "bounds",
    "conversion",
    "functional",
    "layers",
    "metrics",
    "models",
    "penalties",
    "__version__",
]

# Torch and Lightning take seconds to import, which `lightning-lcnn --help` must not: a name brings its module.
_HOME = {
    "AdversarialTraining": "callbacks",
    "CurvatureMonitor": "callbacks",
    "LCNNMixin": "mixin",
    "LitClassifier": "classifier",
    "PenaltyCallback": "callbacks",
    "PowerIteration": "callbacks",
    "evaluate": "evaluation",
    "fold": "conversion",
    "lcnn_parameter_groups": "layers",
    "to_low_curvature": "conversion",
}
_MODULES = {"bounds", "conversion", "functional", "layers", "metrics", "models", "penalties"}
_MODULES |= {"callbacks", "classifier", "evaluation", "kernels", "mixin", "recording"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"lightning_lcnn.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"lightning_lcnn.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
