"""The card of a method on a task, from a suite's runs over seeds: every number and judgement in it is computed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import UsageError
from ..glue.data import HUB_DATASET
from ..glue.suite import Method
from . import findings, method_text, recipe_text
from .hub_names import METRIC_TYPES, PACKAGED, PACKAGED_LICENSE, hub_name, is_hub_name
from .measured import Measured, measured

TEMPLATE = Path(__file__).with_suffix(".md")
TASK_TYPE = "text-classification"


def card_from_results(
    results: pd.DataFrame,
    settings: Mapping[str, Any],
    task: str,
    method: Method,
    baseline: Method | None = None,
    *,
    model_name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    command: str | None = None,
) -> ModelCard:
    """Make the card of a method on a task.

    The same results give the same card, on whatever machine.

    Args:
        results: From :func:`~hf_lightsam.glue.suite.read_results`.
        settings: Of the suite's ``settings.json``.
        task: One of GLUE's tasks.
        method: The method.
        baseline: What to compare it with on the same seeds. None: nothing.
        model_name: Default: made of base model, task and method.
        base_model: Name on the hub of the model that was fine-tuned. Default: the suite's, if it is such a name.
        license: As the hub writes licences. Default: the packaged encoder's; None for another model.
        command: That makes the card again, for it to tell. Default: not told.

    Raises:
        UsageError: As :func:`measured`; for a base model or licence that the hub would not take.
    """
    if base_model is not None and not is_hub_name(base_model):
        raise UsageError(f"base_model={base_model!r}: expected a name on the hub, like google-bert/bert-base-cased")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UsageError(f"license={license!r}: expected it as the hub writes licences, like apache-2.0")
    found = measured(results, settings, task, method, baseline)
    loaded = str(found.settings["model_name_or_path"])
    base = base_model or hub_name(loaded)
    license = license or (PACKAGED_LICENSE if base == PACKAGED else None)
    name = model_name or f"{(base or loaded).rstrip('/').split('/')[-1]}-{found.task.name}-{method.name}"
    data = ModelCardData(
        language="en",
        license=license,
        library_name="transformers",
        pipeline_tag=TASK_TYPE,
        base_model=base,
        datasets=[HUB_DATASET],
        metrics=list(dict.fromkeys(METRIC_TYPES.get(metric, metric) for _, metric in found.scores())),
        tags=["glue", *method_text.tags(method.name)],
        model_name=name,
        eval_results=eval_results(found),
    )
    licence = f"Base model: {license}." if license else "That of the base model."
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=name,
        base=f"[{base}](https://huggingface.co/{base})" if base else "A local model",
        dataset=f"GLUE's {found.task.folder}",
        method_label=f"`{method.label}`",
        runs=recipe_text.runs(found),
        results=findings.results_table(found),
        verdicts=findings.verdicts(found),
        method=method_text.description(method.name, recipe_text.options(found)),
        sharpness=findings.sharpness_text(found),
        cost=findings.cost_table(found),
        data=recipe_text.data(found),
        settings=recipe_text.settings_table(found.settings),
        limits=findings.limits(found),
        command=recipe_text.suite_command(found),
        command_note=recipe_text.command_note(command),
        versions=recipe_text.versions(found.own),
        licence=f"{licence} GLUE's texts have terms of their own.",
        citation=method_text.citation(method.name),
    )


def eval_results(found: Measured) -> list[EvalResult]:
    """Return the means over seeds as the hub's metadata take them."""
    limit = found.settings.get("max_eval_samples")
    of_rows = "" if limit is None else f", {limit} rows at most"
    return [
        EvalResult(
            task_type=TASK_TYPE,
            task_name="Text Classification",
            dataset_type=HUB_DATASET,
            dataset_name=f"GLUE {found.task.folder}",
            dataset_config=found.task.name,
            dataset_split=split,
            metric_type=METRIC_TYPES.get(metric, metric),
            metric_name=f"{metric}, mean over {len(own.scores)} seeds{of_rows}",
            metric_value=round(own.mean, 4),
        )
        for (split, metric), (own, _) in found.scores().items()
    ]
