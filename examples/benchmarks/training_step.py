"""How long does a whole training step take, in the Trainer? Against the plain Trainer with fused AdamW.

A BERT of MiniLM's size on batches of full length. All trainers are in one process and take turns step by step: one
takes its step, with the loading of its batch and all that a Trainer does around it, while the others wait. A case's
figure is the median over turns of its time over that of the plain Trainer's step in the same turn. Of the cheaper
ascents those are here whose steps are all alike; ``examples/studies/cheaper_steps.py`` measures whole trainings.

    python examples/benchmarks/training_step.py
    python examples/benchmarks/training_step.py --table     # the table, from the committed results
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from measure import Phases, Timing, add, check_device, environment, ratio, read, stopwatch
from shapes import CONFIGS
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from hf_lightsam import LightSAMTrainer, LightSAMTrainingArguments, UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue.suite.tables import markdown

RESULTS = Path(__file__).parent / "results" / "training_step.json"
PLAIN = "Trainer, AdamW (fused)"
ENCODERS = ("MiniLM-L6", "BERT-base", "RoBERTa-large")
CHEAPER = ("ascent_rows", "ascent_gradient", "ascent_dtype", "ascent_embeddings")
"""Options that make all steps alike cheaper."""


@dataclass
class BenchmarkArguments:
    """What to measure."""

    model: str = field(default="MiniLM-L6", metadata={"help": "One of " + ", ".join(ENCODERS)})
    batch_size: int = field(default=16, metadata={"help": "Rows of a step."})
    length: int = field(default=128, metadata={"help": "Tokens of each row."})
    device: str = field(default="cpu", metadata={"help": "cpu, or cuda (the Trainer takes the first one)."})
    bf16: bool = field(default=False, metadata={"help": "Under bfloat16 autocast."})
    repetitions: int = field(default=12, metadata={"help": "Steps that are measured."})
    methods: list[str] = field(default_factory=lambda: ["lightsam_adam", "sam"], metadata={"help": "optim flags."})
    cheaper: list[str] = field(
        default_factory=lambda: ["ascent_rows=0.25", "ascent_gradient=previous"],
        metadata={"help": "Cheaper ascents of LightSAM-Adam, of " + ", ".join(CHEAPER)},
    )
    peers: bool = field(default=True, metadata={"help": "Measure other people's SAM too (needs pytorch-optimizer)."})
    results: str = field(default=str(RESULTS), metadata={"help": "JSON file; runs of the same kind are replaced."})
    table: bool = field(default=False, metadata={"help": "Print the results that are there; measure nothing."})

    def __post_init__(self) -> None:
        if self.model not in ENCODERS:
            raise UsageError(f"model={self.model!r}: expected one of {', '.join(ENCODERS)}")
        for name in ("batch_size", "length", "repetitions"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)!r}: expected at least 1")
        for option in self.cheaper:
            if option.partition("=")[0] not in CHEAPER:
                raise UsageError(f"cheaper={option!r}: expected NAME=VALUE with a name of {', '.join(CHEAPER)}")
        check_device(self.device)


class Turns(TrainerCallback):
    """Has a trainer wait after each step until it is its turn again.

    Args:
        timing: Gets the seconds of each turn.
        device: Of the trainer.
        warm_up: Steps that are not measured.
    """

    def __init__(self, timing: Timing, device: torch.device, warm_up: int) -> None:
        self.timing, self.device, self.warm_up = timing, device, warm_up
        self._go, self._is_done = threading.Semaphore(0), threading.Semaphore(0)
        self.failure: BaseException | None = None
        self._turn = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the turn back."""
        self._is_done.release()
        self._go.acquire()

    def take(self) -> None:
        """Let the trainer take a step, and wait for it."""
        self._turn += 1
        with stopwatch(self.timing if self._turn > self.warm_up else Timing(), self.device):
            self._go.release()
            self._is_done.acquire()
        if self.failure is not None:
            raise self.failure

    def run(self, train: Callable[[], object]) -> None:
        """Train, in a thread of its own."""
        self._go.acquire()
        try:
            train()
        except BaseException as error:
            self.failure = error
        self._is_done.release()


class PeerTrainer(Trainer):
    """Trains with another SAM: a gradient, its first step, a gradient again, its second step."""

    make_phases: Callable[..., Phases]
    steps: PeerSteps

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make an optimizer whose step is all that the peer does after the second gradient."""
        assert self.model is not None
        self.steps = PeerSteps(list(self.model.parameters()), self.make_phases)
        self.optimizer = self.steps
        return self.steps

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Take both gradients."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.steps.phases[0][1]()
        model.zero_grad()
        super().training_step(model, inputs, num_items_in_batch)
        return loss


class PeerSteps(torch.optim.Optimizer):
    """What the Trainer needs to see of a peer: groups, and a step."""

    def __init__(self, parameters: list[torch.Tensor], make_phases: Callable[..., Phases]) -> None:
        super().__init__(parameters, {"lr": 1e-5})
        self.phases = make_phases(parameters, fused=True)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do all phases but the first."""
        for _, work in self.phases[1:]:
            work()


def make_rows(rows: int, length: int, vocab_size: int) -> datasets.Dataset:
    """Return rows of random tokens."""
    tokens = torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(tokens)
    labels = [index % 2 for index in range(rows)]
    return datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": ones.tolist(), "labels": labels})


def make_model(name: str) -> PreTrainedModel:
    """Return an encoder with random weights."""
    set_seed(0)
    return AutoModelForSequenceClassification.from_config(CONFIGS[name]())


def cases(arguments: BenchmarkArguments) -> dict[str, tuple[type[Trainer], dict[str, Any]]]:
    """Return the class of the trainer and options by the name of the case."""
    adamw = {"optim": "adamw_torch_fused"}
    found: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
        PLAIN: (Trainer, adamw),
        "LightSAMTrainer, AdamW (fused)": (LightSAMTrainer, adamw),
        **{f"LightSAMTrainer, {name}": (LightSAMTrainer, {"optim": name}) for name in arguments.methods},
    }
    for option in arguments.cheaper:
        name, _, value = option.partition("=")
        options = {"optim": "lightsam_adam", name: yaml.safe_load(value)}
        found[f"LightSAMTrainer, lightsam_adam, {option}"] = (LightSAMTrainer, options)
    if arguments.peers:
        try:
            import peers
        except ImportError as error:
            raise UsageError(f"peers=True: {error}; expected pytorch-optimizer to be there, or --no_peers") from None
        for name, make in (("pytorch_optimizer", peers.packaged_sam), ("davda54 style", peers.two_step_sam)):
            kind = type("PeerTrainer", (PeerTrainer,), {"make_phases": staticmethod(make)})
            found[f"{name} SAM(AdamW), fused"] = (kind, adamw)
    return found


def measure(arguments: BenchmarkArguments, folder: str, warm_up: int = 3) -> dict[str, Any]:
    """Have all cases take turns; return what goes into the result file."""
    device = torch.device(arguments.device)
    steps = warm_up + arguments.repetitions
    vocab_size = CONFIGS[arguments.model]().vocab_size
    rows = make_rows(arguments.batch_size * steps, arguments.length, vocab_size)
    turns: dict[str, Turns] = {}
    threads = []
    for name, (kind, options) in cases(arguments).items():
        make_arguments = LightSAMTrainingArguments if kind is LightSAMTrainer else TrainingArguments
        args = make_arguments(
            output_dir=folder,
            per_device_train_batch_size=arguments.batch_size,
            max_steps=steps,
            learning_rate=1e-5,
            bf16=arguments.bf16,
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=arguments.device == "cpu",
            dataloader_pin_memory=arguments.device != "cpu",
            **options,
        )
        turn = turns[name] = Turns(Timing(), device, warm_up)
        trainer = kind(make_model(arguments.model), args, train_dataset=rows, callbacks=[turn])
        trainer.remove_callback(PrinterCallback)
        threads.append(threading.Thread(target=turn.run, args=(trainer.train,), daemon=True))
        threads[-1].start()
    for _ in range(steps):
        for turn in turns.values():
            turn.take()
    settings = {name: getattr(arguments, name) for name in ("model", "batch_size", "length", "bf16")}
    return {**settings, **environment(device), "seconds": {name: turn.timing.seconds for name, turn in turns.items()}}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of results in Markdown."""
    parts = []
    for result in results:
        timings = {name: Timing(seconds) for name, seconds in result["seconds"].items()}
        lines = []
        for name, timing in timings.items():
            low, high = timing.quartiles
            told = f"{1e3 * timing.median:.0f} ({1e3 * low:.0f} to {1e3 * high:.0f})"
            lines.append([name, told, f"{ratio(timing, timings[PLAIN]):.3f}"])
        precision = "bfloat16 autocast" if result["bf16"] else "float32"
        where = (
            f"{result['hardware']}, {result['threads']} threads" if result["device"] == "cpu" else result["hardware"]
        )
        title = (
            f"**{result['model']}**, {result['batch_size']} rows of {result['length']} tokens, {precision}; {where}, "
        )
        title += f"torch {result['torch']}, {len(timings[PLAIN].seconds)} turns"
        parts += [title, "", markdown(["", "step, ms (quartiles)", "over the first"], lines, numbers_from=1), ""]
    return "\n".join(parts).strip()


def main(argv: list[str] | None = None) -> None:
    """Run what the flags ask for."""
    with report_usage_errors("training_step.py", (UsageError,)):
        (arguments,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
        if not arguments.table:
            logging.set_verbosity_error()
            with tempfile.TemporaryDirectory() as folder:
                result = measure(arguments, folder)
            add(arguments.results, result, ("model", "batch_size", "length", "bf16", "device", "hardware"))
        print(table(read(arguments.results)))


if __name__ == "__main__":
    main()
