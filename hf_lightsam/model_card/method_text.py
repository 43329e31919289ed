"""What a card says of the method: what it is, where it comes from, its options and what it costs by construction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..methods_table import method_info, shown
from ..optim import SharpnessAwareOptimizer
from ..optim.recipes import RECIPES, Recipe

LIGHTSAM = "2505.24399"
TAG = "sharpness-aware-minimization"


def description(name: str, options: Mapping[str, Any]) -> str:
    """Return a method's description, a Markdown list.

    Args:
        name: A value of the ``optim`` flag.
        options: Its options, by the names of ``optim_args``; those that are missing have their defaults.
    """
    if name not in RECIPES:
        return f"- method: `{name}` of Transformers\n- gradients: 1 a step"
    recipe = RECIPES[name]
    infos = {option.name: option for option in method_info(recipe).options}
    descent = options.get("descent", infos["descent"].default if "descent" in infos else None)
    settings = []
    for option in infos.values():
        default = option.of_descent.get(descent, option.default)
        value = options.get(option.name, default)
        if value is None or (option.of_descent and descent not in option.of_descent):
            continue
        is_default = default is None or shown(value) == shown(default)
        settings.append(f"`{option.name}={shown(value)}`" + ("" if is_default else f" (default {shown(default)})"))
    summary = recipe.summary.removesuffix(" (the default)")
    return _facts(f"{summary} (`optim={name}` of hf_lightsam)", settings, recipe)


def description_of_class(cls: type[SharpnessAwareOptimizer], arguments: Mapping[str, Any]) -> str:
    """Return the description of an optimizer that was made by hand.

    Args:
        cls: Its class.
        arguments: Those of the class that are known.
    """
    values = {name: value for name, value in arguments.items() if isinstance(value, (bool, int, float, str, tuple))}
    settings = [f"`{name}={shown(value)}`" for name, value in values.items()]
    return _facts(f"`{cls.__module__}.{cls.__qualname__}`", settings, recipe_of(cls))


def _facts(method: str, settings: list[str], recipe: Recipe | None) -> str:
    facts = {"method": method, "options": ", ".join(settings)}
    if recipe is not None:
        info = method_info(recipe)
        facts["paper"] = f"[{info.paper}]({info.url})" if info.url else info.paper
        facts["gradients"] = f"{info.evaluations} a step"
        facts["memory"] = f"{info.copies}, in copies of the trainable weights, beyond weights and gradients"
    return "\n".join(f"- {fact}: {text}" for fact, text in facts.items() if text)


def recipe_of(cls: type) -> Recipe | None:
    """Return a recipe of an optimizer class: those that share a class share paper and costs."""
    return next((recipe for recipe in RECIPES.values() if recipe.optimizer is cls), None)


def tags(name: str) -> list[str]:
    """Return the tags of a model that a method trained."""
    return [TAG, name] if name in RECIPES else [name]


def citation(name: str) -> str:
    """Return what to cite, a Markdown list: LightSAM, and the method's own paper.

    Args:
        name: A value of the ``optim`` flag.
    """
    own = method_info(RECIPES[name]) if name in RECIPES else None
    lines = [f"- LightSAM: [arXiv {LIGHTSAM}](https://arxiv.org/abs/{LIGHTSAM})"]
    if own is not None and own.paper and LIGHTSAM not in own.paper:
        lines.append(f"- `{name}`: [{own.paper}]({own.url})" if own.url else f"- `{name}`: {own.paper}")
    return "\n".join(lines)
