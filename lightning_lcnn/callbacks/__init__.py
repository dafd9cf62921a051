"""Callbacks for the trainers of ``lightning`` and ``pytorch_lightning``."""

from lightning_lcnn.callbacks.adversarial_training import AdversarialTraining
from lightning_lcnn.callbacks.curvature_monitor import CurvatureMonitor
from lightning_lcnn.callbacks.penalty import PenaltyCallback
from lightning_lcnn.callbacks.power_iteration import PowerIteration

__all__ = ["AdversarialTraining", "CurvatureMonitor", "PenaltyCallback", "PowerIteration"]
