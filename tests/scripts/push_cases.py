"""Push to the hub of ``HF_ENDPOINT``: each case of a JSON file trains, pushes, and tells what came of it.

    push_cases.py CASES RESULTS

A case has a ``repo``, a ``token`` or none, the trainer's ``options``, whether it is ``peft``, ``seq2seq`` or from a
local folder (``is_local``), and the arguments of ``push_to_hub``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import huggingface_hub.constants  # noqa: F401  (before conftest, which goes offline)
from conftest import make_args, make_bert, make_rows
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_lightsam import LightSAMSeq2SeqTrainer, LightSAMSeq2SeqTrainingArguments, LightSAMTrainer
from hf_lightsam.glue import get_task, make_compute_metrics


def build(case: dict[str, Any], folder: Path) -> LightSAMTrainer | LightSAMSeq2SeqTrainer:
    rows = make_rows(16)
    args = make_args(folder, max_steps=2, hub_model_id=case["repo"], hub_token=case["token"], **case["options"])
    model: nn.Module = make_bert()
    model.config._name_or_path = str(folder.parent) if case.get("is_local") else ""
    if case.get("peft"):
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    if case.get("seq2seq"):
        return LightSAMSeq2SeqTrainer(
            model,
            LightSAMSeq2SeqTrainingArguments(**{**args.to_dict(), "hub_token": case["token"], "report_to": "none"}),
            train_dataset=rows,
            eval_dataset=rows,
        )
    metrics = make_compute_metrics(get_task("mrpc"))
    return LightSAMTrainer(model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)


def main(cases: str, results: str) -> None:
    found: list[dict[str, Any]] = []
    for number, case in enumerate(json.loads(Path(cases).read_text())):
        trainer = build(case, Path(results).parent / str(number))
        trainer.train()
        trainer.evaluate()
        result: dict[str, Any] = {"folder": trainer.args.output_dir, "error": None}
        try:
            trainer.push_to_hub(**case.get("push", {}))
            ModelCard.load(Path(trainer.args.output_dir) / "README.md").validate()
        except Exception as error:
            result |= {"error": type(error).__name__, "message": str(error), "notes": getattr(error, "__notes__", [])}
        found.append(result)
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
