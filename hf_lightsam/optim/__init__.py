"""Sharpness-aware optimizers: each an ascent rule, a descent optimizer and an exact restore."""

from .adasam import AdaSAM
from .asam import ASAM
from .lightsam import LightSAM
from .monge_sam import MongeSAM
from .sam import SAM
from .sharpness_aware import SharpnessAwareOptimizer

__all__ = ["ASAM", "SAM", "AdaSAM", "LightSAM", "MongeSAM", "SharpnessAwareOptimizer"]
