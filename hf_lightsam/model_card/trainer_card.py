"""The card of one run: the Trainer's own, with what it does not know of a sharpness-aware method; and its upload."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import EvalResult, ModelCard, get_token
from transformers import Trainer, TrainingArguments

from ..optim.recipes import get_recipe
from ..optim_flag import optim_name
from . import method_text
from .hub_names import METRIC_TYPES, hub_name

if TYPE_CHECKING:
    from ..trainer import LightSAMTrainer

CARD = "README.md"
_VERSIONS = "### Framework versions"
_FROM_SCRATCH = "This model was trained from scratch on "
_OF_PUSH = frozenset(inspect.signature(Trainer.push_to_hub).parameters)


def extend_card(trainer: LightSAMTrainer) -> None:
    """Add the method to the card in ``output_dir`` that the Trainer has just written.

    Added are tags; a section on the method, its options and the sharpness along the training; the version of this
    package; what to cite; and to the results of the metadata, where there are any, the configuration and split of the
    evaluation rows, and metrics that the Trainer does not know by their names. What the card says stays, but for a
    base model that is a local folder: the hub refuses a path there (PEFT writes it), and where the Trainer leaves it
    out it says that the model was trained from scratch.

    Args:
        trainer: On its main process.
    """
    from .. import __version__  # set when the trainer's module has been imported

    path = Path(trainer.args.output_dir or ".") / CARD
    card = ModelCard.load(path)
    name, description = _method(trainer)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *method_text.tags(name)]))
    if card.data.eval_results:
        card.data.eval_results = _completed(card.data.eval_results, trainer)
        card.data.metrics = list(dict.fromkeys(result.metric_type for result in card.data.eval_results))
    card.data.base_model, is_local = _base_model(card.data.base_model, trainer)
    text = card.text
    if is_local:
        text = text.replace(_FROM_SCRATCH, "This model is a fine-tuned version of a local model on ")
    if card.data.base_model is None:
        card.data.tags = [tag for tag in card.data.tags if not tag.startswith("base_model:")]
    lines = text.rstrip().splitlines()
    if _VERSIONS in lines:
        lines.insert(lines.index(_VERSIONS) + 2, f"- hf_lightsam {__version__}")
    section = [description, *_sharpness(trainer.state.log_history)]
    lines += ["", "## Sharpness-aware training", "", *section, "", "## Citation", "", method_text.citation(name), ""]
    card.text = "\n".join(lines)
    card.save(path)


def _base_model(named: Any, trainer: LightSAMTrainer) -> tuple[Any, bool]:
    """Return the base model if the hub can know it, and whether it is a local one."""
    name = named or getattr(getattr(trainer.model, "config", None), "_name_or_path", "")
    if isinstance(name, str) and name and hub_name(name) is None:
        return None, True
    return named or None, False


def _method(trainer: LightSAMTrainer) -> tuple[str, str]:
    """Return the name of the method, and its description."""
    made = trainer.optimizer_cls_and_kwargs
    if not trainer.optimizer_is_given and made is None:
        name = optim_name(trainer.args.optim)
        return name, method_text.description(name, given_options(trainer.args))
    given: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # from below Accelerate's wrapper
    cls, arguments = cast(Any, made) if made is not None else (type(given), given.defaults)
    recipe = method_text.recipe_of(cls)
    return cls.__name__ if recipe is None else recipe.name, method_text.description_of_class(cls, arguments)


def given_options(args: TrainingArguments) -> dict[str, Any]:
    """Return the options of the method of ``args.optim`` that the arguments give, by their names in ``optim_args``."""
    recipe = get_recipe(optim_name(args.optim))
    adam = {"beta1": args.adam_beta1, "beta2": args.adam_beta2, "eps": args.adam_epsilon}
    fields = {name: getattr(args, name, None) for name in recipe.options}
    options = adam | {name: value for name, value in fields.items() if value is not None}
    return {name: value for name, value in options.items() if name in recipe.options} | recipe.parse(args.optim_args)


def _sharpness(log_history: list[dict[str, Any]]) -> list[str]:
    """Return a line on the sharpness along the training, from the Trainer's log."""
    values = [(entry["step"], entry["sharpness"]) for entry in log_history if "sharpness" in entry]
    if not values:
        return []
    (first, start), (last, end) = values[0], values[-1]
    return [
        f"- sharpness: {start:.4g} at step {first}, {end:.4g} at step {last} (rise of the training loss under the "
        "method's own perturbation: it compares runs of one method and radius only)"
    ]


def _completed(results: list[EvalResult], trainer: LightSAMTrainer) -> list[EvalResult]:
    """Return the results with configuration, split and the metrics that are missing."""
    split = getattr(trainer.eval_dataset, "split", None)
    for result in results:
        if isinstance(result.dataset_args, str):  # as ``dataset_args`` of ``create_model_card`` is
            result.dataset_config = result.dataset_config or result.dataset_args
        if result.dataset_split in (None, "None"):  # the Trainer writes the latter for rows without a name
            result.dataset_split = None if split is None else str(split)
    last = next(entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    more = []
    for name, metric_type in METRIC_TYPES.items():
        if f"eval_{name}" in last:
            for result in {each.unique_identifier: each for each in results}.values():
                value = last[f"eval_{name}"]
                changed = {"metric_type": metric_type, "metric_name": name.capitalize(), "metric_value": value}
                more.append(EvalResult(**{**vars(result), **changed}))
    return [*results, *more]


@contextmanager
def keeping_the_model(trainer: LightSAMTrainer, arguments: Mapping[str, Any]) -> Iterator[None]:
    """In the body, which pushes to the hub: where that fails, the model and its card are on the disk all the same.

    The Trainer asks for the repository before it saves anything. The error goes on, with a note on where the model is
    and how to go on.

    Args:
        trainer: Pushes.
        arguments: Keyword arguments of its ``push_to_hub``.
    """
    try:
        yield
    except Exception as error:
        if trainer.hub_model_id is None:  # the repository was refused, and the other ranks have gone on to save
            trainer.save_model(_internal_call=True)
            trainer.create_model_card(**{name: value for name, value in arguments.items() if name not in _OF_PUSH})
        folder = trainer.args.output_dir
        missing = get_token() is None and trainer.args.hub_token is None and arguments.get("token") is None
        error.add_note(
            f"The model and its card are in {folder!r}. "
            + ("No token was found: `hf auth login`, the variable HF_TOKEN or hub_token. " if missing else "")
            + f"Then again: trainer.push_to_hub(), or `hf upload {trainer.hub_model_id or 'USER/NAME'} {folder}`."
        )
        raise
