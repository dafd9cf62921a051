"""Low-curvature neural networks for PyTorch Lightning.

Inherit :class:`LCNNMixin`, convert the network with :func:`to_low_curvature`, add :class:`CurvatureMonitor` to the
Trainer. Everything below the mixin and the callbacks also works in a plain PyTorch loop.
"""

from lightning_lcnn import bounds, conversion, functional, layers, metrics, models, penalties
from lightning_lcnn.__about__ import __version__
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
