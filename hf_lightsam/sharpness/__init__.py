"""How sharp a model's loss is around its weights."""

from .m_sharpness import MSharpness, m_sharpness

__all__ = ["MSharpness", "m_sharpness"]
