"""How sharp a model's loss is around its weights."""

from .eigenvalues import Eigenvalues, hessian_eigenvalues
from .hvp import HessianOperator
from .m_sharpness import MSharpness, m_sharpness
from .moments import Moment, hessian_moments
from .trace import Estimate, hessian_trace, traces_of_powers

__all__ = [
    "Eigenvalues",
    "Estimate",
    "HessianOperator",
    "MSharpness",
    "Moment",
    "hessian_eigenvalues",
    "hessian_moments",
    "hessian_trace",
    "m_sharpness",
    "traces_of_powers",
]
