"""The movements of the family, one small file each: every one is an ordinary ``torch.optim.Optimizer``.

A rule serves both as the *descent* (``step`` lowers the loss) and, with ``maximize=True`` and the radius ``rho`` in
the place of the learning rate, as the *ascent* from which :class:`~hf_lightsam.optim.SharpnessAwareOptimizer` takes
its perturbation.
"""

from .adagrad import AdaGrad
from .adagrad_norm import AdaGradNorm
from .adam import Adam
from .adaptive_gradient import AdaptiveGradient
from .amsgrad import AMSGrad
from .base import Rule
from .factored import FactoredAdaGrad, FactoredAdam
from .layerwise_gradient import LayerwiseGradient
from .masked_gradient import MaskedGradient
from .monge_gradient import MongeGradient
from .normalized_gradient import NormalizedGradient

__all__ = [
    "AMSGrad",
    "AdaGrad",
    "AdaGradNorm",
    "Adam",
    "AdaptiveGradient",
    "FactoredAdaGrad",
    "FactoredAdam",
    "LayerwiseGradient",
    "MaskedGradient",
    "MongeGradient",
    "NormalizedGradient",
    "Rule",
]
