"""hf_lightsam: sharpness-aware fine-tuning with no radius to tune, for Hugging Face Transformers."""

from .errors import UsageError
from .optim import SAM, LightSAM, SharpnessAwareOptimizer

__all__ = ["SAM", "LightSAM", "SharpnessAwareOptimizer", "UsageError"]
__version__ = "0.1.0.dev0"
