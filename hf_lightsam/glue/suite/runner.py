"""Makes the runs of a suite: seed by seed, each written down before its checkpoints go, so that a kill loses no run."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PrinterCallback, set_seed

from ... import __version__
from ...callbacks import StopOnInterrupt
from ...checkpoints import TRAINER_STATE, complete_checkpoints
from ...errors import UsageError
from ...trainer import LightSAMTrainer
from ..answers import answers
from ..arguments import ModelArguments
from ..by_length import predict_in_order
from ..data import load_glue
from ..finetuning import build_trainer, load_model, load_tokenizer, num_positions, predict
from ..metrics import task_metrics
from ..preprocessing import tokenize
from ..tasks import DIAGNOSTIC, TASKS, GlueTask
from .arguments import Request, model_source, settings_digest
from .flatness import sharpness
from .measures import GradientCounter, RunMeasures, mean_training_loss
from .methods import Method
from .predictions import prediction_file, read_predictions, run_folder, save_predictions
from .progress import Progress
from .rows import TaskRows, load_rows
from .store import RunKey, Store
from .submission import FILES, SUBMISSION, write_submission

RUNS = "runs"
MODELS = "models"

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One training: a method on a task with a seed."""

    task: GlueTask
    method: Method
    seed: int

    @property
    def key(self) -> RunKey:
        """What it is known by in the store."""
        return self.task.name, self.method.name, self.method.options, self.seed

    @property
    def name(self) -> str:
        """What progress calls it."""
        return f"{self.task.name}, seed {self.seed}, {self.method.label}"

    def folder(self, root: Path) -> Path:
        """Return its folder below ``root``."""
        return run_folder(root, self.task.name, self.method, self.seed)


def runs_of(request: Request) -> list[Run]:
    """Return the runs of a request: seed by seed, so that what an interrupted suite has is balanced."""
    return [Run(task, method, seed) for seed in request.seeds for task in request.tasks for method in request.methods]


class Suite:
    """All that the runs of a request need, loaded and checked.

    Args:
        request: What to run.
        command: The command line, for ``settings.json``.

    Raises:
        UsageError: If data or model cannot be loaded, or ``output_dir`` holds runs that were made with other settings
            or rows, or that another process is adding to.
    """

    def __init__(self, request: Request, command: Sequence[str]) -> None:
        self.request = request
        self.output_dir = request.output_dir
        if request.arguments.threads is not None:
            torch.set_num_threads(request.arguments.threads)
        arguments = request.arguments
        self._model_arguments = ModelArguments(
            model_source(arguments.model_name_or_path),
            arguments.tokenizer_name,
            arguments.cache_dir,
            arguments.model_revision,
            arguments.token,
            arguments.trust_remote_code,
            arguments.ignore_mismatched_sizes,
        )
        self._settings = {"command": shlex.join(command), **request.settings()}
        self._state = PartialState()  # after the settings, whose training arguments join the processes
        self.rows = {task.name: self._load_rows(task) for task in request.tasks}
        self.test_rows = self._load_test_rows() if arguments.submission else {}
        self._tokenizer = load_tokenizer(self._model_arguments)
        self._positions = num_positions(load_model(self._model_arguments, request.tasks[0], self._tokenizer))
        self._store: Store | None = None
        self._evaluation_tokens: dict[str, datasets.DatasetDict] = {}
        self.done = set(self._on_main(self._open_store))
        self._progress = Progress(len(self.runs()), len(self.done), self.is_main)

    def _load_rows(self, task: GlueTask) -> TaskRows:
        arguments = self.request.arguments
        return load_rows(
            task,
            arguments.data_dir,
            self.request.seeds,
            arguments.max_train_samples,
            arguments.max_eval_samples,
            verify=self.is_main,
        )

    def _load_test_rows(self) -> dict[str, dict[str, datasets.Dataset]]:
        """Return each task's test rows by split, MNLI's with those of AX; never cut."""
        found: dict[str, dict[str, datasets.Dataset]] = {}
        for name, split in FILES.values():
            task = {**TASKS, DIAGNOSTIC.name: DIAGNOSTIC}[name]
            rows = load_glue(task, self.request.arguments.data_dir, splits=[split], verify=self.is_main)[split]
            key = DIAGNOSTIC.name if task is DIAGNOSTIC else split
            found.setdefault(task.training_task or name, {})[key] = rows
        return found

    # ---- Processes ----------------------------------------------------------------------------------------------

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self._state.is_main_process)

    def _on_main(self, function: Callable[[], T]) -> T:
        """Call on the main process; return its answer, or raise its :class:`UsageError`, on all."""
        if self._state.num_processes == 1:
            return function()
        answer: list[Any] = [None]
        if self.is_main:
            try:
                answer = [(function(), "")]
            except UsageError as error:
                answer = [(None, str(error))]
        value, refusal = broadcast_object_list(answer)[0]
        if refusal:
            raise UsageError(refusal)
        return value

    def close(self) -> None:
        """Let others have the folder."""
        if self._store is not None:
            self._store.close()
            self._store = None

    # ---- What is there already ----------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """Return all runs that were asked for, in the order in which they are made."""
        return runs_of(self.request)

    def _open_store(self) -> list[RunKey]:
        """Open the store, refuse other settings and rows than those of its runs, and clear up after a kill."""
        store = Store(self.output_dir)
        try:
            made = store.runs()
            before = store.settings()
            if before is not None:
                self._settings = _joined(before, self._settings, str(self.output_dir))
            for (task, _, _, seed), (data, settings) in made.items():
                if task in self.rows and data != self.rows[task].digests.get(seed, data):
                    raise UsageError(
                        f"output_dir={str(self.output_dir)!r}: its runs of {task} with seed {seed} had other rows than "
                        "those of data_dir; expected the same data, or another folder"
                    )
                if task not in self._settings["tasks"] or settings != settings_digest(self._settings, task):
                    raise UsageError(
                        f"output_dir={str(self.output_dir)!r}: its runs of {task} were not made with the settings in "
                        "settings.json"
                    )
            store.save_settings(self._settings)
            store.export()
            done = [run for run in self.runs() if run.key in made and self._has_predictions(run)]
            for run in done:
                self._clear(run)
                self._drop_other_models(run, store)
        except BaseException:
            store.close()
            raise
        self._store = store
        return [run.key for run in done]

    def _has_predictions(self, run: Run) -> bool:
        """Whether what a submission needs of a run is there."""
        return all(self._prediction_file(run, split).is_file() for split in self._test_splits(run))

    def _test_splits(self, run: Run) -> dict[str, datasets.Dataset]:
        """Return the test rows that a run answers, by the name of the file of its answers."""
        return self.test_rows.get(run.task.name, {}) if run.method == self.request.studied else {}

    def _prediction_file(self, run: Run, split: str) -> Path:
        return prediction_file(self.output_dir, run.task.name, run.method, run.seed, split)

    def _clear(self, run: Run) -> None:
        """Drop a run's checkpoints, and the folders that are empty then."""
        folder = run.folder(self.output_dir / RUNS)
        if folder.is_dir():
            shutil.rmtree(folder)
        for parent in list(folder.parents)[:3]:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    # ---- The runs -----------------------------------------------------------------------------------------------

    def make_runs(self) -> None:
        """Make the runs that are not done.

        Raises:
            KeyboardInterrupt: On Ctrl-C, after a checkpoint if a training was under way.
            UsageError: If a row is longer than the model can read, or ``max_seq_length`` leaves no room for text.
        """
        runs = self.runs()
        try:
            for seed in self.request.seeds:
                for task in self.request.tasks:
                    missing = [run for run in runs if (run.task, run.seed) == (task, seed) and run.key not in self.done]
                    if missing:
                        rows = self._tokenized(self.rows[task.name], seed)
                        for run in missing:
                            self._make(run, rows)
        finally:
            self._progress.close()

    def _tokenized(self, rows: TaskRows, seed: int) -> datasets.DatasetDict:
        """Return a seed's training rows and the development rows; what was cut off is told at a task's first seed."""
        if rows.task.name not in self._evaluation_tokens:
            evaluation = self._tokenize(datasets.DatasetDict(rows.evaluation), rows.task, is_told=True)
            train = self._tokenize(datasets.DatasetDict({"train": rows.train[seed]}), rows.task, is_told=True)
            self._evaluation_tokens[rows.task.name] = evaluation
        else:
            train = self._tokenize(datasets.DatasetDict({"train": rows.train[seed]}), rows.task)
        return datasets.DatasetDict({**train, **self._evaluation_tokens[rows.task.name]})

    def _tokenize(self, rows: datasets.DatasetDict, task: GlueTask, is_told: bool = False) -> datasets.DatasetDict:
        length = self.request.max_seq_length(_trained_task(task))
        with self._state.main_process_first():
            tokenized, reports = tokenize(rows, task, self._tokenizer, length, positions=self._positions)
        if is_told and self.is_main:
            for report in reports.values():
                if report.rows_cut:
                    self._progress.write(f"{task.name}, {report}")
        return tokenized

    def _make(self, run: Run, rows: datasets.DatasetDict) -> None:
        """Train, evaluate and predict; write down in an order in which a kill between any two steps loses nothing."""
        self._progress.begin(run.name)
        folder = run.folder(self.output_dir / RUNS)
        args = self.request.training_arguments(run.task, run.method, run.seed, folder)
        set_seed(run.seed)  # the new head's weights
        model = load_model(self._model_arguments, run.task, self._tokenizer)
        first = rows[run.task.validation_splits[0]]
        trainer = build_trainer(model, self._tokenizer, run.task, args, rows["train"], first)
        trainer.remove_callback(PrinterCallback)
        num_rows = self.request.arguments.sharpness_samples
        before = sharpness(trainer, rows["train"], num_rows)
        counter = GradientCounter(model)  # from here on: the sharpness is no cost of the method
        measures = RunMeasures(counter)
        trainer.add_callback(measures)
        trainer.add_callback(self._progress)
        is_interrupted = _train(trainer, self._on_main(lambda: _checkpoint(folder)))
        scores = self._evaluate(trainer, run, rows)
        for split, test in self._test_splits(run).items():
            task = DIAGNOSTIC if split == DIAGNOSTIC.name else run.task
            tokens = self._tokenize(datasets.DatasetDict({split: test}), task)[split]
            predicted = predict(trainer, run.task, tokens)
            if self.is_main:
                save_predictions(self._prediction_file(run, split), np.asarray(test["idx"]), predicted)
        gradients = sum(gather_object([measures.row_gradients]))
        if self.request.arguments.keep_models != "none":
            self._keep_model(trainer, run)
        flatness = {"sharpness_before": before, "sharpness_after": sharpness(trainer, rows["train"], num_rows)}
        if self.is_main:
            self._write_down(run, trainer, measures, gradients, flatness, scores)
        self._state.wait_for_everyone()
        self._progress.end(run.name, ", ".join(f"{line['metric']} {line['score']:.4f}" for line in scores))
        if is_interrupted:
            raise KeyboardInterrupt

    def _evaluate(self, trainer: LightSAMTrainer, run: Run, rows: datasets.DatasetDict) -> list[dict[str, Any]]:
        """Return a line for each development split and metric, and write the predictions."""
        trainer.compute_metrics = None  # what a diverged model answers may be no numbers, which a metric refuses
        lines: list[dict[str, Any]] = []
        for split in run.task.validation_splits:
            output = predict_in_order(trainer, rows[split], "eval")
            predicted, labels = answers(run.task, output.predictions), np.asarray(output.label_ids)
            is_finite = bool(np.all(np.isfinite(predicted)))
            scores = (
                task_metrics(run.task, predicted.tolist(), labels.tolist())
                if is_finite
                else dict.fromkeys(run.task.metrics, 0.0)
            )
            if self.is_main:
                save_predictions(self._prediction_file(run, split), np.asarray(rows[split]["idx"]), predicted, labels)
            loss = (output.metrics or {})["eval_loss"]
            lines += [
                {"split": split, "metric": metric, "score": score, "eval_loss": loss, "eval_rows": len(labels)}
                for metric, score in scores.items()
            ]
        return lines

    def _write_down(
        self,
        run: Run,
        trainer: LightSAMTrainer,
        measures: RunMeasures,
        gradients: int,
        flatness: dict[str, float | None],
        scores: Sequence[dict[str, Any]],
    ) -> None:
        """Store a run, export the store, and drop what the run no longer needs."""
        assert self._store is not None
        steps = trainer.state.global_step
        shared = {
            **dict(zip(("task", "method", "options", "seed"), run.key, strict=True)),
            "train_loss": mean_training_loss(trainer.state.log_history),
            "train_rows": len(self.rows[run.task.name].train[run.seed]),
            "steps": steps,
            "row_gradients": gradients,
            "train_seconds": measures.train_seconds,
            "step_seconds": measures.train_seconds / max(steps, 1),
            "peak_memory": measures.peak_memory,
            "state_over_weights": measures.state_over_weights,
            **flatness,
            "data": self.rows[run.task.name].digests[run.seed],
            "settings": settings_digest(self._settings, run.task.name),
            "hf_lightsam": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        self._store.add([{**shared, **line} for line in scores])
        self._store.export()
        self.done.add(run.key)
        self._drop_other_models(run, self._store)
        self._clear(run)

    # ---- Models and submission ----------------------------------------------------------------------------------

    def _keep_model(self, trainer: LightSAMTrainer, run: Run) -> None:
        folder = run.folder(self.output_dir / MODELS)
        partial = folder.with_name(f"{folder.name}.partial")
        trainer.save_model(str(partial))
        if self.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)

    def _drop_other_models(self, run: Run, store: Store) -> None:
        """Keep only the best seed's model of a run's task and method, if that is what is kept."""
        folder = run.folder(self.output_dir / MODELS).parent
        if self.request.arguments.keep_models != "best" or not folder.is_dir():
            return
        kept = folder / f"seed-{best_seed(store.results(), run.task, run.method)}"
        for other in folder.glob("seed-*") if kept.is_dir() else ():
            if other != kept:
                shutil.rmtree(other)

    def write_submission(self, results: pd.DataFrame) -> Path:
        """Write the zip for the GLUE server: of each task, the seed with the best development score."""
        studied = self.request.studied
        assert studied is not None
        predictions: dict[tuple[str, str], np.ndarray] = {}
        for task in self.request.tasks:
            run = Run(task, studied, best_seed(results, task, studied))
            for split, rows in self.test_rows[task.name].items():
                path = self._prediction_file(run, split)
                found = read_predictions(path)
                if len(found) != len(rows):
                    raise UsageError(f"submission: {path} has {len(found)} rows; expected {len(rows)}, as the test set")
                key = (DIAGNOSTIC.name, "test") if split == DIAGNOSTIC.name else (task.name, split)
                predictions[key] = found["prediction"].to_numpy()
        path = self.output_dir / SUBMISSION
        write_submission(path, predictions)
        return path


def best_seed(results: pd.DataFrame, task: GlueTask, method: Method) -> int:
    """Return a method's seed with the best mean of a task's scores (all metrics and development splits); of equals the
    smallest.
    """
    own = results[
        (results["task"] == task.name) & (results["method"] == method.name) & (results["options"] == method.options)
    ]
    means = own.groupby("seed")["score"].mean()
    return int(means.idxmax())


def _trained_task(task: GlueTask) -> GlueTask:
    """Return the task itself, or for AX the one whose model answers it."""
    return TASKS[task.training_task] if task.training_task else task


def _joined(before: dict[str, Any], now: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the settings of the runs that are there and of those to come.

    Raises:
        UsageError: If they contradict one another; the message names what differs.
    """
    pairs = [("", before["shared"], now["shared"])]
    pairs += [
        (f"{task}: ", before["tasks"][task], own) for task, own in now["tasks"].items() if task in before["tasks"]
    ]
    changed = [
        f"{place}{name}={old.get(name)!r}, not {new.get(name)!r}"
        for place, old, new in pairs
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise UsageError(
            f"output_dir={folder!r}: its runs were made with {'; '.join(changed)}; expected the same settings, or "
            "another folder"
        )
    return {**now, "tasks": {**before["tasks"], **now["tasks"]}}


def _checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint that is not of the last step, after which there is nothing to resume."""
    for path in reversed(complete_checkpoints(folder)):
        state = json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
        if state["global_step"] < state["max_steps"]:
            return str(path)
    return None


def _train(trainer: LightSAMTrainer, checkpoint: str | None) -> bool:
    """Train; return whether Ctrl-C came with the last step: then the run is done, and the next one is not to begin.

    Raises:
        KeyboardInterrupt: If it came before.
    """
    interrupt = StopOnInterrupt(save=True)
    trainer.add_callback(interrupt)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        interrupt.release()
        trainer.remove_callback(interrupt)
    if interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    return interrupt.interrupted
