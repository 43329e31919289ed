"""Gradient plans: which gradients a step takes, on which rows and ranks. One file a plan."""

from .loss_scale import unscale_ascent_gradients
from .rng import RngState
from .running_statistics import frozen_running_statistics, modules_with_running_statistics
from .shares import count_items, divisors
from .two_pass import TwoPass

__all__ = [
    "RngState",
    "TwoPass",
    "count_items",
    "divisors",
    "frozen_running_statistics",
    "modules_with_running_statistics",
    "unscale_ascent_gradients",
]
