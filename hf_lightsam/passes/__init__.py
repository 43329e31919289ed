"""Gradient plans: which gradients a step takes, on which rows and ranks. One file a plan."""

from .cheaper_ascent import CheaperAscent
from .loss_scale import unscale
from .micro_batch import MicroBatch
from .plan import GradientPlan, WindowResult
from .rng import RngState
from .running_statistics import frozen_running_statistics, modules_with_running_statistics
from .shares import count_items
from .sparse_mask import SparseMask
from .two_pass import TwoPass
from .window import Window

__all__ = [
    "CheaperAscent",
    "GradientPlan",
    "MicroBatch",
    "RngState",
    "SparseMask",
    "TwoPass",
    "Window",
    "WindowResult",
    "count_items",
    "frozen_running_statistics",
    "modules_with_running_statistics",
    "unscale",
]
