"""Make the family's names valid values of ``TrainingArguments(optim=...)``.

Transformers has no public way to add an optimizer name. What is private is kept here, as read from transformers 5.23:
``OptimizerNames`` is a closed enum that ``TrainingArguments.__post_init__`` looks values up in and ``HfArgumentParser``
takes choices from; ``trainer_optimizer._OPTIMIZER_HANDLERS`` maps its members to what makes an optimizer; and
``trainer.DEFAULT_CALLBACKS`` is the list of callbacks that every ``Trainer`` starts with.

The handler and the callback registered here only refuse: a plain ``Trainer`` takes one gradient a step, so a
sharpness-aware name there would silently be something else. :class:`~hf_lightsam.LightSAMTrainer` makes its optimizer
itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import transformers.trainer
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

from .errors import UsageError
from .optim.recipes import RECIPES, Recipe

_constructing_our_trainer: ContextVar[bool] = ContextVar("constructing_our_trainer", default=False)


def register() -> None:
    """Add all names of :data:`~hf_lightsam.optim.recipes.RECIPES`; calling it again changes nothing."""
    for name in RECIPES:
        if name not in OptimizerNames._value2member_map_:
            _extend_enum(name)
            _OPTIMIZER_HANDLERS[OptimizerNames(name)] = _refuse
    callbacks: list[type[TrainerCallback]] = transformers.trainer.DEFAULT_CALLBACKS  # type: ignore[assignment]
    if RefusePlainTrainer not in callbacks:
        callbacks.append(RefusePlainTrainer)


def register_method(recipe: Recipe) -> None:
    """Make a method of one's own a value of the ``optim`` flag, like those of the package.

    Args:
        recipe: Its row in the table.

    Raises:
        UsageError: If the name is taken.
    """
    if recipe.name in RECIPES or recipe.name in OptimizerNames._value2member_map_:
        raise UsageError(f"name={recipe.name!r}: it is an optimizer's name already; expected another")
    RECIPES[recipe.name] = recipe
    register()


def unregister_method(name: str) -> None:
    """Take back :func:`register_method`.

    Args:
        name: The method's.

    Raises:
        UsageError: For a name that is not in the table.
    """
    if RECIPES.pop(name, None) is None:
        raise UsageError(f"name={name!r}: no method of the table; expected one of {', '.join(RECIPES)}")
    member = OptimizerNames._value2member_map_.pop(name)
    _OPTIMIZER_HANDLERS.pop(cast(OptimizerNames, member))
    OptimizerNames._member_names_.remove(member.name)
    OptimizerNames._member_map_.pop(member.name)
    type.__delattr__(OptimizerNames, member.name)


def optim_name(optim: Any) -> Any:
    """Return a value of the ``optim`` flag, a member of the enum or a text, as the text."""
    return getattr(optim, "value", optim)


def is_registered(optim: Any) -> bool:
    """Whether a value of the ``optim`` flag is one of ours."""
    return optim_name(optim) in RECIPES


@contextmanager
def constructing_our_trainer() -> Iterator[None]:
    """Mark the construction of a trainer that runs both passes."""
    token = _constructing_our_trainer.set(True)
    try:
        yield
    finally:
        _constructing_our_trainer.reset(token)


class RefusePlainTrainer(TrainerCallback):
    """Fails at the construction of a ``Trainer`` that would take one gradient under a sharpness-aware name."""

    def on_init_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the name, once the trainer is built."""
        if is_registered(args.optim) and not _constructing_our_trainer.get():
            raise _error(args.optim)


def _refuse(context: Any) -> Any:
    raise _error(context.args.optim)


def _error(optim: Any) -> UsageError:
    return UsageError(
        f"optim={optim_name(optim)!r}: a plain Trainer takes one gradient a step, and this method needs two. Use "
        "hf_lightsam.LightSAMTrainer in its place (or, for another subclass of Trainer, put "
        "hf_lightsam.SharpnessAwareMixin before it: class MyTrainer(SharpnessAwareMixin, Seq2SeqTrainer))"
    )


def _extend_enum(value: str) -> None:
    member = str.__new__(OptimizerNames, value)
    name = value.upper()
    member._name_ = name
    member._value_ = value
    member.__objclass__ = OptimizerNames  # type: ignore[attr-defined]
    type.__setattr__(OptimizerNames, name, member)
    OptimizerNames._member_names_.append(name)
    OptimizerNames._member_map_[name] = member
    OptimizerNames._value2member_map_[value] = member
