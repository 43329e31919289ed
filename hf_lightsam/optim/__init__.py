"""Sharpness-aware optimizers: each an ascent rule, a descent optimizer, a gradient plan and an exact restore."""

from .adasam import AdaSAM
from .asam import ASAM
from .esam import ESAM
from .lets import LETSASAM, LETSSAM
from .lightsam import LightSAM
from .monge_sam import MongeSAM
from .msam import MSAM
from .mup2 import SPLPSAM, LayerwiseSAM, MuP2SAM
from .sam import SAM
from .sampa import SAMPa
from .sharpness_aware import SharpnessAwareOptimizer
from .ssam import SSAM

__all__ = [
    "ASAM",
    "ESAM",
    "LETSASAM",
    "LETSSAM",
    "MSAM",
    "SAM",
    "SPLPSAM",
    "SSAM",
    "AdaSAM",
    "LayerwiseSAM",
    "LightSAM",
    "MongeSAM",
    "MuP2SAM",
    "SAMPa",
    "SharpnessAwareOptimizer",
]
