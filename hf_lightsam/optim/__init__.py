"""Sharpness-aware optimizers: each an ascent rule, a descent optimizer and an exact restore."""

from .lightsam import LightSAM
from .sam import SAM
from .sharpness_aware import SharpnessAwareOptimizer

__all__ = ["SAM", "LightSAM", "SharpnessAwareOptimizer"]
