"""How much memory does an optimizer take beyond weights and gradients, at its peak?

Parameters have the shapes of a real model; two steps are taken, the first of which makes the state. The peak is that of
torch's own allocator (on the CPU as its profiler tells it), in sizes of the trained weights. The last case are LoRA's
adapters (PEFT, rank 8) on the same model, of which only they are trained.

    python examples/benchmarks/memory.py
    python examples/benchmarks/memory.py --table     # the table, from the committed results
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import Phases, add, check_device, environment, read, trace
from phases import make_parameters, of
from shapes import CONFIGS, check_models, shapes_of
from torch import Tensor
from transformers import AutoModelForSequenceClassification, HfArgumentParser

from hf_lightsam import SAM, LightSAM, UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue.suite.tables import markdown

RESULTS = Path(__file__).parent / "results" / "memory.json"


@dataclass
class BenchmarkArguments:
    """What to measure."""

    models: list[str] = field(
        default_factory=lambda: ["MiniLM-L6", "BERT-base"], metadata={"help": "Of " + ", ".join(CONFIGS)}
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    results: str = field(default=str(RESULTS), metadata={"help": "JSON file; runs of the same kind are replaced."})
    table: bool = field(default=False, metadata={"help": "Print the results that are there; measure nothing."})

    def __post_init__(self) -> None:
        check_models(self.models)
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"device={self.device!r}: expected cpu or cuda")


def _packaged(parameters: list[Tensor]) -> Phases:
    from peers import packaged_sam

    return packaged_sam(parameters)


def _two_step(parameters: list[Tensor]) -> Phases:
    from peers import two_step_sam

    return two_step_sam(parameters)


CASES: Mapping[str, tuple[Callable[[list[Tensor]], Phases], float]] = {
    "AdamW (fused)": (lambda p: [("step", torch.optim.AdamW(p, fused=True).step)], 2),
    "LightSAM-AdaGrad-Norm": (lambda p: of(LightSAM(p, variant="adagrad_norm")), 1),
    "LightSAM-Adagrad": (lambda p: of(LightSAM(p, variant="adagrad")), 3),
    "LightSAM-Adam": (lambda p: of(LightSAM(p)), 5),
    "LightSAM-Adagrad, factored ascent": (lambda p: of(LightSAM(p, variant="adagrad", ascent_state="factored")), 2),
    "LightSAM-Adam, factored ascent": (lambda p: of(LightSAM(p, ascent_state="factored")), 3.5),
    "SAM(AdamW)": (lambda p: of(SAM(p, "adamw")), 3),
    "pytorch_optimizer SAM(AdamW)": (_packaged, 3),
    "davda54 style SAM(AdamW)": (_two_step, 3),
}
"""What makes the phases, and the copies that state and saved weights are: beyond them are temporaries."""

LORA = "LightSAM-Adam, LoRA's adapters"


def peak(model: str, case: str, device: torch.device) -> dict[str, int]:
    """Return the peak beyond weights and gradients, and the size of the trained weights, in bytes."""
    if case == LORA:
        from peft import LoraConfig, get_peft_model

        base = AutoModelForSequenceClassification.from_config(CONFIGS[model]()).to(device)
        adapted = get_peft_model(base, LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"))
        parameters: list[Tensor] = [p for p in adapted.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        make = CASES["LightSAM-Adam"][0]
    else:
        parameters = make_parameters(shapes_of(model), device, torch.float32)
        make = CASES[case][0]
    peak_bytes = _peak_on_cuda if device.type == "cuda" else _peak_on_cpu
    trained = sum(p.nbytes for p in parameters)
    return {"bytes": peak_bytes(lambda: two_steps(make, parameters)), "trained": trained}


def two_steps(make: Callable[[list[Tensor]], Phases], parameters: list[Tensor]) -> None:
    """Make an optimizer and take two steps."""
    phases = make(parameters)
    for _ in range(2):
        for _, work in phases:
            work()


def _peak_on_cuda(work: Callable[[], object]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(work: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = trace(profiler)["traceEvents"]
    changes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in changes))


def measure(model: str, device: str) -> dict[str, Any]:
    """Measure all cases; return what goes into the result file."""
    place = check_device(device)
    found = {case: peak(model, case, place) for case in _cases(model)}
    return {"model": model, **environment(place), "peaks": found}


def _cases(model: str) -> Iterator[str]:
    yield from CASES
    if model != "decoder-1B":
        yield LORA


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of results in Markdown."""
    parts = []
    for result in results:
        lines = []
        for case, one in result["peaks"].items():
            expected = CASES[case][1] if case in CASES else CASES["LightSAM-Adam"][1]
            of_trained = one["bytes"] / one["trained"]
            lines.append(
                [
                    case,
                    f"{one['trained'] / 4e6:.2f}M",
                    f"{one['bytes'] / 2**20:.0f}",
                    f"{of_trained:.2f}",
                    f"{expected:g}",
                    f"{of_trained - expected:+.2f}",
                ]
            )
        head = ["", "trained weights", "peak, MiB", "in copies of them", "state and saved weights", "temporaries"]
        title = f"**{result['model']}**; {result['hardware']}, torch {result['torch']}"
        parts += [title, "", markdown(head, lines, numbers_from=1), ""]
    return "\n".join(parts).strip()


def main(argv: list[str] | None = None) -> None:
    """Run what the flags ask for."""
    with report_usage_errors("memory.py", (UsageError,)):
        (arguments,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
        if not arguments.table:
            for model in arguments.models:
                add(arguments.results, measure(model, arguments.device), ("model", "device", "hardware"))
        print(table(read(arguments.results)))


if __name__ == "__main__":
    main()
