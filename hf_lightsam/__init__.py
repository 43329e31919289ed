"""hf_lightsam: sharpness-aware fine-tuning with no radius to tune, for Hugging Face Transformers.

Importing it makes ``TrainingArguments(optim="lightsam_adam")`` and the family's other names valid.
"""

from .callbacks import StopOnInterrupt
from .errors import UsageError
from .optim import SAM, LightSAM, SharpnessAwareOptimizer
from .optim.recipes import RECIPES, Option, Recipe, optimizer_cls_and_kwargs
from .optim_flag import register_method, unregister_method
from .trainer import LightSAMSeq2SeqTrainer, LightSAMTrainer, SharpnessAwareMixin
from .training_args import LightSAMSeq2SeqTrainingArguments, LightSAMTrainingArguments

__all__ = [
    "RECIPES",
    "SAM",
    "LightSAM",
    "LightSAMSeq2SeqTrainer",
    "LightSAMSeq2SeqTrainingArguments",
    "LightSAMTrainer",
    "LightSAMTrainingArguments",
    "Option",
    "Recipe",
    "SharpnessAwareMixin",
    "SharpnessAwareOptimizer",
    "StopOnInterrupt",
    "UsageError",
    "optimizer_cls_and_kwargs",
    "register_method",
    "unregister_method",
]
__version__ = "0.1.0.dev0"
