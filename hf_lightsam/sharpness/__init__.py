"""How sharp a model's loss is around its weights."""

from .callback import SharpnessCallback
from .connectivity import Connectivity, linear_connectivity
from .eigenvalues import Eigenvalues, hessian_eigenvalues
from .hvp import HessianOperator
from .landscape import Landscape, filter_normalized, loss_landscape
from .m_sharpness import MSharpness, m_sharpness
from .moments import Moment, hessian_moments
from .trace import Estimate, hessian_trace, traces_of_powers

__all__ = [
    "Connectivity",
    "Eigenvalues",
    "Estimate",
    "HessianOperator",
    "Landscape",
    "MSharpness",
    "Moment",
    "SharpnessCallback",
    "filter_normalized",
    "hessian_eigenvalues",
    "hessian_moments",
    "hessian_trace",
    "linear_connectivity",
    "loss_landscape",
    "m_sharpness",
    "traces_of_powers",
]
